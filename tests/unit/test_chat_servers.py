"""Turns on PostgreSQL: the database goes away in the middle of one, and two servers show the same chats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("sqlalchemy")

from modules.chat import presence
from modules.chat.places import open_place
from modules.chat.templates import TemplateRenderer
from modules.errors import Conflict, StorageUnreachable

from .fake_engine import until
from .test_chat_service import WHOLE, Rig

if TYPE_CHECKING:
    from pathlib import Path

    from modules.events import BusEvent, Subscription
    from tests.postgres_lab import Postgres

LIMIT_S = 60.0


@pytest.fixture
async def rigs(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Rig, Rig]]:
    """Two servers on one database."""
    monkeypatch.setattr(presence, "LOOK_S", 0.05)
    monkeypatch.setattr(presence, "RETRY_S", 0.05)
    url, renderer = postgres.database(), TemplateRenderer()
    pair = tuple(Rig(tmp_path / name, renderer, open_place(url, tmp_path / name)) for name in "ab")
    pair[1].number = 1000  # client ids of its own
    for rig in pair:
        await rig.open()
    yield pair  # type: ignore[misc]
    if postgres._process is None:
        postgres.start()
    for rig in pair:
        await rig.close()
    await renderer.close()


async def heard(events: Subscription, kind: str, chat: str) -> BusEvent:
    async def wait() -> BusEvent:
        async for event in events:
            if event.kind == kind and event.data.get("id") == chat:
                return event
        raise AssertionError("the events ended")

    return await asyncio.wait_for(wait(), LIMIT_S)


async def test_the_database_goes_away_in_mid_turn_and_nothing_is_lost(postgres: Postgres, rigs: tuple[Rig, Rig]) -> None:
    rig, other = rigs
    rig.host.tokens = 100_000
    chat = await rig.chat.create()
    sent = await rig.send(chat["id"], "q")
    run = rig.chat.writing(sent["messages"][-1]["run"]).run
    await until(lambda: run.length > 5)
    with rig.events.subscribe() as events:
        await asyncio.to_thread(postgres.stop)
        await until(lambda: rig.chat._storage_fails)
        with pytest.raises(StorageUnreachable):
            await rig.chat.create()
        before = run.length
        await until(lambda: run.length > before)
        rig.chat.stop(run.id)
        final = await asyncio.wait_for(rig.chat.final_node(rig.chat.writing(run.id)), LIMIT_S)
        assert (final["text"], final["status"], final["unsaved"]) == (run.text, "interrupted", True)
        assert final["siblings"] == sent["messages"][-1]["siblings"]
        await asyncio.to_thread(postgres.start)
        await until(lambda: not rig.chat._writing)
        await until(lambda: not rig.chat._storage_fails)
    notices = [event.data async for event in events if event.kind == "notice"]
    assert [notice["level"] for notice in notices] == ["error", "info"], "said once, and when it is over"
    assert "can't be reached" in notices[0]["text"]
    last = (await other.chat.snapshot(chat["id"]))["messages"][-1]
    assert (last["text"], last["status"]) == (run.text, "interrupted")


async def test_an_answer_can_be_stopped_from_the_other_server(rigs: tuple[Rig, Rig]) -> None:
    one, two = rigs
    one.host.tokens = 100_000
    with two.events.subscribe() as events:
        chat = await one.chat.create()
        node = (await one.send(chat["id"], "q"))["messages"][-1]["id"]
        await two.chat.stop_answer(node)
        while (last := (await two.chat.snapshot(chat["id"]))["messages"][-1])["status"] == "generating":
            await heard(events, "conversation", chat["id"])
    assert last["status"] == "interrupted" and last["receipt"]["finish_reason"] == "cancelled"
    await two.chat.stop_answer(node)  # and once more, by a page that is late: nothing


async def test_the_other_servers_page_shows_what_this_one_writes(rigs: tuple[Rig, Rig]) -> None:
    one, two = rigs
    one.host.gate.clear()  # the answer stands still after its first token
    with two.events.subscribe() as events:
        chat = await one.chat.create()
        sent = await one.send(chat["id"], "q")
        await heard(events, "conversation", chat["id"])
        last = (await two.chat.snapshot(chat["id"]))["messages"][-1]
        assert (last["status"], last["run"]) == ("generating", None)
        assert (await two.chat.conversations())[0]["generating"]
        with pytest.raises(Conflict, match="still being written"):
            await two.send(chat["id"], "too early")
        one.host.gate.set()
        done = await one.over(sent)
        while (last := (await two.chat.snapshot(chat["id"]))["messages"][-1])["status"] == "generating":
            await heard(events, "conversation", chat["id"])
        assert last["text"] == done["messages"][-1]["text"] == WHOLE and last["status"] == "complete"
        on = await two.over(await two.send(chat["id"], "go on here"))
    assert len(on["messages"]) == 4 and (await one.chat.snapshot(chat["id"]))["messages"][-1]["text"] == WHOLE
