"""Set-up on real virtual environments and hand-made wheels: markers, layers, interruptions, torch, one-line failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from modules.environments import CommandRunner, Installer, requirements_hash
from modules.overlays import MARKER, Overlays, env_python, read_json, site_packages, write_json
from modules.pip_output import PipProgress, SetupError, explain, is_resolution_failure, venv_help
from modules.sets import new_set, open_set, set_lock
from modules.site_packages import broken_packages, installed_packages
from tests import pip_lab
from tests.conftest import ROOT
from tests.pip_lab import make_wheel


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with hand-made requirements, whose pip sees a wheel folder and no index."""
    root = tmp_path / "a project ünï"
    requirements = root / "loaders" / "requirements"
    requirements.mkdir(parents=True)
    (root / "requirements.txt").write_text("# title: the parent\n# size-mb: 1\nalpha==1.0\n", encoding="utf-8")
    (requirements / "torch.txt").write_text("# size-mb: 1\ntorch==2.0\nbeta\n", encoding="utf-8")
    (requirements / "back.txt").write_text("# on: torch\n# size-mb: 1\ngamma==1.0\n", encoding="utf-8")
    wheels = tmp_path / "wheels"
    for arguments in (("alpha", "1.0", "beta"), ("beta",), ("gamma", "1.0", "torch>=2"), ("torch", "2.0+cpu"), ("alpha", "2.0")):
        make_wheel(wheels, *arguments)
    variables = pip_lab.environment(tmp_path / "pip.conf", wheels.as_uri())
    for name in os.environ.keys() - variables.keys():
        monkeypatch.delenv(name)
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX"):
        monkeypatch.setenv(name, variables[name])
    return root


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment; a copy of it is one that set-up has begun."""
    path = tmp_path_factory.mktemp("blank") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    return path


def copy_blank(blank: Path, env: Path) -> None:
    """Hard links: nothing here writes into a file of pip's, and there are two thousand of them."""
    shutil.copytree(blank, env, symlinks=True, copy_function=os.link)


@pytest.fixture
def quick(project: Path, blank: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, where `python -m venv` takes a copy of one made before: saves the seconds that pip's own set-up takes."""
    run = CommandRunner.run

    def copying(self: CommandRunner, command: Sequence[str | Path], *rest: Any) -> tuple[int, list[str]]:
        if list(command[1:3]) == ["-m", "venv"]:
            copy_blank(blank, Path(command[3]))
            return 0, []
        return run(self, command, *rest)

    monkeypatch.setattr(CommandRunner, "run", copying)
    return project


def installer(project: Path, lines: list[str] | None = None, torch: str | None = None) -> Installer:
    seen = lines if lines is not None else []
    overlays = Overlays(open_set(project), project)
    return Installer(overlays, lambda stage, fraction, line: seen.append(f"{stage} {line}"), torch=torch)


def importable(overlays: Overlays, env: str, code: str) -> str:
    done = subprocess.run([str(env_python(overlays.env_dir(env))), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_environment_is_made_once(project: Path) -> None:
    lines: list[str] = []
    setup = installer(project, lines)
    assert not setup.ready("parent")
    assert setup.ensure("parent")
    marker = setup.overlays.marker("parent")
    assert marker["packages"]["alpha"] == "1.0"
    assert marker["requirements_sha256"] == requirements_hash(project / "requirements.txt")
    assert any("alpha" in line for line in lines)  # pip's package names are shown
    assert importable(setup.overlays, "parent", "import alpha, beta; print(alpha.VERSION)") == "1.0"
    assert not setup.ensure("parent")
    # A later start takes the same set.
    assert installer(project).ready("parent")


def test_new_requirements_are_installed_into_it(quick: Path) -> None:
    setup = installer(quick)
    setup.ensure("parent")
    (quick / "requirements.txt").write_text("# size-mb: 1\nalpha==2.0\n", encoding="utf-8")
    assert not setup.ready("parent")
    assert setup.ensure("parent")
    assert importable(setup.overlays, "parent", "import alpha; print(alpha.VERSION)") == "2.0"


def test_requirements_that_fail_leave_what_there_was(quick: Path) -> None:
    setup = installer(quick)
    setup.ensure("parent")
    (quick / "requirements.txt").write_text("# size-mb: 1\nalpha==9.9\n", encoding="utf-8")
    with pytest.raises(SetupError, match=r"no package alpha==9\.9 fits"):
        setup.ensure("parent")
    assert setup.overlays.marker("parent")
    assert importable(setup.overlays, "parent", "import alpha; print(alpha.VERSION)") == "1.0"


def test_a_layer_is_joined_and_torch_is_pinned_to_the_build_that_is_there(quick: Path) -> None:
    lines: list[str] = []
    setup = installer(quick, lines)
    setup.ensure("back")
    overlays = setup.overlays
    assert overlays.marker("torch")["packages"]["torch"] == "2.0+cpu"
    assert (overlays.set_dir / "constraints.txt").read_text(encoding="utf-8") == "torch==2.0+cpu\n"
    assert any("local wheels" in line for line in lines)
    own = site_packages(overlays.env_dir("back"))
    assert own is not None
    assert "torch" not in installed_packages(own)  # pip saw the layer's as satisfied
    assert importable(overlays, "back", "import torch, gamma; print(torch.VERSION)") == "2.0+cpu"
    layer = (own / "_layer.pth").read_text(encoding="utf-8").strip()
    assert not Path(layer).is_absolute()
    assert layer.isascii()


def test_a_choice_of_torch_is_kept_for_the_background_and_a_new_one_is_followed(quick: Path) -> None:
    installer(quick, torch="cpu").ensure("torch")
    assert installer(quick).torch_build().name == "cpu"
    assert installer(quick, torch="cpu").ready("torch")
    assert not installer(quick, torch="xpu").ready("torch")


def test_a_package_that_was_cut_off_is_installed_again(quick: Path) -> None:
    setup = installer(quick)
    setup.ensure("parent")
    env = setup.overlays.env_dir("parent")
    site = site_packages(env)
    assert site is not None
    (env / MARKER).unlink()
    (site / "beta.py").unlink()
    (site / "~lpha-1.0.dist-info").mkdir()
    assert setup.ensure("parent")
    assert importable(setup.overlays, "parent", "import beta; print(beta.VERSION)") == "1.0"
    assert not list(site.glob("~*"))


def test_a_truncated_file_and_a_missing_record_count_as_broken(tmp_path: Path) -> None:
    for name in ("whole", "short", "torn"):
        with zipfile.ZipFile(make_wheel(tmp_path / "wheels", name)) as archive:
            archive.extractall(tmp_path / "site")
    site = tmp_path / "site"
    (site / "short.py").write_text("", encoding="utf-8")
    (site / "torn-1.0.dist-info" / "RECORD").unlink()
    assert broken_packages(site, repair=False) == ["short", "torn"]
    assert broken_packages(site) == ["short", "torn"]
    assert installed_packages(site) == {"whole": "1.0"}


@pytest.mark.parametrize("damage", ["no interpreter", "no pip", "half of pip"])
def test_a_half_made_environment_is_made_again(quick: Path, blank: Path, damage: str) -> None:
    env = open_set(quick) / "parent"
    copy_blank(blank, env)
    site = site_packages(env)
    assert site is not None
    if damage == "no interpreter":
        env_python(env).unlink()
    else:
        shutil.rmtree(site / "pip" if damage == "no pip" else site / "pip" / "_internal" / "resolution")
    setup = installer(quick)
    setup.ensure("parent")
    assert (site / "pip" / "_internal" / "resolution").is_dir()
    assert importable(setup.overlays, "parent", "import alpha; print(alpha.VERSION)") == "1.0"


KILLED = """
import sys
from pathlib import Path
from modules.environments import Installer
from modules.overlays import Overlays
from modules.sets import open_set
root = Path(sys.argv[1])
Installer(Overlays(open_set(root), root), lambda stage, fraction, line: print(stage, line, flush=True)).ensure("back")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="uses SIGKILL")
@pytest.mark.parametrize("moment", ["torch making a virtual environment", "torch torch", "back gamma"])
def test_killed_at_any_moment_it_goes_on(quick: Path, blank: Path, moment: str) -> None:
    """In the middle of venv (a real one, with a part of pip), of the layer's pip, of its own."""
    if "virtual" not in moment:
        for name in ("torch", "back"):
            copy_blank(blank, open_set(quick) / name)
    words = [sys.executable, "-c", KILLED, str(quick)]
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, encoding="utf-8") as child:
        assert child.stdout is not None
        while not (line := child.stdout.readline()).startswith(moment):
            assert line, "it ended before"
        while "virtual" in moment and not list(open_set(quick).glob("torch/lib/python3*/site-packages/pip/_internal")):
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    setup = installer(quick)
    setup.ensure("back")
    assert importable(setup.overlays, "back", "import torch, gamma; print(gamma.VERSION)") == "1.0"
    assert len(list((quick / "installer_files" / "sets").iterdir())) == 1


def test_no_space_is_said_before_anything_is_written(project: Path) -> None:
    (project / "requirements.txt").write_text("# size-mb: 999999999\nalpha==1.0\n", encoding="utf-8")
    setup = installer(project)
    with pytest.raises(SetupError, match="free some space"):
        setup.ensure("parent")
    assert not setup.overlays.env_dir("parent").exists()


def test_one_installer_at_a_time(tmp_path: Path) -> None:
    with set_lock(tmp_path), pytest.raises(SetupError, match="Another set-up is running"), set_lock(tmp_path, wait_s=0.1):
        pytest.fail("two installers held the lock")
    with set_lock(tmp_path, wait_s=0.1):
        pass


def test_the_next_installer_waits_for_the_one_before(tmp_path: Path) -> None:
    entered = threading.Event()

    def hold() -> None:
        with set_lock(tmp_path):
            entered.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    with set_lock(tmp_path, wait_s=10):
        assert not thread.is_alive() or entered.is_set()
    thread.join()


def test_a_set_that_was_begun_is_taken_up_again(tmp_path: Path) -> None:
    first = open_set(tmp_path)
    assert open_set(tmp_path) == first
    shutil.rmtree(first)
    second = open_set(tmp_path)
    assert second.is_dir()
    assert read_json(tmp_path / "installer_files" / "state.json")["current"] == second.name
    assert new_set(tmp_path) != new_set(tmp_path)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        (
            "WARNING: Retrying ... [Errno -3] Temporary failure in name resolution\nERROR: No matching distribution found for x",
            "network",
        ),
        ("ERROR: [Errno 13] Permission denied: 'x'", "can't be written"),
        ("ERROR: No matching distribution found for torch==9", "no package torch==9 fits"),
        ("SSLError(SSLCertVerificationError", "certificate"),
        ("ReadTimeoutError: Read timed out.", "broke off"),
        ("something\nERROR: it is odd\n", "it is odd"),
        ("", "no output"),
    ],
)
def test_pip_failures_are_one_line(output: str, says: str) -> None:
    line = explain(output.splitlines(), "the parent")
    assert says in line
    assert "\n" not in line


def test_other_versions_are_tried_only_when_they_could_help() -> None:
    none = "ERROR: No matching distribution found for numpy==2.4.6"
    assert is_resolution_failure([none])
    assert is_resolution_failure(["ERROR: ResolutionImpossible: for help visit"])
    assert not is_resolution_failure(["Temporary failure in name resolution", none])


def test_a_lock_of_another_python_is_left(quick: Path) -> None:
    locks = quick / "loaders" / "requirements" / "locks"
    locks.mkdir()
    (locks / "parent.txt").write_text("beta==7.7\n", encoding="utf-8")
    lines: list[str] = []
    setup = installer(quick, lines)
    setup.ensure("parent")
    assert setup.overlays.marker("parent")["packages"]["beta"] == "1.0"
    assert any("do not fit this Python" in line for line in lines)


def test_a_python_without_venv_names_the_package() -> None:
    text = "The virtual environment was not created successfully because ensurepip is not available."
    assert f"python{sys.version_info[0]}.{sys.version_info[1]}-venv" in str(venv_help([text]))
    assert venv_help(["another problem"]) is None


def test_pip_lines_become_progress(tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    progress = PipProgress(4, tmp_path, lambda fraction, what: seen.append((fraction, what)))
    for line in (
        "Collecting gradio==6.31.0 (from -r requirements.txt (line 4))",
        "  Downloading gradio-6.31.0-py3-none-any.whl (56.9 MB)",
        "Requirement already satisfied: numpy in /x",
        "Installing collected packages: numpy, gradio",
    ):
        progress.line(line)
    (tmp_path / "numpy-1.0.dist-info").mkdir()
    deadline = time.monotonic() + 5
    while not seen[-1][1].startswith("installing 1 of 2") and time.monotonic() < deadline:
        time.sleep(0.05)
    progress.close()
    names = [what for _, what in seen]
    assert names[:3] == ["gradio", "gradio (56.9 MB)", "numpy"]
    assert "installing 1 of 2 numpy" in names
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] < 1.0


def test_a_marker_is_json_that_names_its_python(quick: Path) -> None:
    setup = installer(quick)
    setup.ensure("parent")
    text = (setup.overlays.env_dir("parent") / MARKER).read_text(encoding="utf-8")
    assert json.loads(text)["python"].startswith("3.")
    write_json(setup.overlays.env_dir("parent") / MARKER, {})
    assert not setup.ready("parent")
