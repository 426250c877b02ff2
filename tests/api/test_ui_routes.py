"""The page's API over a real server and a real worker: turns, streams, two tabs, restarts, bad bodies."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.pictures import RED, encoded, png

if TYPE_CHECKING:
    from pathlib import Path

    from tests.api.conftest import Server

_numbers = itertools.count()


def client_id() -> str:
    return f"client-{next(_numbers)}"


@dataclass
class Event:
    kind: str
    data: Any
    id: int | None


def events(lines: Iterator[str]) -> Iterator[Event]:
    kind, data, number = "message", "", None
    for line in lines:
        name, _, value = line.partition(": ")
        if not line:
            if data:
                yield Event(kind, json.loads(data), number)
            kind, data = "message", ""
        elif name == "event":
            kind = value
        elif name == "data":
            data = value
        elif name == "id":
            number = int(value)


class Page:
    """A browser tab's view of the API."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = server.http

    def call(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        response = self.http.request(method, f"/ui-api/{path}", json=body)
        assert response.status_code == status, response.text
        return response.json()

    def new(self, **fields: Any) -> dict[str, Any]:
        return self.call("POST", "conversations", fields)  # type: ignore[no-any-return]

    def send(self, chat: dict[str, Any], text: str, status: int = 200, **fields: Any) -> dict[str, Any]:
        body = {"text": text, "client_id": client_id(), **fields}
        return self.call("POST", f"conversations/{chat['id']}/messages", body, status)  # type: ignore[no-any-return]

    def act(self, node: dict[str, Any], action: str, status: int = 200, **fields: Any) -> dict[str, Any]:
        return self.call("POST", f"messages/{node['id']}/{action}", {"client_id": client_id(), **fields}, status)  # type: ignore[no-any-return]

    def chat(self, chat: dict[str, Any]) -> dict[str, Any]:
        return self.call("GET", f"conversations/{chat['id']}")  # type: ignore[no-any-return]

    def stream(self, run: str, **options: Any) -> Iterator[Event]:
        with self.http.stream("GET", f"/ui-api/runs/{run}/stream", **options) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            yield from events(response.iter_lines())

    def follow(self, snapshot: dict[str, Any], **options: Any) -> tuple[str, dict[str, Any]]:
        """(text, final node) of the last answer's run."""
        text, final = "", None
        for event in self.stream(snapshot["messages"][-1]["run"], **options):
            if event.kind == "message":
                text += event.data
            elif event.kind in ("done", "failed"):
                final = event.data
        assert final is not None
        return text, final

    def ask(self, chat: dict[str, Any], text: str, **fields: Any) -> dict[str, Any]:
        self.follow(self.send(chat, text, **fields))
        return self.chat(chat)


@pytest.fixture
def page(server: Server) -> Page:
    return Page(server)


def texts(snapshot: dict[str, Any]) -> list[str]:
    return [node["text"] for node in snapshot["messages"]]


# --- turns


def test_a_turn(page: Page) -> None:
    chat = page.new(system_prompt="Be kind.")
    assert chat["messages"] == [] and chat["system_prompt"] == "Be kind."
    sent = page.send(chat, "hello there")
    assert sent["title"] == "hello there"
    question, answer = sent["messages"]
    assert (question["role"], answer["role"], answer["status"]) == ("user", "assistant", "generating")
    text, final = page.follow(sent)
    assert text == "hello there" == final["text"]
    assert final["status"] == "complete" and final["model"] == "echo" and final["loader"] == "echo" and final["run"] is None
    receipt = final["receipt"]
    assert receipt["finish_reason"] == "stop" and receipt["usage"]["completion_tokens"] > 0 and receipt["ttft_ms"] > 0
    assert page.chat(chat)["messages"][1] == final
    again, same = page.follow(sent)
    assert (again, same) == (text, final), "a late viewer gets all of it"


def test_the_stream_resumes_at_any_offset(page: Page) -> None:
    sent = page.send(page.new(), "naïve 👩‍👩‍👧 漢字 " * 20)
    run = sent["messages"][-1]["run"]
    whole, final = page.follow(sent)
    assert final["offset"] == len(whole)
    for start in (0, 1, 7, 50, len(whole) - 1, len(whole), len(whole) + 99):
        for options in ({"params": {"start": start}}, {"headers": {"Last-Event-ID": str(start)}}):
            assert page.follow(sent, **options)[0] == whole[start:], start
    assert page.follow(sent, headers={"Last-Event-ID": "nonsense"})[0] == whole
    ids = [event.id for event in page.stream(run) if event.kind == "message"]
    assert ids[-1] == len(whole)


def test_a_viewer_cut_many_times_gets_the_same_text(page: Page) -> None:
    sent = page.send(page.new(), "[[echo tokens=200 rate=400]]")
    run = sent["messages"][-1]["run"]
    text, position, cuts = "", 0, 0
    while True:
        done = False
        for event in page.stream(run, headers={"Last-Event-ID": str(position)}):
            if event.kind == "message":
                text, position = text + event.data, event.id or 0
                cuts += 1
                if cuts % 2:
                    break
            done = done or event.kind == "done"
        if done:
            break
    assert cuts > 3 and position == len(text)
    assert page.chat(sent)["messages"][1]["text"] == text


def test_two_viewers_see_the_same(page: Page) -> None:
    sent = page.send(page.new(), "[[echo tokens=100 rate=300]]")
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(page.follow(sent)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4 and len(set(seen)) == 1 and seen[0]


def test_prefill_and_states_are_told(page: Page) -> None:
    sent = page.send(page.new(), "[[echo tokens=3 prefill=40 delay=0.2]] hello")
    statuses = [event.data for event in page.stream(sent["messages"][-1]["run"]) if event.kind == "status"]
    assert [status["state"] for status in statuses][-1] == "done"
    assert any(status["prefill"] and status["prefill"]["total"] for status in statuses)


def test_stop_keeps_the_text(page: Page) -> None:
    sent = page.send(page.new(), "[[echo tokens=5000 rate=200]]")
    run = sent["messages"][-1]["run"]
    for event in page.stream(run):
        if event.kind == "message":
            break
    page.call("POST", f"runs/{run}/stop", {})
    text, final = page.follow(sent)
    assert final["status"] == "interrupted" and final["text"] == text != ""
    assert final["receipt"]["finish_reason"] == "cancelled"
    page.call("POST", f"runs/{run}/stop", {})
    page.call("POST", "runs/run-nope/stop", {}, status=404)
    page.call("GET", "runs/run-nope/stream", status=404)


def test_regenerate_continue_edit_delete_undo(page: Page) -> None:
    chat = page.ask(page.new(), "one two")
    question, answer = chat["messages"]
    page.follow(page.act(answer, "regenerate"))
    chat = page.chat(chat)
    assert len(chat["messages"][1]["siblings"]) == 2
    assert page.call("PATCH", f"conversations/{chat['id']}", {"leaf": answer["id"]})["leaf"] == answer["id"]
    going = page.act(answer, "continue")
    before = going["messages"][1]["offset"]
    whole, final = page.follow(going)
    assert whole.startswith("one two") and final["id"] == answer["id"] and len(final["text"]) > before
    assert page.follow(going, params={"start": before})[0] == final["text"][before:]
    edited = page.act(question, "edit", text="three", generate=True)
    assert page.follow(edited)[0] == "three"
    own = page.act(page.chat(chat)["messages"][1], "edit", text="my words", generate=False)
    assert texts(own) == ["three", "my words"]
    gone = page.call("DELETE", f"messages/{own['messages'][0]['id']}")
    assert "my words" not in texts(gone["snapshot"])
    assert texts(page.call("POST", f"undo/{gone['undo']}")) == ["three", "my words"]
    page.call("POST", "undo/nope", status=404)


def test_the_model_sees_the_system_prompt_and_the_history(page: Page) -> None:
    chat = page.new(system_prompt="SYSTEM")
    page.ask(chat, "first")
    done = page.ask(chat, "second")
    usage = [node["receipt"]["usage"]["prompt_tokens"] for node in done["messages"] if node["receipt"]]
    assert usage[1] > usage[0]


def test_a_crash_is_a_card_and_the_next_answer_works(page: Page) -> None:
    chat = page.new()
    text, final = page.follow(page.send(chat, "[[echo tokens=100 crash_at=20]]"))
    assert final["status"] == "failed" and final["text"] == text != ""
    assert final["error"]["code"] == "worker_crashed" and final["error"]["hint"]
    page.follow(page.act(page.chat(chat)["messages"][0], "edit", text="fine now", generate=True))
    assert texts(page.chat(chat)) == ["fine now", "fine now"]


def test_too_long_a_message_is_refused_by_the_card_and_old_turns_are_left_out(page: Page) -> None:
    chat = page.new()
    _, final = page.follow(page.send(chat, "word " * 9000))
    assert final["status"] == "failed" and final["error"]["code"] == "context_length_exceeded"
    chat = page.new()
    for number in range(7):
        page.ask(chat, f"{number} " + "word " * 700)
    done = page.ask(chat, "the last one")
    warnings = [w for node in done["messages"] if node["receipt"] for w in node["receipt"]["warnings"]]
    assert any("left out" in warning for warning in warnings), warnings
    assert done["messages"][-1]["text"] == "the last one"


# --- conversations


def test_list_search_rename_pin_trash_purge(page: Page) -> None:
    chat = page.ask(page.new(), "the quixotic zebra")
    path = f"conversations/{chat['id']}"
    page.call("PATCH", path, {"title": "  Zebras\n& more ", "pinned": True})
    found = page.call("GET", "conversations?query=quixotic zebra")["conversations"]
    assert [line["title"] for line in found] == ["Zebras & more"] and found[0]["pinned"]
    page.call("DELETE", path, status=409)
    page.call("PATCH", path, {"trashed": True})
    assert page.call("GET", "conversations?query=quixotic")["conversations"] == []
    assert len(page.call("GET", "conversations?query=quixotic&trashed=true")["conversations"]) == 1
    page.send(chat, "no", status=409)
    page.call("DELETE", path)
    page.call("GET", path, status=404)


def test_two_tabs(page: Page) -> None:
    seen = page.ask(page.new(), "hi")
    page.ask(seen, "from the other tab")
    error = page.send(seen, "mine", status=409, parent=seen["leaf"], revision=seen["revision"])["error"]  # type: ignore[index]
    assert error["code"] == "conflict" and texts(error["detail"])[2] == "from the other tab"
    kept = page.send(seen, "mine", parent=seen["leaf"], revision=seen["revision"], branch=True)
    assert texts(kept)[:3] == ["hi", "hi", "mine"] and len(kept["messages"][2]["siblings"]) == 2
    page.follow(kept)


def test_fifty_times_enter_is_one_message(page: Page) -> None:
    chat = page.new()
    body = {"text": "[[echo tokens=20 rate=100]]", "client_id": client_id()}
    sent = [page.call("POST", f"conversations/{chat['id']}/messages", body) for _ in range(50)]
    assert len({s["messages"][-1]["id"] for s in sent}) == 1
    page.follow(sent[0])
    assert len(page.chat(chat)["messages"]) == 2


def test_export_and_import(page: Page) -> None:
    chat = page.ask(page.new(title='Trip: "Zürich" / <b>'), "hello")
    page.follow(page.act(chat["messages"][1], "regenerate"))
    response = page.http.get(f"/ui-api/conversations/{chat['id']}/export")
    assert response.headers["content-disposition"].startswith('attachment; filename="')
    data = response.json()
    assert data["format"] == "switchyard-conversation" and len(data["nodes"]) == 3
    back = page.call("POST", "conversations/import", data)
    assert back["report"] == [] and back["id"] != chat["id"] and back["title"] == chat["title"]
    assert texts(back) == texts(page.chat(chat)) and len(back["messages"][1]["siblings"]) == 2
    history = {
        "internal": [["<|BEGIN-VISIBLE-CHAT|>", "Hi, I am here."], ["q & a", "second"]],
        "visible": [["", "Hi"], ["q &amp; a", "second"]],
        "metadata": {
            "user_1": {"timestamp": "Nov 21, 2025 21:44", "attachments": [{"name": "x"}]},
            "assistant_1": {"versions": [{"content": "first"}, {"content": "second"}], "current_version_index": 1},
        },
    }
    back = page.call("POST", "conversations/import", history)
    assert texts(back) == ["Hi, I am here.", "q & a", "second"] and back["title"] == "q & a"
    assert len(back["messages"][2]["siblings"]) == 2 and any("attachments" in line for line in back["report"])
    for bad in ({}, {"format": "switchyard-conversation", "version": 99}, {"internal": 3}):
        page.call("POST", "conversations/import", bad, status=400)


def test_images_go_with_their_chat(page: Page) -> None:
    red = page.call("POST", "attachments", {"image": encoded(png(RED))})["name"]
    chat = page.ask(page.new(title="Red"), f"look ![red](cid:{red})")
    data = page.http.get(f"/ui-api/conversations/{chat['id']}/export").json()
    assert data["attachments"] == {red: encoded(png(RED))}
    archive = page.http.get(f"/ui-api/conversations/{chat['id']}/export?format=markdown")
    assert archive.headers["content-type"] == "application/zip" and archive.content[:2] == b"PK"
    assert archive.headers["content-disposition"].startswith('attachment; filename="Red.zip"')
    assert page.http.get(f"/ui-api/conversations/{chat['id']}/export?format=exe").status_code == 400
    page.call("PATCH", f"conversations/{chat['id']}", {"trashed": True})
    assert page.http.get(f"/ui-api/attachments/{red}").status_code == 200
    page.call("DELETE", f"conversations/{chat['id']}")
    assert page.http.get(f"/ui-api/attachments/{red}").status_code == 404
    back = page.call("POST", "conversations/import", data)
    answer = page.http.get(f"/ui-api/attachments/{red}")
    assert answer.content == png(RED) and answer.headers["content-type"] == "image/png" and back["report"] == []


# --- events


@contextlib.contextmanager
def listening(server: Server) -> Iterator[Callable[[Callable[[Event], bool]], Event]]:
    """Opens /ui-api/events; gives a function that waits for an event."""
    seen: list[Event] = []
    opened = threading.Event()
    with httpx.Client(base_url=server.url, timeout=None) as http:

        def read() -> None:
            with contextlib.suppress(httpx.HTTPError, OSError), http.stream("GET", "/ui-api/events") as response:
                opened.set()
                for event in events(response.iter_lines()):
                    seen.append(event)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        assert opened.wait(10)

        def wait(condition: Callable[[Event], bool]) -> Event:
            due = time.monotonic() + 20
            while time.monotonic() < due:
                for event in list(seen):
                    if condition(event):
                        return event
                time.sleep(0.01)
            raise AssertionError(f"no such event among {[event.kind for event in seen]}")

        yield wait


def test_every_tab_hears_of_changes(page: Page, server: Server) -> None:
    with listening(server) as wait:
        chat = page.ask(page.new(), "hi")
        wait(lambda e: e.kind == "conversation" and e.data == {"id": chat["id"], "revision": chat["revision"]})
        wait(lambda e: e.kind == "conversation" and e.data == {"id": chat["id"], "revision": None})
        wait(lambda e: e.kind == "conversations")
        page.call("PUT", "settings", {"show_receipts": False})
        wait(lambda e: e.kind == "settings")
        page.call("PUT", "settings", {"show_receipts": None})
        page.call("PUT", "presets/Test events", {"sampling": {"top_k": 3}})
        wait(lambda e: e.kind == "presets")
        page.call("DELETE", "presets/Test events")


# --- models, settings, presets


def test_models(page: Page) -> None:
    data = page.call("GET", "models")
    assert data["state"] == "ready" and data["residents"] and data["memory"]["total"] > 0
    echo = next(model for model in data["models"] if model["id"] == "echo")
    assert echo["loaders"][0]["name"] == "echo" and echo["loaders"][0]["ok"]
    assert all(loader["ok"] or loader["reason"] for model in data["models"] for loader in model["loaders"])
    listed = {loader["name"]: loader for loader in data["loaders"]}
    assert listed["echo"]["ready"] and any(option["name"] == "context_length" for option in listed["echo"]["options"])
    assert all(loader["ready"] or loader["reason"] for loader in listed.values())
    for bad in ({"model": "nope"}, {"model": "../../etc"}):
        page.call("POST", "models/load", bad, status=404)
    for bad in ({}, {"model": 3}, {"model": "echo", "loader": "nope"}, {"model": "echo", "options": {"nope": 1}},
                {"model": "echo", "trust_remote_code": True}, {"model": "echo", "when_busy": "never"}):  # fmt: skip
        page.call("POST", "models/load", bad, status=400)
    page.call("POST", "loaders/nope/install", {}, status=404)
    page.call("POST", "loaders/echo/install", {}, status=400)


def test_load_options_are_remembered_for_that_model(launch: Callable[..., Server]) -> None:
    server = launch(model=None)
    page = Page(server)
    chat = page.new()
    _, final = page.follow(page.send(chat, "is anyone there"))
    assert final["error"]["code"] == "no_model_loaded" and final["error"]["hint"]
    resident = page.call("POST", "models/load", {"model": "echo", "loader": "echo", "options": {"context_length": 4096}})[
        "resident"
    ]
    assert resident["options"]["context_length"] == 4096
    server.until(lambda: page.call("GET", "models")["state"] == "ready", "loaded")
    server.until(lambda: page.call("GET", "models/settings?model=echo")["loader"] == "echo", "saved")
    saved = page.call("GET", "models/settings?model=echo")
    assert saved["options"] == {"echo": {"context_length": 4096}}
    page.follow(page.act(final, "regenerate"))
    assert texts(page.chat(chat)) == ["is anyone there", "is anyone there"]
    freed = page.call("POST", "models/unload", {})
    assert freed["memory_before"] > 0 and "memory_after" in freed
    assert page.call("GET", "models")["state"] == "empty"


def test_settings_and_presets(page: Page) -> None:
    before = page.call("GET", "settings")
    assert before["unsaved"] is None and before["sampling"]["temperature"] == 0.7
    after = page.call("PUT", "settings", {"max_tokens": 5, "sampling": {"top_k": 7}})
    assert after["max_tokens"] == 5 and after["sampling"]["top_k"] == 7
    chat = page.new()
    _, final = page.follow(page.send(chat, "[[echo tokens=50]]"))
    assert final["receipt"]["usage"]["completion_tokens"] == 5 and final["receipt"]["finish_reason"] == "length"
    assert final["receipt"]["applied"]["top_k"] == 7
    for bad in ({"max_tokens": "5"}, {"nope": 1}, {"sampling": {"temperature": -1}}, {"last_model": None}):
        page.call("PUT", "settings", bad, status=400)
    page.call("PUT", "settings", {"max_tokens": before["max_tokens"], "sampling": {"top_k": None}})
    names = [preset["name"] for preset in page.call("GET", "presets")["presets"]]
    assert "Deterministic" in names
    assert page.call("PUT", "settings", {"preset": "Deterministic"})["sampling"]["temperature"] == 0
    page.call("PUT", "settings", {"preset": None, "sampling": before["sampling"]})
    for name in ("..%2f..%2fx", "%2e%2e", "a%00b", "CON", "x%0ay"):
        for method in ("GET", "PUT", "DELETE"):
            response = page.http.request(method, f"/ui-api/presets/{name}", json={} if method == "PUT" else None)
            assert response.status_code in (400, 404) and response.json()["error"]["message"], (method, name)
    page.call("GET", "presets/Nope", status=404)


def test_parameters_say_what_the_backend_lacks(page: Page) -> None:
    rows = {row["name"]: row for row in page.call("GET", "parameters")["parameters"]}
    assert rows["temperature"]["supported"] and rows["temperature"]["ui"] == [0.0, 5.0, 0.01]
    assert not rows["mirostat_mode"]["supported"] and "Echo" in rows["mirostat_mode"]["reason"]


# --- bad input


BAD_MESSAGES = [
    {}, {"text": "x"}, {"client_id": "c"}, {"text": "", "client_id": "c"}, {"text": "   \n", "client_id": "c"},
    {"text": 3, "client_id": "c"}, {"text": "x", "client_id": 3}, {"text": "x", "client_id": ""},
    {"text": "x", "client_id": "c" * 300}, {"text": "x", "client_id": "c", "revision": "1"},
    {"text": "x", "client_id": "c", "revision": True}, {"text": "x", "client_id": "c", "branch": 1},
    {"text": "x", "client_id": "c", "role": "system"}, {"text": "x", "client_id": "c", "__class__": 1},
    {"text": "x", "client_id": "c", "parent": 5},
]  # fmt: skip


def test_bad_bodies_are_refused_and_change_nothing(page: Page, server: Server) -> None:
    chat = page.ask(page.new(), "hi")
    path = f"/ui-api/conversations/{chat['id']}"
    for body in BAD_MESSAGES:
        response = page.http.post(f"{path}/messages", json=body)
        assert response.status_code == 400 and response.json()["error"]["message"], body
    for raw in (b"", b"[]", b"null", b"{", b'{"text": "\\ud800", "client_id": "c"}', b'{"text": "\xff", "client_id": "c"}'):
        response = page.http.post(f"{path}/messages", content=raw, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, raw
    for changes in ({"title": 3}, {"pinned": "yes"}, {"leaf": 3}, {"revision": 1.5}, {"id": "x"}, {"messages": []}):
        assert page.http.patch(path, json=changes).status_code == 400, changes
    assert page.http.patch(path, json={"leaf": "nope"}).status_code == 404
    assert page.http.patch(path, json={"title": "x", "revision": 0}).status_code == 409
    for missing in ("conversations/nope", "conversations/nope/export"):
        page.call("GET", missing, status=404)
    page.call("POST", "messages/nope/regenerate", {"client_id": "zz"}, status=404)
    assert page.chat(chat) == chat
    server.oracle()


def test_nul_is_taken_out_and_titles_are_one_line(page: Page) -> None:
    chat = page.ask(page.new(title="a\x00b\r\nc\u202e" + "x" * 500), "he\x00llo")
    assert texts(chat) == ["hello", "hello"]
    assert chat["title"].startswith("ab c x") and len(chat["title"]) <= 200


# --- the server goes away


def test_a_restart_in_mid_answer_keeps_what_came(launch: Callable[..., Server], tmp_path: Path) -> None:
    for number, end in enumerate((signal.SIGTERM, signal.SIGKILL)):
        data = tmp_path / f"chats {number}"
        server = launch(data=data).wait_ready()
        page = Page(server)
        page.call("PUT", "settings", {"max_tokens": None})
        sent = page.send(page.new(), "[[echo tokens=100000 rate=500]]")
        for event in page.stream(sent["messages"][-1]["run"]):
            if event.kind == "message" and (event.id or 0) > 1500:
                break
        time.sleep(4)  # two seconds, and a slow disk
        os.kill(server.process.pid, end)
        server.process.wait(20)
        server.stop()
        again = Page(launch(data=data, model=None))
        node = again.chat(sent)["messages"][1]
        assert node["status"] == "interrupted" and node["run"] is None
        assert len(node["text"]) > 1500, "a SIGKILL costs at most the last two seconds"
        assert again.chat(sent)["messages"][0]["status"] == "complete"
        again.server.stop()


def test_a_second_server_on_the_same_data_is_refused(launch: Callable[..., Server], server: Server) -> None:
    with pytest.raises(AssertionError, match="did not start") as caught:
        launch(data=server.data, model=None)
    assert f"process {server.process.pid}" in str(caught.value) and "--user-data-dir" in str(caught.value)
    server.oracle()


def test_what_went_wrong_at_the_start_is_told_to_the_page(launch: Callable[..., Server], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "settings.yaml").write_text("theme: dark\nmax_tokens: many\n", encoding="utf-8")
    (data / "model_settings.yaml").write_text("- a list\n", encoding="utf-8")
    (data / "chats.sqlite").write_bytes(b"rubbish")
    server = launch(data=data, model=None)
    page = Page(server)
    assert page.call("GET", "settings")["theme"] == "dark"
    with listening(server) as wait:
        for words in ("chat database could not be read", "max_tokens", "no map of models", "settings.yaml.bad"):
            wait(lambda event, words=words: event.kind == "notice" and words in event.data["text"])  # type: ignore[misc]
    assert next(data.glob("chats.sqlite.corrupt-*")).read_bytes() == b"rubbish"
    assert page.new()["messages"] == []
