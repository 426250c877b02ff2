"""Several servers on one PostgreSQL database, and a database that fails."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sqlalchemy")
from sqlalchemy.exc import OperationalError

from modules.chat import postgres, presence, schema_sql
from modules.chat.places import open_place, passwords, read_url
from modules.chat.store_postgres import PostgresChatStore
from modules.config import Config
from modules.errors import (
    ConfigError,
    Conflict,
    StorageError,
    StorageFull,
    StorageReadOnly,
    StorageUnreachable,
    StoreLocked,
)

from ..postgres_lab import PASSWORD

if TYPE_CHECKING:
    from modules.chat.store import Change, ChatStore, Snapshot

    from ..postgres_lab import Postgres

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0  # an upper bound for a wait, never a measure


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "LOOK_S", 0.05)
    monkeypatch.setattr(presence, "RETRY_S", 0.05)


class Heard:
    """What a store was told of."""

    def __init__(self, store: ChatStore) -> None:
        self.changes: asyncio.Queue[str | None] = asyncio.Queue()
        store.on_change = self.changes.put_nowait

    async def until(self, what: str | None) -> None:
        while await asyncio.wait_for(self.changes.get(), LIMIT_S) != what:
            pass


@pytest.fixture
async def servers(url: str, tmp_path: Path) -> AsyncIterator[tuple[PostgresChatStore, PostgresChatStore]]:
    stores = (PostgresChatStore(url, tmp_path / "a"), PostgresChatStore(url, tmp_path / "b"))
    for store in stores:
        assert await store.open() == []
    yield stores
    for store in stores:
        await store.close()


async def say(store: ChatStore, chat: str, key: str, **more: Any) -> Change:
    return await store.add_message(chat, f"question {key}", client_id=key, generation=f"g-{key}", **more)


async def said(store: ChatStore, chat: str, key: str) -> Snapshot:
    change = await say(store, chat, key)
    assert change.node is not None
    assert await store.finish(change.node, f"g-{key}", text=f"answer {key}", status="complete")
    return await store.snapshot(chat)


async def until(condition: Callable[[], Any]) -> None:
    async def wait() -> None:
        while not await condition():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), LIMIT_S)


def texts(snapshot: Snapshot) -> list[str]:
    return [message.text for message in snapshot.messages]


Two = tuple[PostgresChatStore, PostgresChatStore]

# --- several servers -------------------------------------------------------------------------------------------------


async def test_two_servers_see_one_another_and_hear_of_changes(servers: Two) -> None:
    one, two = servers
    heard = Heard(two)
    chat = (await one.create("Shared")).id
    await heard.until(chat)
    assert (await two.snapshot(chat)).title == "Shared"
    change = await say(one, chat, "k")
    await heard.until(chat)
    shown = await two.snapshot(chat)
    assert shown.messages[-1].status == "generating" and shown.revision == change.snapshot.revision
    assert (await two.conversations())[0].generating
    assert change.node is not None
    await one.checkpoint(change.node, "g-k", "so far")
    await heard.until(chat)
    assert texts(await two.snapshot(chat))[-1] == "so far", "the other page sees it grow"
    assert not await two.checkpoint(change.node, "g-k", "stolen") and not await two.finish(
        change.node, "g-k", text="stolen", status="complete"
    )
    await one.finish(change.node, "g-k", text="whole", status="complete")
    await heard.until(chat)
    assert texts(await two.snapshot(chat))[-1] == "whole"


async def test_a_change_on_an_old_revision_is_a_conflict_across_servers(servers: Two) -> None:
    one, two = servers
    chat = (await one.create()).id
    seen = await said(one, chat, "first")
    await said(two, chat, "second")
    with pytest.raises(Conflict) as caught:
        await say(one, chat, "third", parent=seen.leaf, revision=seen.revision)
    assert "question second" in texts(caught.value.detail["snapshot"])
    branch = await say(one, chat, "third", parent=seen.leaf, revision=seen.revision, branch=True)
    assert texts(branch.snapshot)[-2:] == ["question third", ""]
    with pytest.raises(Conflict):
        await two.update(chat, {"title": "x"}, revision=seen.revision)


async def test_at_the_same_moment_one_of_many_wins_and_the_others_are_told(servers: Two) -> None:
    chat = (await servers[0].create()).id
    seen = await said(servers[0], chat, "first")
    tries = [say(servers[n % 2], chat, f"k{n}", parent=seen.leaf, revision=seen.revision) for n in range(8)]
    results = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(not isinstance(result, BaseException) for result in results) == 1
    assert sum(isinstance(result, Conflict) for result in results) == 7
    now = await servers[1].snapshot(chat)
    assert len(now.messages) == 4 and now.revision == seen.revision + 1
    branches = [say(servers[n % 2], chat, f"b{n}", parent=seen.leaf, branch=True) for n in range(8)]
    assert all(change.fresh for change in await asyncio.gather(*branches))
    now = await servers[0].snapshot(chat)
    assert len(now.messages[2].siblings) == 9 and now.revision == seen.revision + 9, "nothing was lost, each was counted"


async def test_the_same_action_sent_to_both_servers_is_done_once(servers: Two) -> None:
    chat, chat_a, chat_b = [(await servers[0].create()).id for _ in range(3)]
    tries = [servers[n % 2].add_message(chat, "hi", client_id="one click", generation=f"g{n}") for n in range(6)]
    changes = await asyncio.gather(*tries)
    assert sum(change.fresh for change in changes) == 1 and len({change.node for change in changes}) == 1
    assert len((await servers[0].snapshot(chat)).messages) == 2
    # Into different conversations no row lock keeps them apart: the second finds the first one's action.
    both = await asyncio.gather(say(servers[0], chat_a, "again"), say(servers[1], chat_b, "again"))
    assert sum(change.fresh for change in both) == 1 and both[0].node == both[1].node


async def test_deletes_and_undos_of_two_servers(servers: Two) -> None:
    one, two = servers
    chat = (await one.create()).id
    seen = await said(one, chat, "q")
    results = await asyncio.gather(*(s.delete(seen.messages[0].id) for s in (one, two, one, two)))
    assert len({token for _, token in results}) == 1, "deleting again gives the same token, wherever"
    undone = await asyncio.gather(*(s.undo(results[0][1]) for s in (one, two)))
    assert texts(undone[0]) == texts(undone[1]) == ["question q", "answer q"]
    await two.update(chat, {"trashed": True})
    with pytest.raises(Conflict, match="trash"):
        await say(one, chat, "more")
    await two.purge(chat)
    assert await one.conversations(trashed=True) == []


CHILD = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from modules.chat.store_postgres import PostgresChatStore

async def main():
    store = PostgresChatStore(sys.argv[2], Path(sys.argv[3]))
    await store.open()
    chat = (await store.create("of the child")).id
    change = await store.add_message(chat, "q", client_id="child", generation="g")
    await store.checkpoint(change.node, "g", "half an ans")
    print(chat, change.node, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
async def test_a_killed_servers_answer_is_interrupted_by_another_and_not_while_it_lives(url: str, tmp_path: Path) -> None:
    store = PostgresChatStore(url, tmp_path / "a")
    await store.open()
    heard = Heard(store)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT), url, str(tmp_path / "child")], stdout=subprocess.PIPE, encoding="utf-8"
    ) as child:
        try:
            assert child.stdout is not None
            chat, node = (await asyncio.to_thread(child.stdout.readline)).split()
            third = PostgresChatStore(url, tmp_path / "c")
            assert await third.open() == [], "a server that starts leaves the answers of those that live"
            await third.close()
            await asyncio.to_thread(store._look)
            assert (await store.snapshot(chat)).messages[-1].status == "generating"
            with pytest.raises(Conflict, match="still being written"):
                await say(store, chat, "too early")
        finally:
            child.send_signal(signal.SIGKILL)
    while (last := (await store.snapshot(chat)).messages[-1]).status == "generating":
        await heard.until(chat)
    assert (last.id, last.text, last.status) == (node, "half an ans", "interrupted")
    change = await store.reopen(node, client_id="go on", generation="g2")
    assert change.prefix == "half an ans"
    await store.close()


async def test_what_a_dead_server_left_is_said_at_the_next_start(url: str, tmp_path: Path) -> None:
    store = PostgresChatStore(url, tmp_path)
    await store.open()
    chat = (await store.create()).id
    await say(store, chat, "q")
    await store.close()
    store = PostgresChatStore(url, tmp_path)
    notices = await store.open()
    assert len(notices) == 1 and "cut off" in notices[0].text
    assert (await store.snapshot(chat)).messages[-1].status == "interrupted"
    await store.close()


async def test_a_server_that_was_only_cut_off_comes_back_and_goes_on_writing(
    postgres: Postgres, url: str, servers: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = servers
    chat = (await one.create()).id
    change = await say(one, chat, "q")
    assert change.node is not None and one._presence is not None
    heard, again = Heard(two), Heard(one)
    monkeypatch.setattr(one._presence, "_connect", _refused)
    backends = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = "
    postgres.sql(url.rpartition("/")[2].partition("?")[0], backends + str(one._presence.number))
    while (await two.snapshot(chat)).messages[-1].status == "generating":
        await heard.until(chat)
    monkeypatch.undo()
    await again.until(None)  # back, and told that it may have missed something
    assert await one.checkpoint(change.node, "g-q", "I live"), "its text is still its own"
    assert (await two.snapshot(chat)).messages[-1].status == "generating"
    assert await one.finish(change.node, "g-q", text="whole", status="complete")
    assert texts(await two.snapshot(chat))[-1] == "whole"


def _refused() -> None:
    raise OperationalError("", None, Exception("refused"))


async def test_one_data_folder_is_still_one_servers(url: str, tmp_path: Path, servers: Two) -> None:
    with pytest.raises(StoreLocked, match="data folder"):
        await PostgresChatStore(url, tmp_path / "a").open()


# --- a database that fails -------------------------------------------------------------------------------------------


async def test_a_database_that_restarts_in_between_is_not_noticed(tmp_path: Path, own: Postgres) -> None:
    store = PostgresChatStore(own.database(), tmp_path)
    await store.open()
    chat = (await store.create()).id
    await asyncio.to_thread(own.stop)
    with pytest.raises(StorageUnreachable, match="can't be reached") as caught:
        await said(store, chat, "while it is away")
    assert caught.value.http_status == 503 and PASSWORD not in str(caught.value)
    with pytest.raises(StorageUnreachable):
        await store.snapshot(chat)
    heard = Heard(store)
    await asyncio.to_thread(own.start)
    await heard.until(None)
    assert texts(await said(store, chat, "back")) == ["question back", "answer back"]
    await asyncio.to_thread(own.stop, kill=True)
    await asyncio.to_thread(own.start)
    assert len((await said(store, chat, "over stale connections")).messages) == 4
    await store.close()


@pytest.fixture
async def own(postgres: Postgres) -> AsyncIterator[Postgres]:
    """The shared server, which this test may stop."""
    yield postgres
    if postgres._process is None:
        postgres.start()


def lose_the_commit(store: PostgresChatStore, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The database commits, and the connection breaks before its answer comes."""
    real, left = store._engine.dialect.do_commit, [times]

    def commit(connection: Any) -> None:
        real(connection)
        if left[0] and threading.current_thread().name.startswith("chat-store"):
            left[0] -= 1
            connection.dbapi_connection.close()
            real(connection)  # psycopg's own error of a closed connection

    monkeypatch.setattr(store._engine.dialect, "do_commit", commit)


async def test_a_commit_whose_answer_was_lost_is_found_again(servers: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = servers
    chat = (await one.create()).id
    lose_the_commit(one, monkeypatch, 1)
    change = await say(one, chat, "q")
    assert change.fresh and len(change.snapshot.messages) == 2, "saved once, and still to be generated"
    assert change.node is not None
    lose_the_commit(one, monkeypatch, 1)
    await one.finish(change.node, "g-q", text="whole", status="complete")
    assert texts(await one.snapshot(chat)) == ["question q", "whole"]
    lose_the_commit(one, monkeypatch, 1)
    change = await one.reopen(change.node, client_id="go on", generation="g2")
    assert change.fresh and change.prefix == "whole"


async def test_what_has_no_name_is_not_done_twice(servers: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = servers
    lose_the_commit(one, monkeypatch, 1)
    with pytest.raises(StorageUnreachable):
        await one.create("once")
    assert len(await two.conversations()) == 1


async def test_an_answer_that_nobody_writes_is_not_left_open(servers: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = servers
    chat = (await one.create()).id
    lose_the_commit(one, monkeypatch, 2)
    with pytest.raises(StorageUnreachable):
        await say(one, chat, "q")

    async def interrupted() -> bool:
        messages = (await one.snapshot(chat)).messages
        return len(messages) == 2 and messages[-1].status == "interrupted"

    await until(interrupted)
    change = await one.add_message(chat, "question q", client_id="q", generation="another")
    assert not change.fresh, "the page sends it again, and sees what became of it"


@pytest.mark.parametrize(
    ("state", "kind", "words"),
    [
        ("53100", StorageFull, "Free some space"),
        ("57014", StorageUnreachable, "Try again"),
        ("25006", StorageReadOnly, "takes no changes"),
        ("XX000", StorageError, "refuses"),
    ],
)
async def test_the_databases_own_failures_are_typed(
    postgres: Postgres, url: str, tmp_path: Path, state: str, kind: type[StorageError], words: str
) -> None:
    store = PostgresChatStore(url, tmp_path)
    await store.open()
    chat = (await store.create()).id
    with store._engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no' USING ERRCODE = '{state}'; END $$"
        )
        connection.exec_driver_sql("CREATE TRIGGER fail BEFORE INSERT ON nodes FOR EACH ROW EXECUTE FUNCTION fail()")
    with pytest.raises(kind, match=words) as caught:
        await say(store, chat, "a secret question")
    assert type(caught.value) is kind and "secret" not in str(caught.value) and "INSERT" not in str(caught.value)
    with store._engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER fail ON nodes")
    assert (await say(store, chat, "a secret question")).fresh, "whole or not at all"
    await store.close()


async def test_a_read_only_database_is_said(postgres: Postgres, url: str, tmp_path: Path) -> None:
    name = url.rpartition("/")[2].partition("?")[0]
    postgres.sql("postgres", f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(StorageReadOnly, match="takes no changes"):
        await PostgresChatStore(url, tmp_path).open()
    postgres.sql("postgres", f"ALTER DATABASE {name} RESET default_transaction_read_only")
    store = PostgresChatStore(url, tmp_path)
    assert await store.open() == []
    await store.close()


async def test_what_is_wrong_at_the_start_is_said_with_what_to_do(postgres: Postgres, tmp_path: Path) -> None:
    wrong = {
        postgres.url("nowhere"): "createdb",
        postgres.url("postgres", password="not-it"): "user and the password",
        "postgresql://me:not-it@127.0.0.1:1/chats": "Check that it runs",
    }
    for url, words in wrong.items():
        with pytest.raises(StorageUnreachable, match=words) as caught:
            await PostgresChatStore(url, tmp_path).open()
        assert "not-it" not in str(caught.value) and PASSWORD not in str(caught.value)
    for url in ("mysql://me:not-it@host/x", "nonsense://", "sqlite:///x", "no url", "postgresql://me:not-it@host:port/x"):
        with pytest.raises(ConfigError) as refused:
            open_place(url, tmp_path)
        assert "not-it" not in str(refused.value)
    latin = f"latin_{os.getpid()}"
    postgres.sql("postgres", f"CREATE DATABASE {latin} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    with pytest.raises(StorageError, match="UTF8"):
        await PostgresChatStore(postgres.url(latin), tmp_path).open()
    name = f"guest_{os.getpid()}"
    postgres.sql("postgres", f"CREATE ROLE {name} LOGIN PASSWORD 'x'")
    with pytest.raises(StorageError, match="GRANT CREATE"):
        await PostgresChatStore(postgres.url("postgres", name, "x"), tmp_path).open()


def test_the_password_is_shown_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://me:h%40t@db/chats\n", encoding="utf-8")
    assert read_url(f"@{secret}") == "postgresql://me:h%40t@db/chats"
    assert passwords(f"@{secret}") == ["h%40t", "h@t"] and passwords(None) == []
    assert "h%40t" not in repr(Config(database_url=read_url(f"@{secret}")))
    assert "h%40t" not in str(postgres.parse_url(read_url(f"@{secret}")))
    with pytest.raises(ConfigError, match="can't be read"):
        read_url(f"@{tmp_path / 'missing'}")
    secret.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="no URL"):
        read_url(f"@{secret}")


async def test_text_that_postgresql_cannot_hold(servers: Two) -> None:
    one, _ = servers
    chat = (await one.create()).id
    change = await say(one, chat, "q")
    assert change.node is not None
    assert await one.checkpoint(change.node, "g-q", "a\0b") and await one.finish(
        change.node, "g-q", text="a\0b", status="failed", error={"message": "c\0d"}
    )
    last = (await one.snapshot(chat)).messages[-1]
    assert last.text == "ab" and last.error == {"message": "c\0d"}


# --- schemas ---------------------------------------------------------------------------------------------------------


def add_column(connection: schema_sql.Executes) -> None:
    connection.execute("ALTER TABLE conversations ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'")


def fail(connection: schema_sql.Executes) -> None:
    connection.execute("ALTER TABLE conversations ADD COLUMN half TEXT")
    connection.execute("ALTER TABLE nowhere ADD COLUMN half TEXT")


async def test_migrations_go_forward_alone_or_not_at_all(url: str, tmp_path: Path) -> None:
    old = PostgresChatStore(url, tmp_path / "a")
    await old.open()
    chat = (await old.create("kept")).id
    steps = schema_sql.POSTGRESQL_MIGRATIONS
    with pytest.raises(StoreLocked, match="older version"):
        await PostgresChatStore(url, tmp_path / "b", migrations=(*steps, add_column)).open()
    await old.close()
    with pytest.raises(StorageError, match="nowhere"):
        await PostgresChatStore(url, tmp_path / "b", migrations=(*steps, add_column, fail)).open()
    await old_again(url, tmp_path, chat)
    new = PostgresChatStore(url, tmp_path / "b", migrations=(*steps, add_column))
    assert await new.open() == []
    row = await new._read(lambda db: db.one("SELECT colour FROM conversations"))
    assert row is not None and row["colour"] == "blue" and (await new.snapshot(chat)).title == "kept"
    await new.close()
    with pytest.raises(StorageError, match="newer version"):
        await PostgresChatStore(url, tmp_path / "a").open()


async def old_again(url: str, tmp_path: Path, chat: str) -> None:
    store = PostgresChatStore(url, tmp_path / "a")
    assert await store.open() == [] and (await store.snapshot(chat)).title == "kept"
    await store.close()


async def test_many_servers_may_start_at_once_on_an_empty_database(url: str, tmp_path: Path) -> None:
    stores = [PostgresChatStore(url, tmp_path / str(n)) for n in range(4)]
    assert await asyncio.gather(*(store.open() for store in stores)) == [[]] * 4
    numbers = {store._presence.number for store in stores if store._presence is not None}
    assert len(numbers) == 4
    for store in stores:
        await store.close()


async def test_without_pg_trgm_search_is_slower_and_the_same(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgres, "index_trigrams", lambda engine: StorageError("no such extension"))
    with caplog.at_level(logging.INFO):
        store = PostgresChatStore(url, tmp_path)
        await store.open()
    assert "pg_trgm" in caplog.text
    await said(store, (await store.create()).id, "lighthouse")
    assert len(await store.conversations("LIGHT question")) == 1
    await store.close()


def test_a_start_without_a_database_url_does_not_wait_for_its_packages(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; import modules.app; from modules.chat.places import open_place; "
    code += f"open_place(Path({str(tmp_path)!r}), None); print([m for m in ('sqlalchemy', 'psycopg') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
