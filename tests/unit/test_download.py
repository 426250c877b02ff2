"""Downloads against a hub on this machine that also cuts, lies, stalls and redirects (catalogue F)."""

from __future__ import annotations

import argparse
import asyncio
import errno
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from modules.detect import list_models
from modules.download import add_parser, run, transfer
from modules.download.fetch import DownloadProgress, DownloadRequest, download, plan_download
from modules.download.hub import Hub, check_names
from modules.download.plan import RepoFile, choose_files
from modules.download.transfer import fetch_file
from modules.errors import Conflict, DownloadError, InvalidParameter, StorageFull, UnsafeModel
from tests.unit.hub_server import COMMIT, SMALL_LLAMA, FakeHub
from tests.unit.model_files import safetensors_bytes

WEIGHTS = SMALL_LLAMA["model.safetensors"]
FILES = {
    **SMALL_LLAMA,
    "pytorch_model.bin": b"\x80\x02pickle",
    "modeling_evil.py": b"print('hi')",
    ".gitattributes": b"*.safetensors filter=lfs",
    "README.md": b"---\nlicense: mit\n---\nhello",
    "onnx/model.onnx": b"onnx",
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(dict(FILES)) as server:
        yield server


def request(tmp_path: Path, **changes: object) -> DownloadRequest:
    return DownloadRequest("owner/name", tmp_path / "models ü", **changes)  # type: ignore[arg-type]


def fetch(hub: FakeHub, tmp_path: Path, **changes: object) -> Path:
    return asyncio.run(download(request(tmp_path, **changes), lambda progress: None, hub=Hub(hub.url), backoff_s=0.01)).folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.part"))


def test_a_whole_model_arrives_checked_and_loads(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[DownloadProgress] = []
    done = asyncio.run(download(request(tmp_path), seen.append, hub=Hub(hub.url)))
    assert sorted(path.name for path in done.folder.iterdir() if path.name[0] != ".") == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (done.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert done.model.problem is None
    assert done.model.format == "hf"
    assert done.model.license == "mit"
    assert seen[-1].fraction == 1.0
    assert seen[-1].files_done == seen[-1].files_total == 4
    assert [model.id for model in list_models([tmp_path / "models ü"])] == ["owner_name"]


def test_what_is_left_out_is_said(hub: FakeHub, tmp_path: Path) -> None:
    plan = asyncio.run(plan_download(request(tmp_path), Hub(hub.url)))
    assert plan.commit == COMMIT
    assert "pickle" in plan.skipped["pytorch_model.bin"]
    assert "code" in plan.skipped["modeling_evil.py"]
    assert "another program" in plan.skipped["onnx/model.onnx"]


def test_a_second_download_fetches_nothing(hub: FakeHub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    count = len(hub.file_requests())
    folder = fetch(hub, tmp_path)
    assert len(hub.file_requests()) == count
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"x")  # same size, other content
    fetch(hub, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_line_is_resumed_where_it_broke(hub: FakeHub, tmp_path: Path, share: float) -> None:
    hub.files = {"model.safetensors": WEIGHTS, "config.json": FILES["config.json"]}
    cut = int(share * len(WEIGHTS))
    hub.faults.cut_after = [len(FILES["config.json"]), cut]
    folder = fetch(hub, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [headers.get("range") for path, headers in hub.file_requests() if "cdn/model.safetensors" in path]
    assert ranges == [None, f"bytes={cut}-" if cut else None]
    assert leftovers(folder) == []


def test_a_killed_download_goes_on_in_the_next_process(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "models ü" / "owner_name"
    target.mkdir(parents=True)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    (target / f".model.safetensors.{digest[:12]}.part").write_bytes(WEIGHTS[:1000])
    (target / ".model.safetensors.000000000000.part").write_bytes(b"another version")
    fetch(hub, tmp_path)
    assert (target / "model.safetensors").read_bytes() == WEIGHTS
    assert ("bytes=1000-") in [headers.get("range") for _, headers in hub.file_requests()]
    assert leftovers(target) == []


@pytest.mark.parametrize("fault", ["ignore_range", "wrong_range"])
def test_a_server_that_can_not_continue_starts_over(hub: FakeHub, tmp_path: Path, fault: str) -> None:
    hub.files = {"model.safetensors": WEIGHTS}
    hub.faults.cut_after = [5000]
    setattr(hub.faults, fault, True)
    folder = fetch(hub, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_part_that_is_too_long_is_dropped(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "models ü" / "owner_name"
    target.mkdir(parents=True)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    (target / f".model.safetensors.{digest[:12]}.part").write_bytes(WEIGHTS + b"more")
    fetch(hub, tmp_path)
    assert (target / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_file_is_fetched_again_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"model.safetensors": WEIGHTS}
    hub.faults.corrupt = 1
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_damaged_twice_is_deleted_and_never_listed(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"model.safetensors": WEIGHTS}
    hub.faults.corrupt = 9
    with pytest.raises(DownloadError, match="wrong content"):
        fetch(hub, tmp_path)
    folder = tmp_path / "models ü" / "owner_name"
    assert not (folder / "model.safetensors").exists()
    assert leftovers(folder) == []
    assert list_models([tmp_path / "models ü"]) == []


@pytest.mark.parametrize("lie", [-10, 10])
def test_a_hub_that_lies_about_the_size(tmp_path: Path, lie: int) -> None:
    with FakeHub({"model.safetensors": WEIGHTS}, lie_about={"model.safetensors": len(WEIGHTS) + lie}) as hub:
        with pytest.raises(DownloadError):
            fetch(hub, tmp_path)
        assert not (tmp_path / "models ü" / "owner_name" / "model.safetensors").exists()


def test_a_web_page_is_no_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.html = True
    with pytest.raises(DownloadError, match="web page"):
        fetch(hub, tmp_path)


def test_a_git_lfs_pointer_is_no_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.pointer = True
    with pytest.raises(DownloadError, match="LFS pointer"):
        fetch(hub, tmp_path)
    assert not (tmp_path / "models ü" / "owner_name" / "model.safetensors").exists()


def test_a_busy_server_is_asked_again_and_not_for_ever(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"model.safetensors": WEIGHTS}
    hub.faults.statuses = [503, 429, 500]
    assert (fetch(hub, tmp_path) / "model.safetensors").exists()
    hub.files = {"other.safetensors": WEIGHTS[:-1]}
    hub.faults.statuses = [503] * 50
    with pytest.raises(DownloadError, match="in a row"):
        fetch(hub, tmp_path)


def test_a_stalled_server_is_given_up_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"model.safetensors": WEIGHTS}
    hub.faults.cut_after = [0] * 20
    hub.faults.stall_s = 0.5
    with pytest.raises(DownloadError, match="nothing for too long"):
        fetch(hub, tmp_path, stall_s=0.05)


def test_a_server_that_drips_is_given_up_on(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    hub.files = {"model.safetensors": WEIGHTS}
    hub.faults.drip_s = 0.02
    with pytest.raises(DownloadError, match="almost nothing"):
        fetch(hub, tmp_path, stall_s=0.5)


def test_cancelling_is_quick_and_keeps_the_part(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"model.safetensors": WEIGHTS}
    hub.faults.cut_after = [4000]
    hub.faults.stall_s = 3.0

    async def cancel_soon() -> float:
        task = asyncio.create_task(download(request(tmp_path), lambda progress: None, hub=Hub(hub.url)))
        while not hub.file_requests():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - started

    assert asyncio.run(cancel_soon()) < 1.0
    hub.faults.stall_s = 0.0
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://169.254.169.254/latest", "gopher://x/", "http://[fe80::1]/x"])
def test_redirects_to_forbidden_places_are_not_followed(hub: FakeHub, tmp_path: Path, target: str) -> None:
    hub.faults.redirect_to = target
    with pytest.raises(DownloadError, match="redirected"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:9/x", "http://10.0.0.1/x", "http://[::ffff:127.0.0.1]/", "http://localhost/x"]
)
def test_a_public_hub_may_not_redirect_inside(target: str) -> None:
    with pytest.raises(DownloadError, match="redirected"):
        Hub("http://8.8.8.8").check_redirect(target)


def test_no_redirect_from_https_to_http() -> None:
    with pytest.raises(DownloadError, match="https to http"):
        Hub("https://8.8.8.8").check_redirect("http://8.8.4.4/x")


def test_the_token_goes_to_the_hub_alone(tmp_path: Path) -> None:
    with FakeHub({"model.safetensors": WEIGHTS}) as cdn, FakeHub({"model.safetensors": WEIGHTS}) as hub:
        hub.faults.redirect_to = f"{cdn.url}/cdn/model.safetensors"
        asyncio.run(download(request(tmp_path), lambda progress: None, hub=Hub(hub.url, "secret-token")))
        assert all("secret-token" in headers.get("authorization", "") for _, headers in hub.requests)
        assert cdn.requests
        assert not any("authorization" in headers for _, headers in cdn.requests)


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"gated": True}, "gated"), ({"info_html": True}, "makes no sense"), ({"info_status": 500}, "HTTP 500")],
)
def test_what_the_hub_refuses_is_explained(hub: FakeHub, tmp_path: Path, fault: dict[str, object], message: str) -> None:
    for name, value in fault.items():
        setattr(hub.faults, name, value)
    with pytest.raises(DownloadError, match=message):
        fetch(hub, tmp_path)


def test_an_unknown_repository_and_an_absent_hub(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no model owner/missing"):
        asyncio.run(plan_download(DownloadRequest("owner/missing", tmp_path), Hub(hub.url)))
    with pytest.raises(DownloadError, match="can't be reached"):
        asyncio.run(plan_download(DownloadRequest("owner/name", tmp_path), Hub("http://127.0.0.1:9")))


def test_no_room_is_said_before_anything_is_fetched(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(StorageFull, match="GB more"):
        fetch(hub, tmp_path)
    assert hub.file_requests() == []


def test_everything_goes_through_the_proxy(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    away = Hub("http://hub.invalid", "secret-token", hub.url.replace("http://", "http://me:pass%20word@"))
    folder = asyncio.run(download(request(tmp_path), lambda progress: None, hub=away)).folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert all(path.startswith("http://hub.invalid") for path, _ in hub.requests)
    assert {headers.get("proxy-authorization") for _, headers in hub.requests} == {"Basic bWU6cGFzcyB3b3Jk"}
    assert {headers.get("authorization") for _, headers in hub.requests} == {"Bearer secret-token"}


def test_a_disk_that_fills_up_at_the_end_keeps_the_part(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"model.safetensors": WEIGHTS}
    write, written = transfer._write_all, [0]

    def fill_up(out: BinaryIO, block: bytes) -> None:
        if written[0] + len(block) >= 0.99 * len(WEIGHTS):
            write(out, block[: len(block) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += len(block)
        write(out, block)

    monkeypatch.setattr(transfer, "_write_all", fill_up)
    with pytest.raises(StorageFull, match=f"{len(WEIGHTS):,} bytes"):
        fetch(hub, tmp_path)
    folder = tmp_path / "models ü" / "owner_name"
    assert not (folder / "model.safetensors").exists() and len(leftovers(folder)) == 1
    monkeypatch.setattr(transfer, "_write_all", write)
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_name_that_leads_nowhere_and_a_circle_of_redirects(hub: FakeHub, tmp_path: Path) -> None:
    file = RepoFile("model.safetensors", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    away = "http://nowhere.invalid/model.safetensors"
    with pytest.raises(DownloadError, match="connection failed, 6 times"):
        asyncio.run(fetch_file(Hub(away), away, file, tmp_path / "x", lambda done: None, backoff_s=0.001))
    hub.faults.redirect_to = "/owner/name/resolve/main/model.safetensors"
    with pytest.raises(DownloadError, match="in a circle"):
        fetch(hub, tmp_path)


def test_a_redirects_name_is_checked_once_more_where_it_led() -> None:
    public = Hub("http://8.8.8.8")
    for address in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:10.0.0.1"):
        with pytest.raises(DownloadError, match="redirected"):
            public.check_address(address)
    public.check_address("8.8.4.4")
    Hub("http://127.0.0.1:1").check_address("127.0.0.1")


def test_one_download_per_folder(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.stall_s = 0.3

    async def two() -> list[object]:
        calls = [download(request(tmp_path), lambda progress: None, hub=Hub(hub.url)) for _ in range(2)]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    outcomes = asyncio.run(two())
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 1
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1


def test_the_command(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    config = SimpleNamespace(model_dir=tmp_path, user_data_dir=tmp_path / "data", hub_endpoint=None, hub_proxy=None)
    assert run(parser.parse_args(["download", "owner/name", "--list"]), config) == 0
    assert not (tmp_path / "owner_name").exists()
    assert run(parser.parse_args(["download", "owner/name", "--out", str(tmp_path / "öut")]), config) == 0
    assert (tmp_path / "öut" / "model.safetensors").read_bytes() == WEIGHTS
    assert run(parser.parse_args(["download", "owner/missing"]), config) == 1
    said = capsys.readouterr()
    assert "skipped pytorch_model.bin: a pickle" in said.out
    assert "safetensors" in said.out.splitlines()[0] and "MB  " in said.out.splitlines()[0]
    assert "no model owner/missing" in said.err
    assert "hf_secret" not in said.out + said.err
    assert {headers.get("authorization") for _, headers in hub.requests} == {"Bearer hf_secret"}


KILLED = """
import asyncio, sys
from pathlib import Path
from modules.download import add_parser, run, transfer
from modules.download.fetch import DownloadRequest, download
from modules.download.hub import Hub
asyncio.run(download(DownloadRequest("owner/name", Path(sys.argv[2])), lambda progress: None, hub=Hub(sys.argv[1])))
"""


def test_a_process_killed_in_the_middle_leaves_nothing_that_loads(hub: FakeHub, tmp_path: Path, root: Path) -> None:
    large = safetensors_bytes({"a": ("F32", (1_000_000,))})
    hub.files = {"model.safetensors": large, "config.json": FILES["config.json"]}
    hub.faults.cut_after = [len(FILES["config.json"]), 3_000_000]
    hub.faults.stall_s, hub.faults.stall_only = 30.0, "model.safetensors"
    models = tmp_path / "models ü"
    process = subprocess.Popen([sys.executable, "-c", KILLED, hub.url, str(models)], cwd=root)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not any(path.stat().st_size for path in models.rglob(".model*.part")):
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (models / "owner_name" / "model.safetensors").exists()
    assert all(model.problem for model in list_models([models]))
    hub.faults = type(hub.faults)()
    before = len(hub.file_requests())
    fetch(hub, tmp_path)
    assert (models / "owner_name" / "model.safetensors").read_bytes() == large
    assert any("range" in headers for _, headers in hub.file_requests()[before:])


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a/..", "a b", "a/b\n", "-x", "http://x/y", "x" * 200])
def test_impossible_repository_names(name: str) -> None:
    with pytest.raises(InvalidParameter):
        check_names(name, None)


def gguf(name: str) -> RepoFile:
    return RepoFile(name, 10**9, "0" * 64)


def test_several_ggufs_are_the_users_choice() -> None:
    files = [gguf("m-Q4_K_M.gguf"), gguf("m-Q8_0.gguf"), gguf("m-F16-00001-of-00002.gguf"), gguf("m-F16-00002-of-00002.gguf")]
    with pytest.raises(InvalidParameter, match="3 GGUF models"):
        choose_files("o/n", COMMIT, files)
    assert [file.path for file in choose_files("o/n", COMMIT, files, ["*q4_k_m*"]).files] == ["m-Q4_K_M.gguf"]
    assert len(choose_files("o/n", COMMIT, files, ["*F16*"]).files) == 2
    with pytest.raises(InvalidParameter, match="No file matches"):
        choose_files("o/n", COMMIT, files, ["*Q2*"])


def test_only_pickles_is_refused_and_asking_for_one_too() -> None:
    files = [RepoFile("pytorch_model.bin", 5), RepoFile("config.json", 5)]
    with pytest.raises(UnsafeModel, match="only as pickles"):
        choose_files("o/n", COMMIT, files)
    with pytest.raises(UnsafeModel, match="pickle"):
        choose_files("o/n", COMMIT, [*files, gguf("m.gguf")], ["*.bin"])


def test_names_that_leave_the_folder_are_skipped() -> None:
    files = [gguf("m.gguf"), RepoFile("../../evil.json", 5), RepoFile("a\\b.json", 5), RepoFile("CON.json", 5)]
    plan = choose_files("o/n", COMMIT, files)
    assert [file.path for file in plan.files] == ["m.gguf"]
    assert len(plan.skipped) == 3
