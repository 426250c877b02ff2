"""Background installs: one at a time, progress as events, cancelled with all they started, taken up after a restart."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from modules import installs as module
from modules.errors import InstallFailed
from modules.events import EventBus
from modules.install_job import BUILD_TARGET
from modules.installs import InstallManager
from modules.overlays import Overlays, write_json
from tests.conftest import ROOT

JOB = """
import json, subprocess, sys, time
set_dir, target = sys.argv[1:3]
def send(**message): print(json.dumps(message), flush=True)
open(set_dir + "/started", "a").write(target + "\\n")
send(stage="GGUF converter" if target == "llamacpp" else target, fraction=0.5, line="gradio")
if target == "torch":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(set_dir + "/child", "w").write(str(child.pid))
    time.sleep(60)
if target == "tests":
    send(state="failed", line="the disk is full"); sys.exit(1)
if target == "parent":
    sys.exit(7)
send(state="done", line="ok")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    requirements = root / "loaders" / "requirements"
    requirements.mkdir(parents=True)
    (root / "tests").mkdir()
    backends = (f"loaders/requirements/{name}.txt" for name in ("torch", "transformers", "llamacpp"))
    for name in ("requirements.txt", "tests/requirements.txt", *backends):
        (root / name).write_text("x\n", encoding="utf-8")
    (tmp_path / "job.py").write_text(JOB, encoding="utf-8")
    return root


class Desk:
    """A manager and what it published."""

    def __init__(self, project: Path, managed: bool = True) -> None:
        self.set_dir = project / "set"
        self.set_dir.mkdir(exist_ok=True)
        if managed:
            write_json(self.set_dir / "set.json", {"made": "now"})
        self.bus = EventBus()
        self.manager = InstallManager(Overlays(self.set_dir, project), self.bus, job=[str(project.parent / "job.py")])
        self.seen: list[dict[str, Any]] = []
        self._task = asyncio.get_running_loop().create_task(self._collect())

    async def _collect(self) -> None:
        with self.bus.subscribe() as events:
            async for event in events:
                assert event.kind == "install"
                self.seen.append(event.data)

    async def until(self, overlay: str, state: str) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for event in self.seen:
                if event["overlay"] == overlay and event["state"] == state:
                    return event
            await asyncio.sleep(0.02)
        raise AssertionError(f"no {state} of {overlay} in {self.seen}")

    async def close(self) -> None:
        await self.manager.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_progress_and_end_are_events(project: Path) -> None:
    desk = Desk(project)
    assert desk.manager.install("transformers")["state"] == "queued"
    assert desk.manager.install("transformers")["state"] == "queued"  # the same one
    done = await desk.until("transformers", "done")
    assert set(done) == {"overlay", "title", "stage", "fraction", "line", "state"}
    assert any(event["fraction"] == 0.5 and event["stage"] == "gradio" for event in desk.seen), "its title is not said twice"
    desk.manager.install("llamacpp")
    await desk.until("llamacpp", "done")
    assert any(event["stage"] == "GGUF converter: gradio" and event["line"] == "gradio" for event in desk.seen)
    assert [job["overlay"] for job in desk.manager.jobs()] == ["transformers", "llamacpp"]
    await desk.close()


async def test_one_at_a_time_in_order(project: Path) -> None:
    desk = Desk(project)
    for name in ("transformers", "llamacpp", BUILD_TARGET):
        desk.manager.install(name)
    await desk.until(BUILD_TARGET, "done")
    started = (desk.set_dir / "started").read_text(encoding="utf-8").split()
    assert started == ["transformers", "llamacpp", BUILD_TARGET]
    order = [
        (event["overlay"], event["state"])
        for event in desk.seen
        if event["state"] in ("running", "done") and event["fraction"] is None
    ]
    assert order.index(("transformers", "done")) < order.index(("llamacpp", "running"))
    await desk.close()


async def test_a_failure_carries_its_reason_and_the_next_job_runs(project: Path) -> None:
    desk = Desk(project)
    desk.manager.install("tests")
    desk.manager.install("parent")
    desk.manager.install("llamacpp")
    assert (await desk.until("tests", "failed"))["stage"] == "the disk is full"
    assert "status 7" in (await desk.until("parent", "failed"))["stage"]
    await desk.until("llamacpp", "done")
    await desk.close()


async def wait_for_child(desk: Desk) -> int:
    path = desk.set_dir / "child"
    for _ in range(500):
        if path.exists() and path.read_text(encoding="utf-8"):
            return int(path.read_text(encoding="utf-8"))
        await asyncio.sleep(0.02)
    raise AssertionError("the job did not start")


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_cancelling_ends_everything_the_job_started(project: Path) -> None:
    desk = Desk(project)
    desk.manager.install("torch")
    desk.manager.install("llamacpp")
    child = await wait_for_child(desk)
    await desk.manager.cancel("torch")
    assert (await desk.until("torch", "failed"))["stage"] == "Stopped."
    await desk.until("llamacpp", "done")
    assert gone(child)
    await desk.close()


async def test_a_queued_job_can_be_cancelled(project: Path) -> None:
    desk = Desk(project)
    desk.manager.install("torch")
    desk.manager.install("llamacpp")
    await wait_for_child(desk)
    await desk.manager.cancel("llamacpp")
    await desk.until("llamacpp", "failed")
    await desk.manager.cancel("torch")
    await desk.until("torch", "failed")
    assert "llamacpp" not in (desk.set_dir / "started").read_text(encoding="utf-8")
    await desk.close()


async def test_what_was_running_at_the_end_goes_on_after_a_restart(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.llamacpp_build, "find_compiler", lambda: None)
    desk = Desk(project)
    desk.manager.install("torch")
    child = await wait_for_child(desk)
    await desk.close()
    assert gone(child)
    after = Desk(project)
    assert set(after.manager.resume()) == {"transformers", "torch"}  # the default one, and the one that was asked for
    await after.close()


async def test_what_the_user_stopped_is_not_taken_up_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.llamacpp_build, "find_compiler", lambda: None)
    desk = Desk(project)
    desk.manager.install("torch")
    await wait_for_child(desk)
    desk.manager.install("transformers")
    await desk.manager.cancel("transformers")
    await desk.manager.cancel("torch")
    await desk.until("torch", "failed")
    await desk.close()
    after = Desk(project)
    assert after.manager.resume() == []
    assert after.manager.install("transformers")["state"] == "queued"  # unless asked
    await after.until("transformers", "done")
    await after.close()


async def test_a_developers_set_is_left_alone(project: Path) -> None:
    desk = Desk(project, managed=False)
    assert desk.manager.resume() == []
    with pytest.raises(InstallFailed):
        desk.manager.install("torch")
    await desk.close()


async def test_what_is_not_known_is_refused(project: Path) -> None:
    desk = Desk(project)
    with pytest.raises(InstallFailed, match="nothing to install"):
        desk.manager.install("../x")
    await desk.close()


async def test_a_real_job_reports_and_ends_in_order(project: Path) -> None:
    """Also while its stdin is open, as it is under a server."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "modules.install_job", str(project / "set"), "absent"),
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    end = json.loads(await process.stdout.readline())
    assert (end["state"], "no environment 'absent'" in end["line"]) == ("failed", True)
    assert await process.wait() == 1
    assert await process.stderr.read() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
async def test_a_real_job_ends_with_its_server(project: Path) -> None:
    """The end of its stdin is the end of the server: the job and its pip must not outlive it."""
    write_json(project / "set" / "set.json", {"made": "now"})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "modules.install_job", str(project / "set"), "parent"),
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PIP_NO_INDEX": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    first = json.loads(await process.stdout.readline())
    assert "virtual environment" in first["line"]
    children = psutil.Process(process.pid).children(recursive=True)
    process.stdin.close()
    await asyncio.wait_for(process.wait(), 10)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
