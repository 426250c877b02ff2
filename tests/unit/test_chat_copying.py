"""Chats on their way from SQLite to PostgreSQL and back."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("sqlalchemy")

from modules.chat import copying, store_images
from modules.chat.places import open_place
from modules.config import Config
from modules.errors import Conflict, InvalidParameter, NotFound, StorageError, StoreCorrupt, StoreLocked
from tests.pictures import png

from .test_store_walk import Walk

if TYPE_CHECKING:
    from pathlib import Path

    from modules.chat.store import ChatStore
    from modules.chat.store_sql import SqlChatStore
    from tests.postgres_lab import Postgres


IMAGE = store_images.name_of(png(), "png")


async def filled(folder: Path) -> tuple[list[str], str]:
    """A data folder with a conversation that has everything, one in the trash and a pinned one; and an undo token."""
    store = open_place(folder, None)
    await store.open()
    walk = Walk(store, (await store.create("Walk", "Be kind.")).id, 3)
    for _ in range(60):
        try:
            await walk.step()
        except (Conflict, NotFound, InvalidParameter):
            continue
    change = await store.add_message(walk.conversation, "École\0 of\nletters", client_id="ünique", generation="g")
    assert change.node is not None
    await store.finish(change.node, "g", text="a receipt", status="complete", receipt={"n": [1.5, "\0"]}, model="m", loader="l")
    _, token = await store.delete(change.snapshot.messages[-2].id)
    trash, pinned = (await store.create("Trash")).id, (await store.create("Pinned")).id
    await store.update(trash, {"trashed": True})
    await store.update(pinned, {"pinned": True})
    await store.close()
    return [walk.conversation, trash, pinned], token


async def picture(store: ChatStore, chats: list[str]) -> list[object]:
    found: list[object] = [await store.conversations(), await store.conversations(trashed=True)]
    for chat in chats:
        found.append(await store.snapshot(chat))
        found.append([(n.key, n.parent, n.status, n.receipt) for n in (await store.export(chat)).nodes])
    return found


async def opened(place: str | Path) -> SqlChatStore:
    store = open_place(place, None)
    assert await store.open() == []
    return store


def copy(source: object, target: object) -> int:
    return copying.run(argparse.Namespace(source=str(source), target=str(target)), Config())


async def test_there_and_back_everything_is_the_same(
    postgres: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, token = await filled(tmp_path / "old")
    url = postgres.database()
    secret = tmp_path / "url"
    secret.write_text(url, encoding="utf-8")
    before = await opened(tmp_path / "old")
    await before.keep_image(IMAGE, png())
    await before.add_version((await before.snapshot(chats[0])).messages[0].id, f"![x](cid:{IMAGE})", client_id="image")
    await before.close()
    assert await asyncio.to_thread(copy, tmp_path / "old", f"@{secret}") == 0
    shown = capsys.readouterr().out
    assert "Copied and compared: 3 chats" in shown and ", 1 images" in shown
    assert await asyncio.to_thread(copy, url, tmp_path / "new") == 0
    old, database, new = [await opened(place) for place in (tmp_path / "old", url, tmp_path / "new")]
    expected = await picture(old, chats)
    assert await picture(database, chats) == expected and await picture(new, chats) == expected
    for store in (database, new):
        assert await store.image(IMAGE) == png()
        assert [line.id for line in await store.conversations("QUESTION k1")] == [chats[0]]
        undone = await store.undo(token)
        assert [m.text for m in undone.messages[-2:]] == ["École of\nletters", "a receipt"]
        again = await store.add_message(chats[0], "x", client_id="ünique", generation="g")
        assert not again.fresh, "what was done stays done"
        more = await store.add_message(chats[0], "École", client_id="more", generation="g2")
        assert more.fresh and more.snapshot.messages[-2].text == "École"
        assert (await store.conversations())[1].id == chats[0], "and the list goes on counting"
    for store in (old, database, new):
        await store.close()


async def test_nothing_is_merged_and_nobody_is_in_the_way(
    postgres: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, _ = await filled(tmp_path / "old")
    url = postgres.database()
    server = open_place(url, tmp_path / "server")
    await server.open()
    assert await asyncio.to_thread(copy, tmp_path / "old", url) == 1
    assert "Stop them first" in capsys.readouterr().err
    await server.create("taken")
    await server.close()
    assert await asyncio.to_thread(copy, tmp_path / "old", url) == 1
    assert "holds 1 chats already" in capsys.readouterr().err
    sqlite = await opened(tmp_path / "old")
    assert await asyncio.to_thread(copy, tmp_path / "old", postgres.database()) == 1
    assert "Another server" in capsys.readouterr().err
    await sqlite.close()
    assert await asyncio.to_thread(copy, tmp_path / "nothing", url) == 1
    assert "no chats.sqlite" in capsys.readouterr().err and not (tmp_path / "nothing").exists()
    assert await asyncio.to_thread(copy, tmp_path / "old", "mysql://a:b@c/d") == 1
    assert "not supported" in capsys.readouterr().err
    assert chats


async def test_all_of_it_or_nothing(postgres: Postgres, tmp_path: Path) -> None:
    chats, _ = await filled(tmp_path / "old")
    url = postgres.database()
    source, target = await opened(tmp_path / "old"), await opened(url)
    name = url.rpartition("/")[2].partition("?")[0]
    function = "CREATE FUNCTION switchyard.meddle() RETURNS trigger LANGUAGE plpgsql AS "
    postgres.sql(name, f"{function} $$ BEGIN NEW.text = 'other'; RETURN NEW; END $$")
    trigger = "CREATE TRIGGER meddle BEFORE INSERT ON switchyard.nodes FOR EACH ROW EXECUTE FUNCTION switchyard.meddle()"
    postgres.sql(name, trigger)
    with pytest.raises(StoreCorrupt, match="differs"):
        await asyncio.to_thread(copying.copy, source, target)
    assert await target.conversations() == []
    postgres.sql(name, "CREATE OR REPLACE FUNCTION switchyard.meddle() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'full' USING ERRCODE = '53100'; END $$")  # fmt: skip
    with pytest.raises(StorageError, match="full"):
        await asyncio.to_thread(copying.copy, source, target)
    assert await target.conversations() == []
    postgres.sql(name, "DROP TRIGGER meddle ON switchyard.nodes")
    assert (await asyncio.to_thread(copying.copy, source, target))["conversations"] == 3
    assert await picture(target, chats) == await picture(source, chats)
    with pytest.raises(StorageError, match="holds 3"):
        await asyncio.to_thread(copying.copy, target, source)
    other = await opened(url)
    with pytest.raises(StoreLocked):
        await asyncio.to_thread(copying.copy, target, source)
    for store in (source, target, other):
        await store.close()
