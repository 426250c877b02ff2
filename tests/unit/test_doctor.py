"""The doctor: real workers for what is here, and each no with its exact fix."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modules import doctor
from modules.config import Config
from modules.doctor import ORDER, Row, check, device_problem, run, smoke_model, table
from modules.errors import ConfigError
from modules.overlays import Overlays, write_json
from modules.registry import discover, load_spec
from tests.conftest import ROOT

if TYPE_CHECKING:
    from modules.schema import LoaderSpec

KEYS = ["name", "installed", "importable", "device_ok", "smoke_ok", "fix"]
ECHO = load_spec("echo")


def spec(**changes: object) -> LoaderSpec:
    return dataclasses.replace(ECHO, **changes)  # type: ignore[arg-type]


def test_echo_passes_all_four_in_a_real_worker(overlays: Overlays) -> None:
    row = check("echo", ECHO, overlays, Config())
    assert (row.installed, row.importable, row.device_ok, row.smoke_ok, row.fix) == (True, True, True, True, "")


def test_every_loader_of_the_product_has_a_row() -> None:
    assert set(ORDER) == {
        "transformers",
        "llamacpp",
        "autogptq",
        "gptq_for_llama",
        "exllama",
        "rwkv",
        "flexgen",
        "remote",
        "echo",
    }
    assert set(ORDER) == discover().keys()


def test_a_loader_whose_file_is_gone_is_a_no(overlays: Overlays) -> None:
    row = check("lost", None, overlays, Config())
    assert not (row.installed or row.importable or row.device_ok or row.smoke_ok)
    assert "loaders/lost.py" in row.fix


def test_remote_is_tried_on_a_second_server_of_our_own(overlays: Overlays, tmp_path: Path) -> None:
    row = check("remote", load_spec("remote"), overlays, Config(user_data_dir=tmp_path))
    assert (row.installed, row.importable, row.device_ok, row.smoke_ok, row.fix) == (True, True, True, True, "")


def test_what_is_not_installed_names_the_command(tmp_path: Path) -> None:
    row = check("x", spec(overlay="absent", probe=("engine",)), Overlays(tmp_path, ROOT), Config())
    assert (row.installed, row.importable, row.device_ok, row.smoke_ok) == (False, False, True, False)
    assert row.fix.endswith("install absent")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ImportError('libgomp.so.1: cannot open')", "libgomp.so.1"),
        ("import os; os._exit(3)", "exit status 3"),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "SIGSEGV",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="signals"),
        ),
    ],
)
def test_a_backend_that_fails_or_crashes_at_import_is_a_no(
    overlays: Overlays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    (tmp_path / "broken_backend.py").write_text(body, encoding="utf-8")
    kept = overlays.worker_env(None)
    monkeypatch.setattr(overlays, "worker_env", lambda overlay: {**kept, "PYTHONPATH": str(tmp_path)})
    row = Row("x", installed=True)
    doctor._check_import(row, spec(probe=("broken_backend",)), overlays)
    assert not row.importable
    assert says in row.fix
    assert "install parent" in row.fix
    row = Row("x", installed=True)
    doctor._check_import(row, spec(probe=("broken_backend|json",) if "ImportError" in body else ("json",)), overlays)
    assert row.importable, "an alternative is enough"


@pytest.mark.parametrize("fault", ["segfault", "exit", "oom", "corrupt"])
def test_a_worker_that_dies_or_refuses_is_a_no_with_its_reason(overlays: Overlays, fault: str) -> None:
    config = dataclasses.replace(Config(), loader_options={"fault": fault})
    row = check("echo", ECHO, overlays, config)
    assert (row.importable, row.smoke_ok) == (True, False)
    assert row.fix
    assert "\n" not in row.fix


def test_without_a_model_it_says_where_to_put_one(overlays: Overlays, tmp_path: Path) -> None:
    config = dataclasses.replace(Config(), model_dir=tmp_path)
    row = check("x", spec(builtin=(), formats={"exl3": 1}), overlays, config)
    assert not row.smoke_ok
    assert str(tmp_path) in row.fix


def test_a_machine_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_present", lambda: False)
    assert "NVIDIA" in str(device_problem(spec(needs_cuda=True)))
    assert device_problem(spec()) is None
    assert "use another loader" in str(device_problem(spec(platforms=("plan9",))))


def test_what_the_machine_can_not_run_is_neither_imported_nor_to_be_installed(
    overlays: Overlays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "nvidia_present", lambda: False)
    row = check("x", spec(needs_cuda=True, probe=("no_such_module_of_ours",)), overlays, Config())
    assert (row.importable, row.device_ok, row.smoke_ok) == (False, False, False)
    assert row.fix.startswith("needs an NVIDIA GPU") and "install the card's driver" in row.fix


def test_the_smallest_bundled_model_is_tried() -> None:
    model = smoke_model(ECHO, Config())
    assert model is not None
    assert model.id == "echo"


@pytest.mark.parametrize(("loader", "architecture"), [("flexgen", "OPTForCausalLM"), ("transformers", "LlamaForCausalLM")])
def test_a_loader_is_tried_on_a_model_that_it_takes(loader: str, architecture: str) -> None:
    model = smoke_model(discover()[loader], Config())
    assert model is not None and model.bundled and model.architecture == architecture


def report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overlays: Overlays, *names: str
) -> tuple[int, str]:
    monkeypatch.setattr(Overlays, "find", classmethod(lambda cls, root=None: overlays))
    status = run(argparse.Namespace(json=True, loaders=list(names)), Config())
    return status, capsys.readouterr().out


def test_json_has_exactly_these_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overlays: Overlays
) -> None:
    status, out = report(capsys, monkeypatch, overlays, "echo", "exllama")
    rows = json.loads(out)["loaders"]
    assert status == 0
    assert [row["name"] for row in rows] == ["echo", "exllama"]
    assert all(list(row) == KEYS for row in rows)


def test_the_exit_status_says_that_an_installed_loader_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overlays: Overlays
) -> None:
    monkeypatch.setattr(doctor, "check", lambda name, *_: Row(name, True, True, True, False, "it died"))
    assert report(capsys, monkeypatch, overlays, "echo")[0] == 1


def test_an_unknown_loader_is_one_line() -> None:
    with pytest.raises(ConfigError, match="no loader 'ollama'"):
        run(argparse.Namespace(json=True, loaders=["ollama"]), Config())


def test_the_table_reads_well(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {})
    text = table([Row("echo", True, True, True, True), Row("rwkv", fix="install it", note="a note")], Overlays(tmp_path, ROOT))
    lines = text.splitlines()
    assert lines[2].split() == ["loader", "installed", "importable", "device", "ok", "smoke", "ok"]
    assert lines[3].split() == ["echo", "yes", "yes", "yes", "yes"]
    assert "    fix: install it" in lines
    assert "    a note" in lines
