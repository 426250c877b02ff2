"""Experiments of tests/quantize_lab.py with runs that are broken off, refused models and damaged checkpoints."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from models_lab import configs, error_of, make_model, quantize, run_checkpoint, settings_for

from modules.quantize import _job
from modules.quantize._failures import typed


def interrupted(folder: Path) -> Any:
    """A run that dies in block 2 and is started again ends with the same bytes as one that was left alone."""
    base = folder / "interrupted"
    make_model(base, configs()["llama"])
    whole, resumed = folder / "whole", folder / "resumed"
    quantize(base, whole)

    def die(event: dict[str, Any]) -> None:
        if event.get("block") == 2:
            raise KeyboardInterrupt

    settings = settings_for(base)
    with contextlib.suppress(KeyboardInterrupt):
        _job.run(_job.Job(base, resumed, settings), die)
    visible = resumed.exists()
    work = sorted(path.name for path in folder.glob(".resumed.part/*"))
    again = quantize(base, resumed)
    other = _job.Job(base, folder / "other", settings)
    with contextlib.suppress(KeyboardInterrupt):
        _job.run(other, die)
    changed = quantize(base, folder / "other", bits=8)
    return {
        "visible": visible,
        "work": work,
        "same": (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes(),
        "notes": [e["note"] for e in again["events"] if "note" in e],
        "fresh_layers": sum("layer" in e for e in again["events"]),
        "left": sorted(path.name for path in folder.glob(".*.part")),
        "changed": [e["note"] for e in changed["events"] if "note" in e],
    }


def out_of_memory(folder: Path) -> Any:
    """The memory really runs out in a layer of block 2; then there is enough again. None where no limit can be set."""
    if sys.platform != "linux":
        return None
    import ctypes
    import resource

    from transformers import LlamaConfig

    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    taken: list[int] = []
    base = folder / "wide"
    make_model(base, LlamaConfig(**configs()["llama"].to_dict() | {"intermediate_size": 3072}))
    unlimited = resource.getrlimit(resource.RLIMIT_AS)

    def tighten(event: dict[str, Any]) -> None:
        if event.get("block") == 2 and event["layer"].endswith("o_proj"):
            used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used, unlimited[1]))
            while free := libc.malloc(16 << 20):  # what the heap holds free counts as used already, and would do
                taken.append(free)
            resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), unlimited[1]))  # down_proj's Hessian: 36 MiB

    def run(out: str) -> None:
        try:
            _job.run(_job.Job(base, folder / out, settings_for(base)), tighten)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
            while taken:
                libc.free(taken.pop())

    return _broken_off(folder, base, run)


def full_disk(folder: Path) -> Any:
    """The disk fills up while block 2 is written, and while the checkpoint is put together."""
    import errno

    from modules.quantize import _checkpoint

    base = folder / "full"
    make_model(base, configs()["llama"])
    sync = _checkpoint.os.fsync

    def run_until(writes: int) -> Any:
        def run(out: str) -> None:
            left = [writes]

            def fsync(descriptor: int) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                sync(descriptor)

            _checkpoint.os.fsync = fsync
            try:
                _job.run(_job.Job(base, folder / out, settings_for(base)), lambda event: None)
            finally:
                _checkpoint.os.fsync = sync

        return run

    # synced are: the state, two blocks with their losses, the weights, three configurations
    return {f"after {writes} files": _broken_off(folder, base, run_until(writes)) for writes in (2, 3, 5, 7)}


def _broken_off(folder: Path, base: Path, run: Any) -> dict[str, Any]:
    """What a run that fails says and leaves, and whether the next one ends with the bytes of one that was left alone."""
    whole = folder / "whole"
    if not whole.exists():
        quantize(base, whole)
    name = f"broken-{len(list(folder.iterdir()))}"
    try:
        run(name)
    except Exception as error:
        said = typed(error)
    else:
        return {"code": "none", "message": "the run ended well"}
    visible = (folder / name).exists()
    partial = sorted(path.name for path in (folder / f".{name}.part").rglob("*.tmp"))
    again = quantize(base, folder / name)
    same = all(
        (whole / file).read_bytes() == (folder / name / file).read_bytes() for file in ("model.safetensors", "config.json")
    )
    fresh = sum("layer" in event for event in again["events"])
    return {"code": said.code, "hint": said.hint, "visible": visible, "partial": partial, "same": same, "fresh": fresh}


def bad_input(folder: Path) -> Any:
    """Refusals: each a code and a message."""
    from transformers import LlamaConfig

    base = folder / "bad"
    make_model(base, configs()["llama"])
    odd = folder / "odd-ffn"
    make_model(odd, LlamaConfig(**configs()["llama"].to_dict() | {"intermediate_size": 172}))
    short = folder / "short.txt"
    short.write_text("too short", encoding="utf-8")
    nan = folder / "nan"
    model = make_model(nan, configs()["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(nan)
    cut = folder / "cut"
    shutil.copytree(base, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    quantize(base, folder / "good")

    def no_room() -> None:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
        try:
            quantize(base, folder / "o9")
        finally:
            shutil.disk_usage = usage

    return {
        "ffn": error_of(lambda: quantize(odd, folder / "o1")),
        "group": error_of(lambda: quantize(base, folder / "o2", group_size=256)),
        "bits": error_of(lambda: quantize(base, folder / "o3", bits=5)),
        "short": error_of(lambda: quantize(base, folder / "o4", calibration=str(short))),
        "missing text": error_of(lambda: quantize(base, folder / "o5", calibration=str(folder / "nowhere.txt"))),
        "nan": error_of(lambda: quantize(nan, folder / "o6")),
        "cut": error_of(lambda: quantize(cut, folder / "o7")),
        "twice": error_of(lambda: quantize(base, folder / "good")),
        "quantised": error_of(lambda: quantize(folder / "good", folder / "o8")),
        "no room": error_of(no_room),
        "made": sorted(path.name for path in folder.glob("o?")),
    }


def damaged(folder: Path) -> Any:
    """What the runtime says to broken checkpoints, and how it reads the older layouts."""
    from safetensors.torch import load_file, save_file

    base = folder / "damaged"
    make_model(base, configs()["llama"])
    good = folder / "damaged-gptq"
    quantize(base, good, bits=4, group_size=32)
    tensors = load_file(good / "model.safetensors")
    stem = "model.layers.1.mlp.up_proj"
    ids = torch.arange(40)[None] * 7 % 250

    def variant(name: str, change: Any, config: Any = None) -> Path:
        target = folder / f"variant-{name}"
        shutil.copytree(good, target)
        changed = {k: v.clone() for k, v in tensors.items()}
        change(changed)
        save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
        for file in ("config.json", "quantize_config.json"):
            content = json.loads((target / file).read_text(encoding="utf-8"))
            settings = content["quantization_config"] if file == "config.json" else content
            if config == "drop":
                content.pop("quantization_config", None)
            elif config:
                settings.update(config)
            (target / file).write_text(json.dumps(content), encoding="utf-8")
        if config == "drop":
            (target / "quantize_config.json").unlink()
        return target

    def nothing(changed: Any) -> None:
        pass

    def without(suffix: str) -> Any:
        def change(changed: Any) -> None:
            for key in [k for k in changed if k.endswith(suffix)]:
                del changed[key]

        return change

    def to_v2(changed: Any) -> None:
        for key in [k for k in changed if k.endswith("qzeros")]:
            changed[key] += 0x11111111

    def put(key: str, value: Any) -> Any:
        return lambda changed: changed.__setitem__(key, value)

    with torch.inference_mode():
        wanted = run_checkpoint(good, "dense").model(ids).logits

        def same(path: Path) -> bool:
            return torch.equal(run_checkpoint(path, "dense").model(ids).logits, wanted)

        reads = {
            "v2": same(variant("v2", to_v2, {"checkpoint_format": "gptq_v2"})),
            "no settings": same(variant("plain", nothing, "drop")),
            "no g_idx": same(variant("noidx", without("g_idx"))),
            "no g_idx, no settings": same(variant("bare", without("g_idx"), "drop")),
            "one file": same(good / "model.safetensors"),
        }
        column = folder / "damaged-column"
        quantize(base, column, bits=4, group_size=-1)
        kept = load_file(column / "model.safetensors")
        wanted = run_checkpoint(column, "dense").model(ids).logits
        for key in [k for k in kept if k.endswith(".qzeros")]:
            name = key.removesuffix(".qzeros")
            scales = kept.pop(f"{name}.scales").float().T.contiguous()
            del kept[key], kept[f"{name}.g_idx"]
            kept |= {f"{name}.scales": scales, f"{name}.zeros": scales * 8}
        oldest = folder / "variant-oldest"
        shutil.copytree(column, oldest)
        save_file(kept, oldest / "model.safetensors", metadata={"format": "pt"})
        close = run_checkpoint(oldest, "dense").model(ids).logits
        reads["float zeros"] = bool((close - wanted).abs().max() < 1e-4 * wanted.std())
    scales = tensors[f"{stem}.scales"].clone()
    scales[0, 0] = float("nan")
    order = tensors[f"{stem}.g_idx"].clone()
    order[3] = 99
    cut = variant("cut", nothing)
    (cut / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-10])
    pickle = folder / "llama-7b-4bit.pt"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    bad = {
        "nan scales": variant("nan", put(f"{stem}.scales", scales)),
        "no scales": variant("noscales", without(f"{stem}.scales")),
        "no qzeros": variant("nozeros", without(f"{stem}.qzeros")),
        "no norm": variant("nonorm", without("layers.0.input_layernorm.weight")),
        "bad g_idx": variant("badidx", put(f"{stem}.g_idx", order)),
        "short qweight": variant("short", put(f"{stem}.qweight", tensors[f"{stem}.qweight"][:-1].contiguous())),
        "wrong zeros": variant("wrong", to_v2),
        "marlin": variant("marlin", nothing, {"checkpoint_format": "marlin"}),
        "foreign layer": variant(
            "foreign", lambda c: c.update({k.replace("up_proj", "in_proj"): v.clone() for k, v in c.items()})
        ),
        "cut": cut,
        "pickle": pickle,
    }
    return {
        "reads": reads,
        "bad": {name: error_of(lambda path=path: run_checkpoint(path, "dense")) for name, path in bad.items()},
    }
