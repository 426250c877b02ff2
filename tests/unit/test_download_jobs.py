"""Downloads in the background: several at once, paused, resumed, cancelled, taken up by the next server; the hub's account."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.detect import list_models
from modules.download.account import HubAccount
from modules.download.jobs import SLOTS, Downloads
from modules.errors import Conflict, InvalidParameter, NotFound
from modules.events import EventBus
from tests.unit.hub_server import COMMIT, SMALL_LLAMA, FakeHub

WEIGHTS = SMALL_LLAMA["model.safetensors"]
FILES = {
    **SMALL_LLAMA,
    "pytorch_model.bin": b"\x80\x02pickle",
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(dict(FILES)) as server:
        yield server
        if server.faults.hold is not None:
            server.faults.hold.set()  # its threads must not wait for a test that is over


class Place:
    """A data folder and a model folder; `fresh` is the next server on them."""

    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self.hub, self.models, self.data = hub, folder / "models ü", folder / "data"
        self.servers: list[Downloads] = []
        self.events = EventBus()
        self.jobs = self.fresh()

    def fresh(self) -> Downloads:
        account = HubAccount(self.data, self.hub.url)
        self.jobs = Downloads(account, self.models, self.events, self.data / "downloads.json", backoff_s=0.01)
        self.servers.append(self.jobs)
        return self.jobs

    async def until(self, job_id: str, there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The job's first picture that is so: each change is an event, so nothing is waited for in vain."""
        with self.events.subscribe() as events:
            if there(self.jobs.job(job_id)):
                return self.jobs.job(job_id)
            async for event in events:
                if event.kind == "download" and event.data["id"] == job_id and there(event.data):
                    return event.data
        raise AssertionError("the bus ended")

    async def state(self, job_id: str, *wanted: str) -> dict[str, Any]:
        return await asyncio.wait_for(self.until(job_id, lambda job: job["state"] in wanted), 30)

    async def half(self, job_id: str) -> None:
        """The held file's first half is on disk."""
        part_of = self.models / self.jobs.job(job_id)["folder"]

        async def there() -> None:
            while not any(p.stat().st_size >= len(WEIGHTS) // 2 for p in part_of.glob(".model.safetensors.*.part")):
                await asyncio.sleep(0.01)

        await asyncio.wait_for(there(), 30)


@pytest.fixture
async def place(tmp_path: Path, hub: FakeHub) -> Any:
    made = Place(tmp_path, hub)
    yield made
    for server in made.servers:
        await server.close()


def hold(hub: FakeHub) -> threading.Event:
    hub.faults.hold = threading.Event()
    return hub.faults.hold


async def test_a_download_tells_its_progress_and_what_it_left_out(place: Place) -> None:
    job = await place.jobs.start("owner/name", None)
    assert job["state"] in ("queued", "running")
    done = await place.state(job["id"], "done", "failed")
    assert (done["state"], done["error"], done["problem"], done["model"]) == ("done", None, None, "owner_name")
    assert done["commit"] == COMMIT
    assert done["done_bytes"] == done["total_bytes"] == sum(len(FILES[n]) for n in FILES if not n.endswith(".bin"))
    assert (done["files_done"], done["files_total"], len(done["fetched"])) == (3, 3, 3)
    assert "pickle" in done["skipped"]["pytorch_model.bin"]
    assert [model.id for model in list_models([place.models])] == ["owner_name"]


async def test_a_paused_one_goes_on_where_it_stopped(place: Place, hub: FakeHub) -> None:
    gate = hold(hub)
    job = await place.jobs.start("owner/name", "main")
    await place.half(job["id"])
    assert (await place.jobs.pause(job["id"]))["state"] == "paused"
    assert all(model.problem for model in list_models([place.models]))  # a part is no model
    with pytest.raises(Conflict):
        await place.jobs.pause(job["id"])
    gate.set()
    place.jobs.resume(job["id"])
    done = await place.state(job["id"], "done", "failed")
    assert done["state"] == "done"
    assert (place.models / "owner_name" / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [headers.get("range") for path, headers in hub.file_requests() if "cdn/model.safetensors" in path]
    assert ranges[0] is None and str(ranges[1]).startswith("bytes=")


async def test_the_next_server_takes_up_what_was_cut_off_and_leaves_what_was_paused(place: Place, hub: FakeHub) -> None:
    gate = hold(hub)
    cut = await place.jobs.start("owner/cut", None)
    paused = await place.jobs.start("owner/paused", None)
    await place.half(cut["id"])
    await place.jobs.pause(paused["id"])
    await place.servers[0].close()
    kept = json.loads((place.data / "downloads.json").read_text(encoding="utf-8"))["jobs"]
    assert {job["repository"]: job["state"] for job in kept} == {"owner/cut": "running", "owner/paused": "paused"}
    gate.set()
    place.fresh().start_up()
    done = await place.state(cut["id"], "done", "failed")
    assert done["state"] == "done"
    assert place.jobs.job(paused["id"])["state"] == "paused"
    assert any("range" in headers for path, headers in hub.file_requests() if "cdn/model.safetensors" in path)


async def test_it_keeps_to_its_commit(place: Place, hub: FakeHub) -> None:
    gate = hold(hub)
    job = await place.jobs.start("owner/name", "main")
    await place.half(job["id"])
    await place.jobs.pause(job["id"])
    asked = len(hub.requests)
    gate.set()
    place.jobs.resume(job["id"])
    await place.state(job["id"], "done")
    info = [path for path, _ in hub.requests[asked:] if path.startswith("/api/")]
    assert info and all(f"/revision/{COMMIT}" in path for path in info)


async def test_cancelling_deletes_what_it_brought_and_nothing_else(place: Place, hub: FakeHub) -> None:
    folder = place.models / "owner_name"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    hold(hub)
    job = await place.jobs.start("owner/name", None)
    await place.half(job["id"])
    cancelled = await place.jobs.cancel(job["id"])
    assert cancelled["state"] == "cancelled" and cancelled["fetched"] == []
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    with pytest.raises(Conflict):
        await place.jobs.cancel(job["id"])
    again = await place.jobs.start("owner/name", "other")
    assert (again["id"], again["branch"], again["commit"]) == (job["id"], "other", None), "the same card, at what is asked now"
    await place.jobs.cancel(job["id"])
    place.jobs.forget(job["id"])
    with pytest.raises(NotFound):
        place.jobs.job(job["id"])


async def test_a_cancelled_quantization_leaves_the_one_that_is_there(place: Place, hub: FakeHub) -> None:
    gguf = {f"m-{name}.gguf": b"GGUF" + name.encode() * 50_000 for name in ("Q4_0", "Q8_0")}
    hub.files = dict(gguf)
    first = await place.jobs.start("owner/name", None, ["m-Q4_0.gguf"])
    await place.state(first["id"], "done")
    hold(hub)
    second = await place.jobs.start("owner/name", None, ["m-Q8_0.gguf"])
    await place.state(second["id"], "running")
    await place.jobs.cancel(second["id"])
    assert [p.name for p in (place.models / "owner_name").glob("*.gguf")] == ["m-Q4_0.gguf"]


async def test_the_same_asked_for_twice_is_one(place: Place, hub: FakeHub) -> None:
    gate = hold(hub)
    first = await place.jobs.start("owner/name", None)
    again = await place.jobs.start("owner/name", None)
    assert first["id"] == again["id"]
    gate.set()
    await place.state(first["id"], "done")
    assert len(place.jobs.jobs()) == 1


async def test_several_run_at_once_and_the_rest_waits(place: Place, hub: FakeHub) -> None:
    gate = hold(hub)
    jobs = [await place.jobs.start(f"owner/name{number}", None) for number in range(SLOTS + 2)]
    for job in jobs[:SLOTS]:
        await place.half(job["id"])
    assert [place.jobs.job(job["id"])["state"] for job in jobs] == ["running"] * SLOTS + ["queued"] * 2
    busy = [place.jobs.busy(place.models / name) for name in ("owner_name4", "owner_name0/m.gguf", "other")]
    assert busy == [True, True, False]
    gate.set()
    for job in jobs:
        assert (await place.state(job["id"], "done", "failed"))["state"] == "done"


async def test_one_folder_at_a_time(place: Place, hub: FakeHub) -> None:
    hub.files = {f"m-{name}.gguf": b"GGUF" + name.encode() * 50_000 for name in ("Q4_0", "Q8_0")}
    gate = hold(hub)
    first = await place.jobs.start("owner/name", None, ["m-Q4_0.gguf"])
    second = await place.jobs.start("owner/name", None, ["m-Q8_0.gguf"])
    await place.state(first["id"], "running")
    assert place.jobs.job(second["id"])["state"] == "queued"
    gate.set()
    for job in (first, second):
        assert (await place.state(job["id"], "done", "failed"))["state"] == "done"


async def test_a_failed_one_says_why_and_can_be_tried_again(place: Place, hub: FakeHub) -> None:
    hub.faults.gated = True
    job = await place.jobs.start("owner/name", None)
    failed = await place.state(job["id"], "failed")
    assert "gated" in failed["error"]["message"] and failed["error"]["detail"]["gated"] is True
    hub.faults.gated = False
    assert (await place.jobs.start("owner/name", None))["id"] == job["id"]
    assert (await place.state(job["id"], "done"))["error"] is None


async def test_what_others_still_need_counts_as_taken(place: Place, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = hold(hub)
    first = await place.jobs.start("owner/name", None)
    await place.half(first["id"])
    needed = sum(len(data) for data in FILES.values())
    import shutil

    usage = shutil._ntuple_diskusage(10**9, 0, 64_000_000 + needed + 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    second = await place.jobs.start("owner/other", None)
    failed = await place.state(second["id"], "failed", "done")
    assert failed["state"] == "failed" and "other downloads" in failed["error"]["message"]
    gate.set()
    await place.state(first["id"], "done")


@pytest.mark.parametrize(
    ("repository", "branch", "name"),
    [("../x", None, ""), ("owner/name", "../main", ""), ("owner/name", None, "../out"), ("owner/name", None, "CON")],
)
async def test_names_that_lead_elsewhere(place: Place, repository: str, branch: str | None, name: str) -> None:
    with pytest.raises(InvalidParameter):
        await place.jobs.start(repository, branch, name=name)
    assert place.jobs.jobs() == []


async def test_a_list_that_was_edited_or_torn_is_no_obstacle(place: Place) -> None:
    place.data.mkdir(parents=True)
    good = {"id": "a", "repository": "o/n", "branch": None, "files": [], "folder": "o_n", "state": "paused"}
    bad = [{**good, "id": "b", "folder": "../../out"}, {"id": "c"}, "d", None]
    (place.data / "downloads.json").write_text(json.dumps({"jobs": [good, *bad]}), encoding="utf-8")
    assert [job["id"] for job in place.fresh().jobs()] == ["a"]
    (place.data / "downloads.json").write_text('{"jobs": [', encoding="utf-8")
    assert place.fresh().jobs() == []


# --- the hub's account ---------------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("plain")
def test_a_token_belongs_to_one_hub_and_is_never_shown(tmp_path: Path) -> None:
    account = HubAccount(tmp_path)
    account.change({"endpoint": "https://one.example/", "token": "hf_secret1"})
    account.change({"endpoint": "https://two.example"})
    assert account.hub().token is None
    account.change({"token": " hf_secret2 "})
    assert account.hub().token == "hf_secret2"
    account.change({"endpoint": "https://one.example:443"})
    assert account.hub().token == "hf_secret1"
    assert account.shown()["token"] == "saved"
    assert "secret" not in json.dumps(account.shown()) + repr(account.hub())
    account.change({"token": None})
    assert account.hub().token is None
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "hub.json").stat().st_mode) == 0o600


@pytest.mark.usefixtures("plain")
def test_the_environments_token_goes_to_the_environments_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    account = HubAccount(tmp_path)
    assert (account.hub().endpoint, account.hub().token) == ("https://mirror.example", "hf_environment")
    assert account.shown()["token"] == "environment"
    account.change({"endpoint": "https://elsewhere.example"})
    assert account.hub().token is None


@pytest.mark.usefixtures("plain")
def test_a_proxys_password_is_not_shown(tmp_path: Path) -> None:
    account = HubAccount(tmp_path, proxy="http://flag.example:1")
    assert account.hub().proxy == "http://flag.example:1"
    account.change({"proxy": "http://me:pass@proxy.example:3128"})
    assert account.hub().proxy == "http://me:pass@proxy.example:3128"
    assert "pass" not in json.dumps(account.shown())
    assert "proxy.example:3128" in account.shown()["proxy"]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "file:///etc"},
        {"endpoint": "https://user:pw@host"},
        {"endpoint": "http://host:99999"},
        {"proxy": "socks5://x"},
        {"proxy": "http://[x"},
        {"token": "two words"},
        {"token": "line\nbreak"},
    ],
)
def test_what_is_no_hub_proxy_or_token_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    account = HubAccount(tmp_path)
    with pytest.raises(InvalidParameter) as refused:
        account.change(change)
    assert refused.value.param == next(iter(change))
    assert not (tmp_path / "hub.json").exists()
