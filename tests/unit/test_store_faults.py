"""The chat store when disks, files and processes fail (catalogue C8, C12, C13, C16, C19)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modules.chat import store_files, store_memory
from modules.chat.places import is_url, open_place
from modules.chat.schema_sql import MIGRATIONS
from modules.chat.store_sqlite import SqliteChatStore
from modules.errors import StorageError, StorageFull, StorageReadOnly, StoreLocked

ROOT = Path(__file__).resolve().parents[2]


async def filled(folder: Path, text: str = "keep me") -> tuple[SqliteChatStore, str]:
    """An open store with one finished turn."""
    store = SqliteChatStore(folder)
    await store.open()
    chat = await store.create()
    change = await store.add_message(chat.id, text, client_id="c1", generation="g1")
    assert change.node is not None
    await store.finish(change.node, "g1", text="kept", status="complete")
    return store, chat.id


async def reopened(folder: Path) -> tuple[SqliteChatStore, list[str]]:
    store = SqliteChatStore(folder)
    notices = await store.open()
    return store, [notice.text for notice in notices]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


async def test_durability_settings(tmp_path: Path) -> None:
    store, _ = await filled(tmp_path)
    assert store._connection is not None
    pragmas = {name: store._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
    await store.close()


async def test_what_was_being_written_becomes_interrupted(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path)
    change = await store.add_message(chat, "q2", client_id="c2", generation="g2")
    assert change.node is not None
    await store.checkpoint(change.node, "g2", "half an ans")
    await store.close()
    store, notices = await reopened(tmp_path)
    last = (await store.snapshot(chat)).messages[-1]
    assert (last.text, last.status) == ("half an ans", "interrupted")
    assert len(notices) == 1 and "cut off" in notices[0]
    assert not await store.finish(change.node, "g2", text="a ghost", status="complete")
    await store.close()


# -- C12, C13: a disk that refuses


async def test_full_disk_keeps_the_old_state_and_recovers(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path)
    before = await store.snapshot(chat)
    assert store._connection is not None
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFull) as caught:
        await store.add_message(chat, "x" * 500_000, client_id="c2", generation="g2")
    assert caught.value.http_status == 507 and "disk is full" in str(caught.value)
    assert await store.snapshot(chat) == before
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert (await store.add_message(chat, "x" * 500_000, client_id="c2", generation="g2")).fresh
    await store.close()


async def test_a_disk_that_turns_read_only_is_replaced_by_memory_until_it_is_back(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path)
    on_disk = await store.snapshot(chat)
    assert store._connection is not None
    store._connection.execute("PRAGMA query_only = ON")  # SQLite's own SQLITE_READONLY, also for root
    change = await store.add_message(chat, "in memory", client_id="c2", generation="g2")
    assert isinstance(store.memory_only, StorageReadOnly) and "can't be written" in str(store.memory_only)
    assert change.node is not None and await store.finish(change.node, "g2", text="too", status="complete")
    assert [m.text for m in (await store.snapshot(chat)).messages] == ["keep me", "kept", "in memory", "too"]
    assert len(await store.conversations("in memory")) == 1
    look = sqlite3.connect(store.path)
    assert look.execute("SELECT count(*) FROM nodes").fetchone()[0] == len(on_disk.messages), "the file is as it was"
    look.close()
    assert await store.save_again() and store.memory_only is None
    await store.create()
    expected = await store.snapshot(chat)
    await store.close()
    store, notices = await reopened(tmp_path)
    assert notices == [] and await store.snapshot(chat) == expected
    assert [m.text for m in expected.messages][2:] == ["in memory", "too"]
    assert store._connection is not None and store._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    await store.close()


async def test_what_is_in_memory_is_written_at_an_orderly_end_if_it_can_be(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path)
    assert store._connection is not None
    store._connection.execute("PRAGMA query_only = ON")
    await store.update(chat, {"title": "Renamed"})
    assert store.memory_only
    await store.close()
    store, _ = await reopened(tmp_path)
    assert (await store.snapshot(chat)).title == "Renamed"
    await store.close()


async def test_a_large_database_is_not_copied_to_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_memory, "LIMIT_BYTES", 1000)
    store, chat = await filled(tmp_path)
    before = await store.snapshot(chat)
    assert store._connection is not None
    store._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageReadOnly):
        await store.create()
    assert store.memory_only is None and await store.snapshot(chat) == before
    store._connection.execute("PRAGMA query_only = OFF")
    await store.create()
    await store.close()


class FailingConnection:
    """A connection whose statements fail as a broken disk makes them fail."""

    def __init__(self, real: sqlite3.Connection, on: str, message: str) -> None:
        self._real, self._on, self._message = real, on, message

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql.startswith(self._on):
            raise sqlite3.OperationalError(self._message)
        return self._real.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def test_after_a_failed_fsync_everything_is_written_anew(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path)
    real = store._connection
    assert real is not None
    store._connection = FailingConnection(real, "COMMIT", "disk I/O error")  # type: ignore[assignment]
    assert (await store.add_message(chat, "lost?", client_id="c2", generation="g2")).fresh
    assert "disk reported an error" in str(store.memory_only)
    with pytest.raises(sqlite3.ProgrammingError):
        real.execute("SELECT 1")  # closed: nobody knows what its pages are worth
    assert await store.save_again()
    await store.close()
    store, _ = await reopened(tmp_path)
    assert (await store.snapshot(chat)).messages[2].text == "lost?"
    await store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not let an open file be removed")
async def test_a_removed_folder_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    store, chat = await filled(folder)
    folder.rename(tmp_path / "elsewhere")
    assert (await store.add_message(chat, "q", client_id="c2", generation="g2")).fresh
    assert "moved or removed" in str(store.memory_only)
    folder.mkdir()
    (folder / "chats.sqlite").write_bytes(b"a stranger's")
    assert not await store.save_again(), "another file in its place is not written to"
    assert (folder / "chats.sqlite").read_bytes() == b"a stranger's"
    (folder / "chats.sqlite").unlink()
    folder.rmdir()
    assert not await store.save_again()
    (tmp_path / "elsewhere").rename(folder)
    assert await store.save_again() and store.memory_only is None
    await store.close()
    store, _ = await reopened(folder)
    assert (await store.snapshot(chat)).messages[2].text == "q"
    await store.close()


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageReadOnly, match="can't be written"):
        await SqliteChatStore(tmp_path / "file" / "data").open()


# -- C16: two servers


async def test_a_second_server_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path)
    with pytest.raises(StoreLocked) as caught:
        await SqliteChatStore(tmp_path).open()
    assert str(os.getpid()) in caught.value.message and "--user-data-dir" in caught.value.hint
    await store.create()
    await store.close()
    store, notices = await reopened(tmp_path)
    assert notices == [] and (await store.snapshot(chat)).messages
    await store.close()


async def test_a_lock_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    code += "from modules.chat.store_files import DataDirLock\nimport os\n"
    code += f"lock = DataDirLock(Path({str(tmp_path)!r})); lock.acquire(); print('held', flush=True); os._exit(1)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip() == "held"
    store, _ = await reopened(tmp_path)
    await store.close()


# -- C19: files that are not what they should be

BROKEN = {
    "binary": lambda good: bytes(range(256)) * 64,
    "json": lambda good: b"{}",
    "bom": lambda good: b"\xef\xbb\xbf" + good,
    "cut in half": lambda good: good[: len(good) // 2],
    "cut to the header": lambda good: good[:100],
    "one byte": lambda good: good[:1],
    "empty": lambda good: b"",
    "pages of zeros": lambda good: good[:4096] + bytes(len(good) - 4096),
    "pages of noise": lambda good: good[:4096] + random.Random(1).randbytes(len(good) - 4096),
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_an_unreadable_file_is_kept_and_the_backup_taken(tmp_path: Path, kind: str) -> None:
    store, chat = await filled(tmp_path)
    assert await store.backup()
    await store.close()
    broken = BROKEN[kind](store.path.read_bytes())
    store.path.write_bytes(broken)
    store, notices = await reopened(tmp_path)
    assert [message.text for message in (await store.snapshot(chat)).messages] == ["keep me", "kept"]
    assert len(notices) == 1 and "could not be read" in notices[0] and "backup" in notices[0]
    moved = next(tmp_path.glob("chats.sqlite.corrupt-*"))
    assert moved.read_bytes() == broken and moved.name in notices[0]
    await store.create()
    await store.close()
    store, notices = await reopened(tmp_path)
    assert notices == []
    await store.close()


async def test_a_large_file_is_checked_after_a_bad_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_files, "FULL_CHECK_BYTES", 0)
    checks: list[str] = []
    real = store_files.connect

    def watched(path: Path, **options: Any) -> sqlite3.Connection:
        connection = real(path, **options)
        connection.set_trace_callback(lambda sql: checks.append(sql) if "quick_check" in sql else None)
        return connection

    monkeypatch.setattr(store_files, "connect", watched)
    store, chat = await filled(tmp_path)
    await store.close()
    checks.clear()
    store, _ = await reopened(tmp_path)
    assert checks == [], "the last end was an orderly one"
    assert store._connection is not None
    store._connection.close()  # as a killed process leaves it
    store._connection = None
    await store.close()
    store, _ = await reopened(tmp_path)
    assert len(checks) == 1
    assert (await store.snapshot(chat)).messages
    await store.close()


async def test_without_a_backup_a_new_store_is_begun_and_the_old_file_kept(tmp_path: Path) -> None:
    for number in range(2):  # also when an earlier corpse lies there
        (tmp_path / "chats.sqlite").write_bytes(b"rubbish %d" % number)
        store, notices = await reopened(tmp_path)
        assert "no backup" in notices[0]
        assert await store.conversations() == []
        await store.close()
        (tmp_path / "chats.sqlite").unlink()
    assert sorted(path.read_bytes() for path in tmp_path.glob("*.corrupt-*")) == [b"rubbish 0", b"rubbish 1"]


async def test_a_broken_backup_is_passed_over(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path)
    first = await store.backup()
    await store.create("newer")
    second = await store.backup()
    await store.close()
    assert first and second and first != second
    backups = store.backups.newest_first()
    assert [path.name for path in backups] == [second, first]
    backups[0].write_bytes(b"also rubbish")
    store.path.write_bytes(b"rubbish")
    store, notices = await reopened(tmp_path)
    assert first in notices[0]
    assert (await store.snapshot(chat)).messages[0].text == "keep me"
    await store.close()


async def test_another_programs_database_is_moved_aside(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "chats.sqlite")
    other.execute("CREATE TABLE recipes (name TEXT)")
    other.commit()
    other.close()
    store, notices = await reopened(tmp_path)
    assert "another program" in notices[0]
    await store.close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    store, _ = await filled(tmp_path)
    assert store._connection is not None
    store._connection.execute("PRAGMA user_version = 99")
    store._connection.execute("DROP TABLE undo")
    await store.close()
    before = store.path.read_bytes()
    with pytest.raises(StorageError, match="newer version"):
        await SqliteChatStore(tmp_path).open()
    assert store.path.read_bytes() == before
    assert not list(tmp_path.glob("*.corrupt-*"))
    with pytest.raises(StorageError, match="newer version"):  # the lock was given back
        await SqliteChatStore(tmp_path).open()


async def test_migrations_go_forward_with_a_backup_or_not_at_all(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path)
    await store.close()

    def add_column(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE conversations ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'")

    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE conversations ADD COLUMN half TEXT")
        raise sqlite3.OperationalError("no such thing")

    broken = SqliteChatStore(tmp_path, migrations=(*MIGRATIONS, add_column, fail))
    with pytest.raises(StorageError):
        await broken.open()
    store, notices = await reopened(tmp_path)
    assert notices == [] and (await store.snapshot(chat)).messages, "the old version still opens its file"
    await store.close()
    newer = SqliteChatStore(tmp_path, migrations=(*MIGRATIONS, add_column))
    assert await newer.open() == []
    assert newer._connection is not None
    assert newer._connection.execute("SELECT colour FROM conversations").fetchone()[0] == "blue"
    assert (await newer.snapshot(chat)).messages[0].text == "keep me"
    assert newer.backups.newest_first()
    await newer.close()


async def test_an_index_built_elsewhere_catches_up(tmp_path: Path) -> None:
    store, chat = await filled(tmp_path, "written with the index")
    await store.close()
    without = SqliteChatStore(tmp_path, full_text=False)
    await without.open()
    await without.add_message(chat, "written without it", client_id="c2", generation="g2")
    assert len(await without.conversations("written without")) == 1
    await without.close()
    store, _ = await reopened(tmp_path)
    for query in ("written with", "written without"):
        assert len(await store.conversations(query)) == 1
    assert store._connection is not None
    assert store._connection.execute("SELECT count(*) FROM nodes WHERE indexed = 0").fetchone()[0] == 0
    await store.close()


# -- backups


async def test_backups_are_kept_to_five_and_made_only_after_changes(tmp_path: Path) -> None:
    store, _ = await filled(tmp_path)
    made = [await store.backup()]
    assert await store.backup() is None, "nothing changed"
    for n in range(7):
        await store.create(str(n))
        made.append(await store.backup())
    kept = [path.name for path in store.backups.newest_first()]
    assert kept == made[-5:][::-1]
    assert files(tmp_path / "backups") == sorted(kept), "no half-made file, no companions"
    await store.close()


async def test_a_backup_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = await filled(tmp_path)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_files.os, "fsync", no_space)
    with pytest.raises(StorageError, match="No space left"):
        await store.backup()
    assert files(tmp_path / "backups") == []
    monkeypatch.undo()
    assert await store.backup()
    await store.close()


# -- C8: the kill test

CHILD = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from modules.chat.places import is_url, open_place

async def main():
    store = open_place(sys.argv[2] if is_url(sys.argv[2]) else Path(sys.argv[2]), None)
    await store.open()
    run = sys.argv[3]
    chat = (await store.create(run)).id
    print(json.dumps({"chat": chat}), flush=True)
    for n in range(10_000):
        key = f"{run}-{n}"
        change = await store.add_message(chat, f"question {key}", client_id=key, generation=key)
        print(json.dumps({"chat": chat, "node": change.snapshot.messages[-2].id, "text": f"question {key}"}), flush=True)
        text = ""
        for part in range(3):
            text += f"part {part} of {key}. " * 20
            await store.checkpoint(change.node, key, text)
            print(json.dumps({"chat": chat, "node": change.node, "text": text, "partial": True}), flush=True)
        await store.finish(change.node, key, text=text + "END", status="complete")
        print(json.dumps({"chat": chat, "node": change.node, "text": text + "END"}), flush=True)
        if n % 5 == 4:
            await store.backup()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_nothing_acknowledged_is_lost_to_a_kill(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """SWITCHYARD_KILL_ROUNDS sets the number of kills (1000 for the full run)."""
    place = str(tmp_path) if kind == "sqlite" else str(request.getfixturevalue("postgres").database())
    rounds = int(os.environ.get("SWITCHYARD_KILL_ROUNDS", "12" if kind == "sqlite" else "4"))
    chance = random.Random(rounds)
    acknowledged: dict[str, dict[str, Any]] = {}
    chats: set[str] = set()
    for number in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT), place, f"run{number}"], stdout=subprocess.PIPE, encoding="utf-8"
        )
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(chance.randint(2, 30))]
        time.sleep(chance.uniform(0, 0.02))  # anywhere in what it does next
        child.send_signal(signal.SIGKILL)
        lines += child.stdout
        child.wait()
        child.stdout.close()
        for line in lines:
            if line.endswith("\n"):  # a torn line was not received
                said = json.loads(line)
                chats.add(said["chat"])
                if "node" in said:
                    acknowledged[said["node"]] = said
        if number % 25 == 24 or number == rounds - 1:
            store = open_place(place if is_url(place) else tmp_path, None)
            assert not [notice.text for notice in await store.open() if "could not be read" in notice.text]
            found = {node.key: node for chat in chats for node in (await store.export(chat)).nodes}
            for node, said in acknowledged.items():
                assert found[node].text.startswith(said["text"]), "a later checkpoint may have got through, an earlier one not"
                assert said.get("partial") or found[node].text == said["text"]
                assert found[node].status in ("complete", "interrupted")
            await store.close()
    assert len(acknowledged) >= rounds
    assert not list(tmp_path.glob("*.corrupt-*"))


# -- real file systems, in a mount namespace of the test's own

REAL_DISK = """
import asyncio, subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from modules.chat.store_sqlite import SqliteChatStore
from modules.errors import StorageError, StorageFull, StorageReadOnly

disk = Path(sys.argv[2])

async def main():
    store = SqliteChatStore(disk / "data")
    await store.open()
    chat = (await store.create()).id
    change = await store.add_message(chat, "kept", client_id="c0", generation="g0")
    assert await store.backup()
    (disk / "filler").write_bytes(bytes(2_000_000))
    number = 0
    try:
        while True:
            number += 1
            await store.checkpoint(change.node, "g0", "text " * 2000 * number)
    except StorageFull as error:
        assert "Free some space" in str(error)
    kept = await store.snapshot(chat)
    assert kept.messages[1].text == "text " * 2000 * (number - 1), "the last save that was acknowledged"
    for _ in range(3):
        try:
            await store.add_message(chat, "x" * 300_000, client_id="big", generation="g1", parent=kept.messages[0].id)
        except StorageFull:
            pass
        else:
            raise AssertionError("it can't have fitted")
    try:
        await store.backup()
    except StorageError:
        pass
    assert not list((disk / "data" / "backups").glob("*.part"))
    (disk / "filler").unlink()
    assert await store.finish(change.node, "g0", text="whole", status="complete")
    await store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        await SqliteChatStore(disk / "data").open()
    except StorageReadOnly as error:
        assert "can't be written" in str(error), error
    else:
        raise AssertionError("a read-only disk was taken")
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    again = SqliteChatStore(disk / "data")
    assert await again.open() == []
    assert (await again.snapshot(chat)).messages[1].text == "whole"
    await again.close()
    print("ALL GOOD")

asyncio.run(main())
"""


def test_a_real_disk_that_is_full_and_then_read_only(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare(1)")
    script = 'mount -t tmpfs -o size=3m tmpfs "$1" && echo MOUNTED && exec "$2" -c "$3" "$4" "$1"'
    command = [unshare, "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, REAL_DISK, str(ROOT)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=120)
    if "MOUNTED" not in done.stdout:
        pytest.skip(f"this system lets nobody mount a file system: {done.stderr.strip()[:100]}")
    assert "ALL GOOD" in done.stdout, done.stderr
