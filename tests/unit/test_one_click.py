"""The launcher: what is passed on, what is set up first, and the one line when it can't go on."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import one_click
from modules.console import Console
from modules.environments import Installer
from modules.overlays import Overlays, env_python, read_json, write_json
from modules.pip_output import SetupError
from tests.conftest import ROOT

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")


# --- the start scripts -----------------------------------------------------------------------------------------


def fake_python(folder: Path, name: str, version: tuple[int, int]) -> None:
    """A `python` that answers the version check like that version and prints what it is started with."""
    folder.mkdir(parents=True, exist_ok=True)
    check = f"import sys; sys.version_info = ({version[0]}, {version[1]}, 0); exec(sys.argv[1])"
    script = "\n".join(
        (
            "#!/bin/sh",
            f"""if [ "$1" = -c ]; then exec '{sys.executable}' -c "{check}" "$2"; fi""",
            f"""echo "{name}"; for word in "$@"; do echo "<$word>"; done""",
            """echo "$PWD"; echo "path=${PYTHONPATH-unset}"\n""",
        )
    )
    path = folder / name
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)


def start(script: str, folder: Path, path: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / script, folder / script)
    for tool in ("sh", "dirname"):
        target = path / tool
        if not target.exists():
            target.symlink_to(str(shutil.which(tool)))
    return subprocess.run(
        [str(folder / script), *arguments], cwd="/", capture_output=True, encoding="utf-8", check=False,
        env={"PATH": str(path), "PYTHONPATH": "/evil", **environ},
    )  # fmt: skip


@posix
@pytest.mark.parametrize("script", ["start_linux.sh", "start_macos.sh"])
def test_the_start_script_passes_everything_on_from_any_folder(tmp_path: Path, script: str) -> None:
    folder = tmp_path / "a b ünï"
    folder.mkdir()
    fake_python(tmp_path / "bin", "python3", (3, 11))
    done = start(script, folder, tmp_path / "bin", "--model", "my model ü", "doctor", "", "--json")
    assert done.stdout.splitlines() == [
        "python3", "<one_click.py>", "<--model>", "<my model ü>", "<doctor>", "<>", "<--json>", str(folder), "path=unset",
    ]  # fmt: skip


@posix
@pytest.mark.parametrize("script", ["start_linux.sh", "start_macos.sh"])
def test_an_old_python_is_passed_over_or_said_in_one_line(tmp_path: Path, script: str) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    fake_python(tmp_path / "bin", "python3", (3, 9))
    done = start(script, folder, tmp_path / "bin")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Python 3.10 or newer" in done.stderr
    fake_python(tmp_path / "bin", "python3.12", (3, 12))
    assert start(script, folder, tmp_path / "bin").stdout.startswith("python3.12\n")


@posix
def test_a_python_of_ones_own_and_one_that_is_newer_than_known(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", "python3", (3, 16))
    assert start("start_linux.sh", tmp_path, tmp_path / "bin").stdout.startswith("python3\n")
    fake_python(tmp_path / "bin", "python3.13", (3, 13))  # one that wheels exist for goes first
    assert start("start_linux.sh", tmp_path, tmp_path / "bin").stdout.startswith("python3.13\n")
    fake_python(tmp_path / "mine", "my-python", (3, 10))
    mine = str(tmp_path / "mine" / "my-python")
    assert start("start_linux.sh", tmp_path, tmp_path / "bin", SWITCHYARD_PYTHON=mine).stdout.startswith("my-python\n")


def test_the_windows_script_has_windows_line_ends_and_passes_on() -> None:
    data = (ROOT / "start_windows.bat").read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") > 10
    assert b"one_click.py %*" in data
    assert b'cd /d "%~dp0"' in data


# --- the launcher ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """one_click on an empty project, with installing and starting played."""
    (tmp_path / "loaders" / "requirements").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    for name in (
        "requirements.txt",
        "tests/requirements.txt",
        "loaders/requirements/llamacpp.txt",
        "loaders/requirements/torch.txt",
    ):
        (tmp_path / name).write_text("x==1\n", encoding="utf-8")
    seen: dict[str, list[str]] = {"ensured": [], "started": []}
    monkeypatch.setattr(one_click, "ROOT", tmp_path)
    monkeypatch.setattr(Installer, "ensure", lambda self, env: seen["ensured"].append(env) or True)
    monkeypatch.setattr(one_click.Launch, "_become", staticmethod(lambda command: seen["started"].extend(command) or 0))
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "LAUNCH_AFTER_INSTALL", "SWITCHYARD_TORCH", "GPU_CHOICE"):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_the_first_start_sets_up_only_what_the_first_chat_needs(
    launched: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert one_click.main(["--listen-port", "8000", "--model", "my ü model"]) == 0
    assert launched["ensured"] == ["parent", "llamacpp"]
    assert launched["started"][-4:] == ["--listen-port", "8000", "--model", "my ü model"]
    assert launched["started"][1].endswith("server.py")
    captured = capsys.readouterr()
    assert "[1/3]" in captured.err
    assert captured.out == ""


def test_subcommands_go_to_the_server_with_the_parent_alone(launched: dict[str, list[str]]) -> None:
    assert one_click.main(["doctor", "--json"]) == 0
    assert launched["ensured"] == ["parent"]
    assert launched["started"][2:] == ["doctor", "--json"]


def test_a_screen_opens_the_browser_unless_told_otherwise(
    launched: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_click, "has_display", lambda: True)
    one_click.main([])
    assert "--auto-launch" in launched["started"]
    launched["started"].clear()
    one_click.main(["--no-auto-launch"])
    assert launched["started"][2:] == ["--no-auto-launch"]


def test_displays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_CONNECTION", "CI", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not one_click.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert one_click.has_display()
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4")
    assert not one_click.has_display()
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert one_click.has_display()


def test_install_takes_names_and_refuses_others_in_one_line(
    launched: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert one_click.main(["install", "torch", "--torch", "cpu"]) == 0
    assert launched["ensured"] == ["torch"]
    assert one_click.main(["install", "torhc"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("Switchyard: There is no environment 'torhc'")


def test_set_up_only(launched: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_AFTER_INSTALL", "no")
    assert one_click.main([]) == 0
    assert launched["ensured"] == ["parent", "llamacpp"]
    assert launched["started"] == []


def test_the_torch_flag_is_read_from_cmd_flags_too(
    launched: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one_click.torch_flag(["--torch", "cpu", "--torch=xpu"]) == "xpu"
    (tmp_path / "CMD_FLAGS.txt").write_text("--torch cu126 # my old card\n", encoding="utf-8")
    seen: list[str | None] = []
    monkeypatch.setattr(one_click.Launch, "__init__", lambda self, torch: seen.append(torch))
    monkeypatch.setattr(one_click.Launch, "server", lambda *_: 0)
    one_click.main([])
    one_click.main(["--torch", "cpu"])
    assert seen == ["cu126", "cpu"]


def test_a_failed_set_up_is_one_line_and_the_exit_status(
    launched: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Installer, env: str) -> bool:
        raise SetupError("the web server: the package index can't be reached: connect to the network.")

    monkeypatch.setattr(Installer, "ensure", fail)
    assert one_click.main([]) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "Switchyard: the web server: the package index can't be reached: connect to the network."
    )
    monkeypatch.setattr(Installer, "ensure", lambda self, env: (_ for _ in ()).throw(KeyboardInterrupt))
    assert one_click.main([]) == 130
    monkeypatch.setattr(
        Installer, "ensure", lambda self, env: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "/x"))
    )
    assert one_click.main([]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Switchyard: Permission denied: /x"
    assert launched["started"] == []


def test_a_python_without_venv_is_said_before_anything_is_made(
    launched: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert one_click.main([]) == 1
    assert "-venv" in capsys.readouterr().err
    assert not (tmp_path / "installer_files").exists()
    assert launched["ensured"] == []


def test_a_set_whose_python_is_gone_is_made_anew(launched: dict[str, list[str]], tmp_path: Path) -> None:
    one_click.main([])
    state = tmp_path / "installer_files" / "state.json"
    first = read_json(state)["current"]
    parent = tmp_path / "installer_files" / "sets" / str(first) / "parent"
    python = env_python(parent)
    python.parent.mkdir(parents=True)
    python.symlink_to("/gone/python3")
    write_json(parent / ".switchyard.json", {"packages": {}})
    one_click.main([])
    assert read_json(state)["current"] != first


def test_an_old_python_is_refused_by_the_launcher_itself() -> None:
    code = "import runpy, sys; sys.version_info = (3, 9, 1); runpy.run_path('one_click.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "Switchyard needs Python 3.10 or newer, this is 3.9: install a newer one and run this again."


def test_test_runs_ruff_mypy_and_pytest_and_keeps_the_first_failure(
    launched: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def play(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append([word for word in command[2:]])
        env = options["env"]
        assert isinstance(env, dict)
        assert env["SWITCHYARD_SET"]
        return subprocess.CompletedProcess(command, 1 if command[2] == "ruff" else 0)

    monkeypatch.setattr(one_click.subprocess, "run", play)
    monkeypatch.setattr(one_click.llamacpp_build, "build_state", lambda installer: "ok")
    assert one_click.main(["test", "-k", "x"]) == 1
    assert commands == [["ruff", "check", "."], ["mypy"], ["pytest", *one_click.pytest_flags(["-k", "x"])]]
    assert launched["ensured"] == ["parent", "llamacpp", "torch", "tests"]


def test_only_the_standard_library_is_needed_before_set_up() -> None:
    code = (
        "import sys; before = set(sys.modules); import one_click, modules.install_job; "
        "names = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(','.join(sorted(n for n in names if n not in sys.stdlib_module_names and n not in ('modules', 'one_click'))))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == ""


# --- the console -----------------------------------------------------------------------------------------------


def test_a_log_gets_phases_with_their_number_and_time() -> None:
    stream = io.StringIO()
    console = Console(2, stream)
    console.phase("web server")
    console.progress("web server", 0.5, "gradio")  # within the first seconds: not a line each
    console.phase("llama.cpp")
    console.finish()
    assert stream.getvalue().splitlines() == [
        "[1/2] web server",
        "[1/2] web server done (0:00)",
        "[2/2] llama.cpp",
        "[2/2] llama.cpp done (0:00)",
    ]


def test_a_terminal_gets_one_line_that_is_rewritten() -> None:
    class Terminal(io.StringIO):
        encoding = "ascii"

        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(1, stream)
    console.phase("wéb")
    console._printed = 0.0
    console.progress("pip", 0.42, "gradio")
    console.finish()
    assert "[1/1] w?b 0:00  42% pip: gradio" in stream.getvalue()
    assert stream.getvalue().endswith("[1/1] w?b done (0:00)\n")


def test_the_overlays_of_a_new_project_are_empty(tmp_path: Path) -> None:
    assert not Overlays(tmp_path, ROOT).complete("parent")


def test_the_whole_suite_runs_in_parallel_with_second_tries_and_a_named_file_alone() -> None:
    whole = one_click.pytest_flags(["-x"])
    assert whole[whole.index("--reruns") + 1] == "1"
    assert whole[0] == "tests" and whole[-1] == "-x" and whole[whole.index("--dist") + 1] == "loadscope"
    assert one_click.pytest_flags(["tests/unit/test_paths.py::test_x", "-q"]) == ["tests/unit/test_paths.py::test_x", "-q"]
