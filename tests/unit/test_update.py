"""Update and rollback on real git checkouts: all or nothing, the old set kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modules import update as module
from modules.doctor import NO_MODEL
from modules.overlays import Overlays, read_json, state_path, write_json
from modules.pip_output import SetupError
from modules.sets import new_set, open_set
from modules.update import commit, pull, rollback, update, write_locks


def git(folder: Path, *arguments: str) -> str:
    identity = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t"}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, env={**os.environ, **identity}
    )
    return done.stdout.strip()


def save(folder: Path, name: str, text: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    git(folder, "add", name)
    git(folder, "commit", "-qm", name)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    path = tmp_path / "origin"
    path.mkdir()
    git(path, "init", "-q", "-b", "main")
    save(path, ".gitignore", "installer_files/\n")
    save(path, "requirements.txt", "a==1\n")
    save(path, "loaders/requirements/llamacpp.txt", "b==1\n")
    return path


@pytest.fixture
def checkout(origin: Path, tmp_path: Path) -> Path:
    git(tmp_path, "clone", "-q", str(origin), "my copy ü")
    return tmp_path / "my copy ü"


# --- the code --------------------------------------------------------------------------------------------------


def test_pull_only_where_it_is_safe(origin: Path, checkout: Path, tmp_path: Path) -> None:
    assert "up to date" in pull(checkout)
    newest = save(origin, "new.py", "1")
    assert newest[:9] in pull(checkout)
    assert commit(checkout) == newest
    save(origin, "newer.py", "1")
    (checkout / "requirements.txt").write_text("mine\n", encoding="utf-8")
    assert "local changes" in pull(checkout)
    assert commit(checkout) == newest
    assert "no git checkout" in pull(tmp_path)
    assert "no remote" in pull(origin)


def test_a_pull_that_can_not_fast_forward_changes_nothing(origin: Path, checkout: Path) -> None:
    save(origin, "theirs.py", "1")
    mine = save(checkout, "mine.py", "1")
    with pytest.raises(SetupError, match="no commits of its own"):
        pull(checkout)
    assert commit(checkout) == mine
    assert git(checkout, "status", "--porcelain") == ""


# --- the sets --------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """update() with the building and the trying of environments played."""
    built: list[str] = []
    monkeypatch.setattr(module, "_build", lambda old, new, torch: built.append(new.set_dir.name))
    monkeypatch.setattr(module, "_smoke", lambda new: None)
    return built


def test_an_update_keeps_the_old_set_and_rollback_goes_back(checkout: Path, quiet: list[str]) -> None:
    first = open_set(checkout)
    assert update(Overlays(first, checkout), None) == 0
    state = read_json(state_path(checkout))
    assert state == {"current": quiet[0], "previous": first.name}
    assert first.is_dir()
    assert rollback(checkout) == 0
    assert read_json(state_path(checkout)) == {"current": first.name, "previous": quiet[0]}
    assert rollback(checkout) == 0  # and forward again
    assert read_json(state_path(checkout))["current"] == quiet[0]


@pytest.mark.usefixtures("quiet")
def test_only_two_sets_are_kept(checkout: Path) -> None:
    open_set(checkout)
    for _ in range(3):
        update(Overlays(open_set(checkout), checkout), None)
    state = read_json(state_path(checkout))
    kept = {path.name for path in (checkout / "installer_files" / "sets").iterdir()}
    assert kept == {state["current"], state["previous"]}


@pytest.mark.parametrize("stage", ["_build", "_smoke"])
def test_a_failed_update_changes_nothing_and_the_next_goes_on_with_its_set(
    checkout: Path, quiet: list[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    first = open_set(checkout)

    def fail(*_: object) -> None:
        raise SetupError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, fail)
        with pytest.raises(SetupError, match="the old environments stay: no network"):
            update(Overlays(first, checkout), None)
    state = read_json(state_path(checkout))
    assert state["current"] == first.name
    assert open_set(checkout) == first
    update(Overlays(first, checkout), None)
    assert read_json(state_path(checkout))["current"] == state["building"] == quiet[-1]


@pytest.mark.usefixtures("quiet")
def test_rollback_takes_the_code_back(origin: Path, checkout: Path) -> None:
    old = commit(checkout)
    first = open_set(checkout)
    write_json(first / "set.json", {**read_json(first / "set.json"), "commit": old})
    new = save(origin, "new.py", "1")
    pull(checkout)
    update(Overlays(first, checkout), None, with_code=False)
    assert commit(checkout) == new
    (checkout / "requirements.txt").write_text("mine\n", encoding="utf-8")
    with pytest.raises(SetupError, match="local changes"):
        rollback(checkout)
    git(checkout, "checkout", "-q", "requirements.txt")
    rollback(checkout)
    assert commit(checkout) == old
    assert read_json(state_path(checkout))["current"] == first.name


def test_new_code_does_the_rest_and_goes_back_when_it_fails(
    origin: Path, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old = commit(checkout)
    save(origin, "one_click.py", "import sys; print('new code runs', sys.argv[1:]); sys.exit(1)\n")
    assert update(Overlays(open_set(checkout), checkout), "cpu") == 1
    captured = capfd.readouterr()
    assert "new code runs ['update', '--no-pull', '--torch', 'cpu']" in captured.out
    assert commit(checkout) == old
    assert "the code is back" in captured.err


def test_rollback_without_an_earlier_set(checkout: Path) -> None:
    open_set(checkout)
    with pytest.raises(SetupError, match="no earlier set"):
        rollback(checkout)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"smoke_ok": False, "fix": "it died"}, "echo fails its test in the new environments: it died"),
        ({"smoke_ok": True, "fix": ""}, None),
        ({"installed": False, "smoke_ok": False, "fix": "install it"}, None),
        ({"smoke_ok": False, "fix": f"{NO_MODEL}gguf model to try it on: put one there"}, None),
    ],
)
def test_the_new_environments_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, object], says: str | None
) -> None:
    report = {"loaders": [{"name": "echo", "installed": True, "importable": True, "device_ok": True, **row}]}
    (tmp_path / "server.py").write_text(f"print({json.dumps(json.dumps(report))})", encoding="utf-8")
    monkeypatch.setattr(module, "env_python", lambda path: sys.executable)
    new = Overlays(tmp_path / "set", tmp_path)
    if says is None:
        module._smoke(new)
        return
    with pytest.raises(SetupError, match=says):
        module._smoke(new)


def test_environments_that_do_not_start_are_told_by_their_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server.py").write_text("import sys; sys.exit('ImportError: gradio')", encoding="utf-8")
    monkeypatch.setattr(module, "env_python", lambda path: sys.executable)
    with pytest.raises(SetupError, match="do not start: ImportError: gradio"):
        module._smoke(Overlays(tmp_path / "set", tmp_path))


def test_locks_leave_out_what_differs_by_machine(tmp_path: Path) -> None:
    (tmp_path / "loaders" / "requirements").mkdir(parents=True)
    (tmp_path / "loaders" / "requirements" / "torch.txt").write_text("torch\n", encoding="utf-8")
    set_dir = new_set(tmp_path)
    site = set_dir / "torch" / ("Lib/site-packages" if sys.platform == "win32" else "lib/python3.11/site-packages")
    for name in ("torch-2.13.0+cpu", "nvidia_cublas-13.0", "llama_cpp_python-0.3.36", "pip-23.2", "numpy-2.4.6", "Jinja2-3.1.6"):
        (site / f"{name}.dist-info").mkdir(parents=True)
    write_locks(Overlays(set_dir, tmp_path))
    lines = (tmp_path / "loaders" / "requirements" / "locks" / "torch.txt").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == ["jinja2==3.1.6", "numpy==2.4.6"]


def test_the_state_is_valid_json_at_every_moment(checkout: Path) -> None:
    open_set(checkout)
    assert json.loads(state_path(checkout).read_text(encoding="utf-8"))["current"]
