"""What needs no Ray of `--engine ray`: its flags, its routing's memory, its look at the nodes, its plain words for failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modules.command_line import parse
from modules.errors import BackendUnavailable, ConfigError, IncompatibleModel, ModelNotFound
from modules.overlays import Overlays
from modules.ray_engine.client import RayEngine
from modules.ray_engine.nodes import judge, look
from modules.ray_engine.reach import explain_connect
from modules.ray_engine.routing import Loads, Prefixes
from modules.ray_engine.settings import RaySettings, parse_replicas
from modules.registry import load_spec
from tests.conftest import ROOT

# --- flags ----------------------------------------------------------------------------------------------------


def settings(*flags: str, root: Path) -> RaySettings:
    return RaySettings.of(parse(["--engine", "ray", *flags], {}, root))


def test_flags(tmp_path: Path) -> None:
    assert settings(root=tmp_path) == RaySettings(None, 1, 1, 1.0, 0.0, "prefix")
    given = settings("--ray-replicas", "1:4", "--ray-gpus", "0.5", "--ray-address", "10.0.0.5:6379", root=tmp_path)
    assert given == RaySettings("10.0.0.5:6379", 1, 4, 1.0, 0.5, "prefix")
    assert RaySettings.from_json(given.to_json()) == given


@pytest.mark.parametrize(("text", "bounds"), [("1", (1, 1)), ("3", (3, 3)), ("1:4", (1, 4)), (" 2 : 2 ", (2, 2))])
def test_replicas(text: str, bounds: tuple[int, int]) -> None:
    assert parse_replicas(text) == bounds


@pytest.mark.parametrize("text", ["", "0", "4:1", "0:2", "-1", "a", "1:2:3", "1.5", "1001"])
def test_bad_replicas(text: str) -> None:
    with pytest.raises(ConfigError, match="--ray-replicas") as caught:
        parse_replicas(text)
    assert "1:4" in caught.value.hint


@pytest.mark.parametrize(
    "flags",
    [
        ("--ray-address", "nowhere"),
        ("--ray-address", "http://head:6379"),
        ("--ray-gpus", "-1"),
        ("--ray-gpus", "1.5"),
        ("--ray-cpus", "-0.5"),
    ],
)
def test_bad_flags(flags: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ray-"):
        settings(*flags, root=tmp_path)


def test_ray_flags_are_for_ray(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ray-replicas is for --engine ray"):
        parse(["--ray-replicas", "2"], {}, tmp_path)


async def test_without_ray_the_start_says_how_to_get_it(tmp_path: Path) -> None:
    engine = RayEngine(RaySettings(), Overlays(tmp_path / "set", ROOT), tmp_path)
    with pytest.raises(BackendUnavailable, match="Ray") as caught:
        await engine.start(load_spec("echo"))
    assert "install ray" in caught.value.hint or "--engine local" in caught.value.hint
    await engine.close()


# --- routing ------------------------------------------------------------------------------------------------------


def test_loads_count_what_runs_where() -> None:
    loads = Loads()
    loads.add("r1", "a")
    loads.add("r2", "a")
    loads.add("r3", "b")
    assert (loads.on("a"), loads.on("b"), loads.on("c")) == (2, 1, 0)
    loads.add("r2", "b")  # routed again: its first choice was not there any more
    assert (loads.on("a"), loads.on("b")) == (1, 2)
    loads.remove("r3")
    loads.remove("never there")
    assert (loads.on("a"), loads.on("b")) == (1, 1)


@pytest.mark.parametrize("field", ["prompt", "token_ids"])
def test_the_longest_beginning_decides(field: str) -> None:
    def request(*parts: int) -> dict[str, Any]:
        whole = [n for part in parts for n in [part] * 512]
        return {field: whole if field == "token_ids" else "".join(map(chr, whole))}

    prefixes = Prefixes()
    keys = {name: prefixes.keys(request(*parts)) for name, parts in {"short": (65,), "one": (65, 66), "two": (65, 67)}.items()}
    assert len(keys["short"]) < len(keys["one"]) == len(keys["two"])
    prefixes.remember(keys["one"], "a")
    prefixes.remember(keys["two"], "b")
    assert prefixes.best(keys["one"], {"a", "b"}) == "a"
    assert prefixes.best(prefixes.keys(request(65, 67, 68)), {"a", "b"}) == "b", "a longer prompt goes where its beginning is"
    assert prefixes.best(keys["two"], {"a"}) is None, "a replica without a free slot is no choice"
    assert prefixes.best(prefixes.keys(request(70)), {"a", "b"}) is None
    assert prefixes.keys({"prompt": "too short for a block"}) == []


def test_old_beginnings_are_forgotten() -> None:
    prefixes = Prefixes(remembered=2)
    for key, replica in ((1, "a"), (2, "b"), (3, "c")):
        prefixes.remember([key], replica)
    assert prefixes.best([1], {"a"}) is None and prefixes.best([3], {"c"}) == "c"


# --- nodes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "part" / "weights.bin").write_bytes(b"w" * 3_000_000)
    return folder


def test_look_tells_models_apart(model: Path) -> None:
    first = look(str(ROOT), None, str(model))
    assert first["bytes"] == 3_000_002 and first["python"] and first["code"]
    assert look(str(ROOT), None, str(model)) == first
    (model / "part" / "weights.bin").write_bytes(b"w" * 2_999_999 + b"x")
    assert look(str(ROOT), None, str(model))["model"] != first["model"]
    (model / "part" / "weights.bin").unlink()
    assert look(str(ROOT), None, str(model))["bytes"] == 2
    nothing = look(str(model), "/no/python", str(model / "gone"))
    assert nothing == {"code": None, "python": False, "model": None, "bytes": 0}


@pytest.mark.parametrize(
    ("there", "error", "words"),
    [
        ({"model": None, "bytes": 0}, ModelNotFound, r"not at /m on 1 of 2 nodes \(10\.0\.0\.2\)"),
        ({"model": "other", "bytes": 7}, IncompatibleModel, r"7 bytes there, 3,000,002 bytes here"),
        ({"code": "older"}, BackendUnavailable, r"another version in /s on 1 of 2 nodes"),
        ({"code": None}, BackendUnavailable, r"missing or of another version"),
        ({"python": False}, BackendUnavailable, r"environment llamacpp is not installed on 1 of 2"),
    ],
)
def test_what_a_node_lacks_is_named(there: dict[str, Any], error: type[Exception], words: str) -> None:
    here = {"code": "c", "python": True, "model": "m", "bytes": 3_000_002}
    judge(here, {"10.0.0.1": here, "10.0.0.2": here}, "/s", "llamacpp", "/m")
    with pytest.raises(error, match=words) as caught:
        judge(here, {"10.0.0.1": here, "10.0.0.2": here | there}, "/s", "llamacpp", "/m")
    assert caught.value.hint  # type: ignore[attr-defined]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_cluster_of_another_version() -> None:
    """In the words of Ray 2.60."""
    words = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.9.18\nThis process was started with:\n"
    )
    error = explain_connect("h:1", RuntimeError(words + "    Ray: 2.60.0\n    Python: 3.11.7\n"))
    assert error.message == "The cluster at h:1 runs Ray 2.9.0 on Python 3.9.18; here is Ray 2.60.0 on Python 3.11.7."
    assert "nodes" in error.hint


def test_a_cluster_that_wants_a_token() -> None:
    error = explain_connect("h:1", RuntimeError("Unauthenticated: InvalidAuthToken: missing auth token"))
    assert "asks for a token" in error.message and "RAY_AUTH_TOKEN" in error.hint


def test_any_other_failure_keeps_its_words() -> None:
    error = explain_connect("h:1", RuntimeError("something\n  else"))
    assert "h:1" in error.message and "something else" in error.message and error.hint
