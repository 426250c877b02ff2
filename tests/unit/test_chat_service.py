"""Turns: saved before they are generated, followed by anyone, stopped, continued, and kept when things fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from modules.chat.attachments import Attachments
from modules.chat.service import ChatService
from modules.chat.store_sqlite import SqliteChatStore
from modules.chat.templates import TemplateRenderer
from modules.errors import Conflict, EngineDead, NotFound, StorageFull
from modules.events import EventBus
from modules.generation import Runs
from modules.model_manager import ModelManager
from modules.settings import Settings
from tests.pictures import BLUE, RED, encoded, png

from .fake_engine import SPEC, Environment, FakeHost, FakeLibrary, settle, until

if TYPE_CHECKING:
    from modules.chat.store import ChatStore
    from modules.residents import Resident

WHOLE = "a0 a1 a2 "
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@dataclass
class Parts:
    store: ChatStore
    runs: Runs
    settings: Settings
    templates: TemplateRenderer
    events: EventBus
    attachments: Attachments
    template: str | None = TEMPLATE

    def chat_template(self, resident: Resident) -> str | None:
        return self.template


class Slow(asyncio.Event):
    """A gate that opens for one token a millisecond."""

    async def wait(self) -> Literal[True]:
        await asyncio.sleep(0.001)
        return await super().wait()


class Rig:
    def __init__(self, folder: Path, templates: TemplateRenderer, store: ChatStore | None = None) -> None:
        self.host = FakeHost()
        self.host.context = 0
        self.host.gate = Slow()
        self.host.gate.set()
        self.events = EventBus()
        self.manager = ModelManager(
            FakeLibrary("a"), {"fake": SPEC}, Environment(), self.events, self.host.start, available=lambda: 1 << 40
        )
        self.runs = Runs(self.manager)
        self.store: Any = store or SqliteChatStore(folder)
        self.parts = Parts(
            self.store, self.runs, Settings(folder / "settings.yaml"), templates, self.events, Attachments(self.store)
        )
        self.chat = ChatService(self.parts, checkpoint_s=0.05)
        self.number = 0

    @property
    def client_id(self) -> str:
        self.number += 1
        return f"c{self.number}"

    async def open(self, load: bool = True) -> None:
        await self.store.open()
        await self.chat.start()
        if load:
            await self.manager.load("a")

    async def close(self) -> None:
        self.host.gate.set()
        await self.runs.close()
        await self.chat.close()
        await self.manager.close()
        await self.store.close()

    async def send(self, conversation: str, text: str, **more: Any) -> dict[str, Any]:
        return await self.chat.send(conversation, text, client_id=self.client_id, **more)

    async def over(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        """The conversation once its last answer has been saved."""
        run = snapshot["messages"][-1]["run"]
        await self.chat.final_node(self.chat.writing(run))
        return await self.chat.snapshot(snapshot["id"])

    async def asked(self, text: str = "q") -> dict[str, Any]:
        chat = await self.chat.create()
        return await self.over(await self.send(chat["id"], text))

    def prompts(self) -> list[str]:
        return [run.request.prompt or "" for run in self.runs._runs.values() if run.request]


@pytest.fixture
async def templates() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    await renderer.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    renderer = TemplateRenderer()
    rig = Rig(tmp_path, renderer)
    await rig.open()
    yield rig
    await rig.close()
    await renderer.close()


async def test_send_saves_streams_and_finishes(rig: Rig) -> None:
    chat = await rig.chat.create("", "Be brief.")
    rig.host.gate.clear()
    sent = await rig.send(chat["id"], "Hello there")
    question, answer = sent["messages"]
    assert sent["title"] == "Hello there" and question["status"] == "complete"
    assert (answer["status"], answer["text"], answer["offset"]) == ("generating", "", 0) and answer["run"]
    assert (await rig.store.snapshot(chat["id"])).messages[1].status == "generating", "on disk before anything came"
    rig.host.gate.set()
    done = (await rig.over(sent))["messages"][-1]
    assert (done["text"], done["status"], done["model"], done["loader"], done["run"]) == (WHOLE, "complete", "a", "fake", None)
    assert done["receipt"]["finish_reason"] == "stop" and done["error"] is None and done["offset"] == len(WHOLE)
    assert rig.prompts() == ["<system>Be brief.<user>Hello there<assistant>"]
    await rig.over(await rig.send(chat["id"], "More"))
    assert rig.prompts()[-1] == f"<system>Be brief.<user>Hello there<assistant>{WHOLE}<user>More<assistant>"


async def test_the_new_chats_system_prompt_is_the_settings(rig: Rig) -> None:
    rig.parts.settings.update({"system_prompt": "From the settings."})
    assert (await rig.chat.create())["system_prompt"] == "From the settings."
    assert (await rig.chat.create("", ""))["system_prompt"] == ""


async def test_a_look_in_between_shows_the_text_so_far(rig: Rig) -> None:
    rig.host.tokens = 1000
    chat = await rig.chat.create()
    sent = await rig.send(chat["id"], "q")
    run = rig.chat.writing(sent["messages"][-1]["run"]).run
    await until(lambda: run.length > 10)
    rig.host.gate.clear()
    await settle()
    seen = (await rig.chat.snapshot(chat["id"]))["messages"][-1]
    assert seen["text"] == run.text and seen["offset"] == run.length and seen["status"] == "generating"
    stored = (await rig.store.snapshot(chat["id"])).messages[-1]
    while stored.text != run.text:  # the checkpoint
        await asyncio.sleep(0.01)
        stored = (await rig.store.snapshot(chat["id"])).messages[-1]
    assert stored.status == "generating"
    assert (await rig.chat.export(chat["id"])).nodes[-1].text == run.text


async def test_stop_keeps_the_text_as_interrupted(rig: Rig) -> None:
    rig.host.tokens = 100_000
    chat = await rig.chat.create()
    sent = await rig.send(chat["id"], "q")
    run_id = sent["messages"][-1]["run"]
    run = rig.chat.writing(run_id).run
    await until(lambda: run.length > 10)
    rig.chat.stop(run_id)
    done = (await rig.over(sent))["messages"][-1]
    assert done["status"] == "interrupted" and done["text"] == run.text and done["error"] is None
    assert done["receipt"]["finish_reason"] == "cancelled"
    with pytest.raises(NotFound):
        rig.chat.stop("run-unknown")


async def test_a_crash_keeps_the_text_and_shows_the_card(rig: Rig) -> None:
    rig.host.tokens = 100_000
    chat = await rig.chat.create()
    sent = await rig.send(chat["id"], "q")
    run = rig.chat.writing(sent["messages"][-1]["run"]).run
    await until(lambda: run.length > 10)
    rig.host.clients[0].dead = EngineDead("The worker died.", hint="Reload.", detail={"signal": "SIGKILL"})
    done = (await rig.over(sent))["messages"][-1]
    assert done["status"] == "failed" and done["text"] == run.text != ""
    assert done["error"]["code"] == "worker_crashed" and done["error"]["detail"]["signal"] == "SIGKILL"


async def test_without_a_model_the_message_is_kept_and_answered_later(tmp_path: Path, templates: TemplateRenderer) -> None:
    rig = Rig(tmp_path, templates)
    await rig.open(load=False)
    chat = await rig.chat.create()
    done = await rig.over(await rig.send(chat["id"], "q"))
    assert [m["text"] for m in done["messages"]] == ["q", ""]
    assert done["messages"][1]["status"] == "failed" and done["messages"][1]["error"]["code"] == "no_model_loaded"
    assert done["messages"][1]["error"]["hint"]
    await rig.manager.load("a")
    again = await rig.over(await rig.chat.regenerate(done["messages"][1]["id"], client_id="r1"))
    assert again["messages"][-1]["text"] == WHOLE and len(again["messages"][-1]["siblings"]) == 2
    assert rig.prompts() == ["<user>q<assistant>"]
    await rig.close()


async def test_a_message_after_a_failed_answer_joins_the_questions(tmp_path: Path, templates: TemplateRenderer) -> None:
    rig = Rig(tmp_path, templates)
    await rig.open(load=False)
    chat = await rig.chat.create()
    await rig.over(await rig.send(chat["id"], "q1"))
    await rig.manager.load("a")
    await rig.over(await rig.send(chat["id"], "q2"))
    assert rig.prompts() == ["<user>q1\n\nq2<assistant>"]
    await rig.close()


async def test_a_run_waits_while_the_model_loads(tmp_path: Path, templates: TemplateRenderer) -> None:
    rig = Rig(tmp_path, templates)
    await rig.open(load=False)
    rig.host.load_gate.clear()
    loading = asyncio.create_task(rig.manager.load("a"))
    await settle()
    chat = await rig.chat.create()
    sent = await rig.send(chat["id"], "q")
    await settle()
    assert rig.chat.writing(sent["messages"][-1]["run"]).run.state == "queued"
    rig.host.load_gate.set()
    await loading
    assert (await rig.over(sent))["messages"][-1]["text"] == WHOLE
    await rig.close()


async def test_regenerate_and_edit(rig: Rig) -> None:
    first = await rig.asked("q1")
    again = await rig.over(await rig.chat.regenerate(first["messages"][1]["id"], client_id="r"))
    assert again["messages"][1]["siblings"][0] == first["messages"][1]["id"]
    edited = await rig.over(await rig.chat.edit(first["messages"][0]["id"], "q2", client_id="e1", generate=True))
    assert [m["text"] for m in edited["messages"]] == ["q2", WHOLE]
    assert rig.prompts()[-1] == "<user>q2<assistant>"
    own = await rig.chat.edit(edited["messages"][1]["id"], "my own", client_id="e2", generate=False)
    assert (own["messages"][1]["text"], own["messages"][1]["status"], own["messages"][1]["run"]) == ("my own", "complete", None)


async def test_continue_goes_on_where_the_text_ends(rig: Rig) -> None:
    done = await rig.asked()
    node = done["messages"][1]["id"]
    rig.host.gate.clear()
    going = await rig.chat.continue_(node, client_id="k")
    assert (going["messages"][1]["text"], going["messages"][1]["offset"]) == (WHOLE, len(WHOLE))
    rig.host.gate.set()
    done = await rig.over(going)
    assert done["messages"][1]["text"] == WHOLE * 2 and done["messages"][1]["id"] == node
    assert rig.prompts()[-1] == f"<user>q<assistant>{WHOLE}"
    edited = await rig.over(await rig.chat.edit(node, "It was", client_id="e", generate=True))
    assert edited["messages"][1]["text"] == f"It was{WHOLE}"
    assert rig.prompts()[-1] == "<user>q<assistant>It was"


async def test_clicks_in_a_row_act_once(rig: Rig) -> None:
    rig.host.gate.clear()
    chat = await rig.chat.create()
    sent = await asyncio.gather(*(rig.chat.send(chat["id"], "q", client_id="same") for _ in range(50)))
    assert len({s["messages"][-1]["id"] for s in sent}) == 1 and len(rig.runs.running()) == 1
    with pytest.raises(Conflict):
        await rig.send(chat["id"], "too early")
    rig.host.gate.set()
    done = await rig.over(sent[0])
    node = done["messages"][1]["id"]
    rig.host.gate.clear()
    await asyncio.gather(*(rig.chat.regenerate(node, client_id=f"r{n}") for n in range(10)))
    assert len(rig.runs.running()) == 1
    tokens = await asyncio.gather(*(rig.chat.delete(node) for _ in range(10)))
    assert len({token for _, token in tokens}) == 1


async def test_a_conflict_carries_the_current_conversation(rig: Rig) -> None:
    seen = await rig.asked("q1")
    await rig.over(await rig.send(seen["id"], "other tab"))
    with pytest.raises(Conflict) as caught:
        await rig.send(seen["id"], "mine", parent=seen["leaf"], revision=seen["revision"])
    assert caught.value.detail["id"] == seen["id"] and len(caught.value.detail["messages"]) == 4
    kept = await rig.send(seen["id"], "mine", parent=seen["leaf"], revision=seen["revision"], branch=True)
    assert [m["text"] for m in kept["messages"]] == ["q1", WHOLE, "mine", ""]


async def test_deleting_or_trashing_stops_the_answer_first(rig: Rig) -> None:
    rig.host.tokens = 100_000
    chat = await rig.chat.create()
    sent = await rig.send(chat["id"], "q")
    after, token = await rig.chat.delete(sent["messages"][0]["id"])
    assert after["messages"] == [] and rig.runs.running() == []
    back = await rig.chat.undo(token)
    assert back["messages"][1]["status"] == "interrupted"
    await rig.chat.regenerate(back["messages"][1]["id"], client_id="r")
    trashed = await rig.chat.update(chat["id"], {"trashed": True})
    assert trashed["trashed"] and rig.runs.running() == []
    assert trashed["messages"][-1]["status"] == "interrupted"
    await rig.chat.purge(chat["id"])


async def test_events_keep_two_tabs_alike(rig: Rig) -> None:
    with rig.events.subscribe() as events:
        done = await rig.asked()
        await rig.chat.update(done["id"], {"title": "Renamed"})
    kinds = [event async for event in events]
    assert [e.data for e in kinds if e.kind == "conversation"][-1]["id"] == done["id"]
    assert any(e.kind == "conversations" for e in kinds)


async def test_a_full_disk_refuses_the_message_but_not_the_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.host.tokens = 100_000
    chat = await rig.chat.create()
    sent = await rig.send(chat["id"], "q")
    run = rig.chat.writing(sent["messages"][-1]["run"]).run
    real = rig.store._write

    async def full(action: Any) -> Any:
        raise StorageFull("The disk is full.", hint="Free some space.")

    with rig.events.subscribe() as events:
        monkeypatch.setattr(rig.store, "_write", full)
        await until(lambda: rig.chat._storage_fails)
        with pytest.raises(StorageFull):
            await rig.chat.create()
        before = run.length
        await until(lambda: run.length > before)
        rig.chat.stop(run.id)
        node = await rig.chat.final_node(rig.chat.writing(run.id))
        assert node["unsaved"] and node["text"] == run.text and node["status"] == "interrupted"
        assert (await rig.chat.export(chat["id"])).nodes[-1].text == run.text, "it can be downloaded"
        monkeypatch.setattr(rig.store, "_write", real)
        await until(lambda: not rig.chat._writing)
    assert (await rig.store.snapshot(chat["id"])).messages[-1].text == run.text
    notices = [event.data async for event in events if event.kind == "notice"]
    assert [notice["level"] for notice in notices] == ["error", "info"], "said once, and when it is over"
    assert [notice.level for notice in rig.chat.notices()] == ["error", "info"]


async def test_a_read_only_disk_is_said_and_chats_go_on_in_memory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rig.store._save_again
    monkeypatch.setattr(rig.store, "_save_again", lambda: False)
    assert rig.store._connection is not None
    rig.store._connection.execute("PRAGMA query_only = ON")
    with rig.events.subscribe() as events:
        done = await rig.asked("still here")
        assert "can't be written" in done["unsaved"] and done["messages"][1]["text"] == WHOLE
        monkeypatch.setattr(rig.store, "_save_again", real)
        await until(lambda: not rig.chat._storage_fails)
    assert (await rig.chat.snapshot(done["id"]))["unsaved"] is None
    assert [event.data["level"] async for event in events if event.kind == "notice"] == ["error", "info"]


async def test_the_end_of_the_server_keeps_what_came(tmp_path: Path, templates: TemplateRenderer) -> None:
    rig = Rig(tmp_path, templates)
    await rig.open()
    rig.host.tokens = 100_000
    chat = await rig.chat.create()
    sent = await rig.send(chat["id"], "q")
    run = rig.chat.writing(sent["messages"][-1]["run"]).run
    await until(lambda: run.length > 10)
    await rig.close()
    store = SqliteChatStore(tmp_path)
    await store.open()
    last = (await store.snapshot(chat["id"])).messages[-1]
    assert last.status == "interrupted" and last.text == run.text
    assert store.backups.newest_first(), "made at the start"
    await store.close()


async def test_an_answer_that_cannot_be_started_is_not_left_open(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = await rig.chat.create()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr(rig.runs, "start", broken)
    with pytest.raises(RuntimeError):
        await rig.send(chat["id"], "q")
    assert [m["status"] for m in (await rig.chat.snapshot(chat["id"]))["messages"]] == ["complete", "interrupted"]


async def test_a_browser_that_leaves_at_once_leaves_no_dead_answer(rig: Rig) -> None:
    chat = await rig.chat.create()
    sending = asyncio.create_task(rig.chat.send(chat["id"], "q", client_id="x"))
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending

    async def answered() -> bool:
        messages = (await rig.chat.snapshot(chat["id"]))["messages"]
        return bool(messages) and messages[-1]["status"] == "complete"

    for _ in range(200):
        if await answered():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the answer was never written")


async def test_uploads_whose_message_never_came_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.chat.service.TIDY_EVERY_S", 0.01)
    renderer = TemplateRenderer()
    rig = Rig(tmp_path, renderer)
    await rig.open()
    kept, lost = [await rig.parts.attachments.save(encoded(png(color))) for color in (RED, BLUE)]
    await rig.asked(f"![a](cid:{kept})")
    monkeypatch.setattr("modules.chat.store_images.KEEP_S", -1.0)
    while await rig.store.image(lost) is not None:
        await asyncio.sleep(0.01)
    assert await rig.store.image(kept) == png(RED)
    await rig.close()
    await renderer.close()
