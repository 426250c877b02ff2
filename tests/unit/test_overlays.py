"""The environments on disk: layouts of every platform, which count as complete, what a worker is given."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from modules import overlays as module
from modules.overlays import MARKER, Overlays, env_python, env_specs, read_json, site_packages, write_json
from modules.schema import LoaderSpec
from tests.conftest import ROOT


def spec(overlay: str | None = "back", probe: tuple[str, ...] = ("engine",), **kwargs: Any) -> LoaderSpec:
    return LoaderSpec("x", "X", "loaders.x:X", "", {"gguf": 1}, frozenset(), overlay=overlay, probe=probe, **kwargs)


@pytest.fixture(autouse=True)
def _no_chosen_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWITCHYARD_SET", raising=False)


def make_env(set_dir: Path, name: str, modules: tuple[str, ...] = (), on: str | None = None, marker: bool = True) -> Path:
    env = set_dir / name
    site = env / ("Lib/site-packages" if sys.platform == "win32" else "lib/python3.11/site-packages")
    site.mkdir(parents=True)
    python = env_python(env)
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text("", encoding="utf-8")
    for module_name in modules:
        (site / module_name).mkdir()
    if on is not None:
        below = site_packages(set_dir / on)
        assert below is not None
        (site / "_layer.pth").write_text(Path(os.path.relpath(below, site)).as_posix() + "\n", encoding="utf-8")
    if marker:
        write_json(env / MARKER, {"packages": {}})
    return site


def test_the_layout_of_each_platform(tmp_path: Path) -> None:
    assert env_python(Path("e"), "win32") == Path("e/Scripts/python.exe")
    assert env_python(Path("e"), "linux") == env_python(Path("e"), "darwin") == Path("e/bin/python")
    (tmp_path / "Lib" / "site-packages").mkdir(parents=True)
    assert site_packages(tmp_path, "win32") == tmp_path / "Lib" / "site-packages"
    assert site_packages(tmp_path, "linux") is None
    (tmp_path / "lib" / "python3.12" / "site-packages").mkdir(parents=True)
    assert site_packages(tmp_path, "darwin") == tmp_path / "lib" / "python3.12" / "site-packages"


def test_a_requirements_file_describes_its_environment() -> None:
    specs = env_specs(ROOT)
    assert {"parent", "torch", "transformers", "llamacpp", "tests"} <= specs.keys()
    assert specs["transformers"].on == "torch"
    assert specs["tests"].on == "parent"
    assert specs["parent"].on is None
    assert specs["torch"].size_mb > specs["llamacpp"].size_mb


def test_which_set_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "elsewhere"))
    write_json(tmp_path / "installer_files" / "state.json", {"current": "s2"})
    assert Overlays.find(tmp_path).set_dir == tmp_path / "installer_files" / "sets" / "s2"
    own = tmp_path / "installer_files" / "sets" / "s1"
    make_env(own, "parent")
    (own / "parent" / "pyvenv.cfg").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "prefix", str(own / "parent"))
    assert Overlays.find(tmp_path).set_dir == own
    monkeypatch.setenv("SWITCHYARD_SET", str(tmp_path / "mine"))
    assert Overlays.find(tmp_path).set_dir == tmp_path / "mine"


def test_a_half_made_environment_does_not_count(tmp_path: Path) -> None:
    overlays = Overlays(tmp_path, ROOT)
    assert "not installed" in str(overlays.status(spec()).reason)
    make_env(tmp_path, "back", ("engine",), marker=False)
    status = overlays.status(spec())
    assert not status.installed
    assert "not finished" in str(status.reason)
    assert status.fix.endswith("install back")
    write_json(tmp_path / "back" / MARKER, {"packages": {}})
    assert overlays.status(spec()).importable


def test_a_torn_marker_does_not_count(tmp_path: Path) -> None:
    make_env(tmp_path, "back", ("engine",))
    (tmp_path / "back" / MARKER).write_text('{"packages": {', encoding="utf-8")
    assert not Overlays(tmp_path, ROOT).status(spec()).installed


def test_a_developers_set_needs_no_markers_but_an_installed_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_env(tmp_path, "back", ("engine",), marker=False)
    monkeypatch.setenv("SWITCHYARD_SET", str(tmp_path))
    assert Overlays(tmp_path, ROOT).status(spec()).installed
    write_json(tmp_path / "set.json", {"made": "today"})
    assert not Overlays(tmp_path, ROOT).status(spec()).installed


def test_probes_look_through_the_layers_and_take_alternatives(tmp_path: Path) -> None:
    make_env(tmp_path, "low", ("tensor",))
    site = make_env(tmp_path, "back", ("engine",), on="low")
    (site / "native.cpython-311.so").write_text("", encoding="utf-8")
    overlays = Overlays(tmp_path, ROOT)
    assert overlays.status(spec(probe=("engine", "tensor", "native"))).importable
    assert overlays.status(spec(probe=("absent|engine",))).importable
    status = overlays.status(spec(probe=("engine", "absent")))
    assert (status.installed, status.importable, status.missing) == (True, False, ("absent",))


def test_a_set_may_be_moved(tmp_path: Path) -> None:
    old = tmp_path / "old ünï"
    make_env(old, "low", ("tensor",))
    make_env(old, "back", on="low")
    shutil.move(old, tmp_path / "new place")
    assert Overlays(tmp_path / "new place", ROOT).status(spec(probe=("tensor",))).importable


def test_the_status_follows_an_install(tmp_path: Path) -> None:
    site = make_env(tmp_path, "back")
    overlays = Overlays(tmp_path, ROOT)
    assert not overlays.status(spec()).importable
    (site / "engine").mkdir()
    os.utime(site, ns=(1, 1))
    assert overlays.status(spec()).importable


def test_the_parents_own_loaders(tmp_path: Path) -> None:
    overlays = Overlays(tmp_path, ROOT)
    assert overlays.unavailable(spec(overlay=None, probe=("json",))) is None
    assert "surely_absent" in str(overlays.unavailable(spec(overlay=None, probe=("surely_absent",))))
    assert overlays.python(None) == Path(sys.executable)


def test_a_cuda_loader_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "nvidia_present", lambda: False)
    make_env(tmp_path, "back", ("engine",))
    assert "NVIDIA" in str(Overlays(tmp_path, ROOT).unavailable(spec(needs_cuda=True)))
    monkeypatch.setattr(module, "nvidia_present", lambda: True)
    assert Overlays(tmp_path, ROOT).unavailable(spec(needs_cuda=True)) is None


def test_a_worker_gets_no_credentials_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "SWITCHYARD_API_KEY",
        "MY_PASSWORD",
        "PYTHONPATH",
        "HTTPS_PROXY",
    ):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    env = Overlays(tmp_path, ROOT).worker_env("back")
    assert "secret" not in env.values()
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert Overlays(tmp_path, ROOT).worker_env("back")["GOMP_SPINCOUNT"] == "7"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["PATH"].split(os.pathsep)[0] == str(env_python(tmp_path / "back").parent)


def test_a_json_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "state.json"
    write_json(path, {"current": "1"})

    def torn(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", torn)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"current": "2"})
    assert read_json(path) == {"current": "1"}
    assert read_json(tmp_path / "absent.json") == {}
