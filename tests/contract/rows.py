"""Which loaders the contract suite runs, on which model. A discovered loader without a row fails the suite."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from modules.convert.unpickle import convert_pickle
from modules.overlays import Overlays
from modules.quantize.process import QuantizeJob, default_out, quantize
from modules.quantize.settings import QuantizeSettings
from modules.ray_engine.client import problem as ray_problem
from modules.registry import discover
from modules.remotes.store import RemoteStore, model_path
from tests.api.conftest import Server
from tests.conftest import ROOT, shared_data

STORY = "Once upon a time"


@dataclass(frozen=True)
class Row:
    """One loader on one model. `model` gives the path, or None with `reason` when it is not here."""

    id: str
    loader: str
    model: Callable[[], Path | str | None]
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    module: str | None = None
    byte_exact: bool = False
    variant: bool = False  # another row of this loader already tries what takes a process of its own
    ray: bool = False  # over a replica on Ray Serve
    lacks: frozenset[str] = frozenset()  # features that this build of the loader's backend does without

    def skip_reason(self, overlays: Overlays) -> str | None:
        """Why this row can't run here, or None."""
        spec = discover()[self.loader]
        missing = overlays.unavailable(spec)
        if missing:
            return f"{spec.title}: {missing}"
        if self.module and not overlays.has_module(spec.overlay, self.module):
            return f"{spec.title}: {self.module} is not in the {spec.overlay} environment"
        if self.ray and (lacking := ray_problem(overlays)):
            return lacking
        if self.model() is None:
            return f"{self.needs} is not here"
        return None


def _stories(name: str) -> Callable[[], Path | None]:
    def find() -> Path | None:
        data = shared_data()
        return None if data is None else data / "models" / "stories260K" / name

    return find


def _bundled(name: str) -> Callable[[], Path | None]:
    path = ROOT / "models" / name
    content = path if path.suffix else path / "config.json"
    return lambda: path if content.is_file() else None


@cache
def _gptq_checkpoint(base: Path, settings: QuantizeSettings) -> Path:
    """A GPTQ checkpoint of `base`, made once in this test session and removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="switchyard-gptq-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    job = QuantizeJob(base, default_out(base, settings, folder), settings, device="cpu", threads=1)
    return asyncio.run(quantize(job, lambda _: None, Overlays.find(ROOT))).path


def _gptq(name: str, **settings: Any) -> Callable[[], Path | None]:
    def make() -> Path | None:
        base = _bundled(name)()
        return None if base is None else _gptq_checkpoint(base, QuantizeSettings(nsamples=8, seqlen=256, **settings))

    return make


@cache
def _tiny_rwkv() -> Path | None:
    """The trained v5.2 of ../shared, out of its pickle by our own converter; removed at the end of the session."""
    data, overlays = shared_data(), Overlays.find(ROOT)
    if data is None or not overlays.complete("transformers"):
        return None
    folder = Path(tempfile.mkdtemp(prefix="switchyard-rwkv-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = data / "models" / "tiny-rwkv" / "converted-tiny-rwkv-5v2-730K.pth"
    out = folder / "tiny-rwkv.safetensors"
    return asyncio.run(convert_pickle(source, lambda _: None, allow_pickle=True, out=out, overlays=overlays)).path


@cache
def _far_server() -> str | None:
    """The bundled GGUF on a Switchyard of its own, saved as a remote server; ended with the session."""
    model = _bundled("wren-6m-gguf/wren-6m-F16.gguf")()
    overlays = Overlays.find(ROOT)
    if model is None or overlays.unavailable(discover()["llamacpp"]):
        return None
    folder = Path(tempfile.mkdtemp(prefix="switchyard-remote-"))
    server = Server(folder / "far", "--loader", "llamacpp", "--threads", "1", model="wren-6m-gguf/wren-6m-F16")

    def end() -> None:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    server.wait_ready()
    store = RemoteStore(folder / "near")
    store.add("far", server.url)
    [name] = [m["id"] for m in server.http.get("/v1/models").json()["data"] if m["state"] == "ready"]
    return model_path(store.path, "far", name)


_STORIES = "the data folder ../shared (stories260K)"
_WREN = "the bundled model"
_WREN_GPTQ = "the bundled GPTQ model"

ROWS = (
    Row("echo", "echo", lambda: "echo", byte_exact=True),
    Row("transformers-wren", "transformers", _bundled("wren-6m"), {"dtype": "float32", "threads": 1}, _WREN),
    Row("transformers-stories", "transformers", _stories("hf"), {"dtype": "float32", "threads": 1}, _STORIES),
    Row(
        "llama_cpp-wren",
        "llamacpp",
        _bundled("wren-6m-gguf/wren-6m-F16.gguf"),
        {"engine": "llama_cpp", "threads": 1},
        _WREN,
        "llama_cpp",
    ),
    Row(
        "llama_cpp-stories",
        "llamacpp",
        _stories("stories260K-f32.gguf"),
        {"engine": "llama_cpp", "threads": 1},
        _STORIES,
        "llama_cpp",
    ),
    Row(
        "xllamacpp-wren",
        "llamacpp",
        _bundled("wren-6m-gguf/wren-6m-F16.gguf"),
        {"engine": "xllamacpp", "threads": 1},
        _WREN,
        "xllamacpp",
    ),
    Row(
        "xllamacpp-stories",
        "llamacpp",
        _stories("stories260K-f32.gguf"),
        {"engine": "xllamacpp", "threads": 1},
        _STORIES,
        "xllamacpp",
    ),
    Row("gptq-wren", "gptq_for_llama", _gptq("wren-6m", bits=4, group_size=128), {"threads": 1}, _WREN),
    Row(
        "gptq-wren-int4",
        "gptq_for_llama",
        _gptq("wren-6m", bits=4, group_size=64, desc_act=True),
        {"kernel": "int4", "threads": 1},
        _WREN,
        variant=True,
    ),
    Row(
        "gptq-wren-3bit",
        "gptq_for_llama",
        _gptq("wren-6m", bits=3, group_size=64, sym=False),
        {"kernel": "int8", "threads": 1},
        _WREN,
        variant=True,
    ),
    Row("autogptq-wren", "autogptq", _bundled("wren-6m-gptq-4bit-128g"), {"threads": 1}, _WREN_GPTQ),
    Row("exllama-wren", "exllama", _bundled("wren-6m-gptq-4bit-128g"), {}, _WREN_GPTQ),
    Row(
        "flexgen-wren",
        "flexgen",
        _bundled("wren-opt-6m"),
        {"threads": 1, "w_percent": "40,30,30", "cache_percent": "0,100,0", "gpu_batch_size": 2, "num_gpu_batches": 4},
        _WREN,
    ),
    Row(
        "xllamacpp_server-stories",
        "llamacpp",
        _stories("stories260K-f32.gguf"),
        {"engine": "xllamacpp_server", "threads": 1},
        _STORIES,
        "xllamacpp",
        lacks=frozenset({"score", "echo", "min_tokens", "all_samplers", "regex", "embeddings", "guidance"}),
    ),
    Row("remote-wren", "remote", _far_server, {}, "llama.cpp with the bundled model, to be the other server"),
    Row("rwkv-wren", "rwkv", _bundled("wren-rwkv-7m"), {"threads": 1}, "the bundled RWKV"),
    Row("rwkv-tiny", "rwkv", _tiny_rwkv, {"threads": 1, "ctx_size": 512}, "the data folder ../shared (tiny-rwkv)", variant=True),
    Row("ray-echo", "echo", lambda: "echo", byte_exact=True, ray=True),
    Row(
        "ray-llama_cpp",
        "llamacpp",
        _bundled("wren-6m-gguf/wren-6m-F16.gguf"),
        {"engine": "llama_cpp", "threads": 1},
        _WREN,
        "llama_cpp",
        variant=True,
        ray=True,
    ),
)
