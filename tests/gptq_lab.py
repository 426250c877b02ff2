"""Experiments on the GPTQ runtime, run in the Transformers environment by tests/unit/test_loader_gptq.py.

Reads names of experiments from stdin, answers one JSON line for each.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import models_lab  # noqa: E402
import torch  # noqa: E402
from serve_lab import serve  # noqa: E402

from loaders import _gptq_build, _gptq_choose, _gptq_cpu, _gptq_decoder, _gptq_load  # noqa: E402
from loaders._gptq_linear import GptqLinear  # noqa: E402
from loaders._gptq_tensors import Unpacked  # noqa: E402
from modules.errors import AppError  # noqa: E402
from modules.llamacpp_build import Compiler  # noqa: E402
from modules.quantize._packing import pack_rows, pack_zeros  # noqa: E402

SHAPES = {  # inputs, outputs, group size, what is special
    "plain": (256, 64, 128, {}),
    "asymmetric": (256, 40, 32, {"zeros": "whole"}),
    "one group, float zeros": (96, 20, 96, {"zeros": "float"}),
    "groups that fill no block": (200, 33, 48, {"zeros": "whole", "order": True}),
    "uneven groups": (256, 64, 64, {"uneven": True, "order": True}),
    "inputs that fill no block": (100, 17, 100, {}),
}


def layer(
    inputs: int, outputs: int, bits: int, group: int, zeros: str = "", order: bool = False, uneven: bool = False
) -> Unpacked:
    groups = -(-inputs // group)
    grid = torch.full((groups, outputs), float(1 << (bits - 1)))
    if zeros:
        grid = torch.randint(0, 1 << bits, (groups, outputs)).float() + (0.37 if zeros == "float" else 0)
    return Unpacked(
        torch.randint(0, 1 << bits, (inputs, outputs), dtype=torch.uint8),
        (torch.rand(groups, outputs) * 0.01 + 0.001).half().float(),
        grid,
        bits,
        group,
        torch.randint(0, groups, (inputs,)).sort().values if uneven else None,
        torch.randperm(inputs) if order else None,
        torch.randn(outputs),
    )


def wanted_of(item: Unpacked, x: torch.Tensor) -> torch.Tensor:
    assert item.bias is not None
    rows = x if item.perm is None else x[:, item.perm]
    return rows.double() @ item.weight().double() + item.bias.double()


def products(folder: Path) -> Any:
    """Largest error over the largest output for every width, shape, way and number of rows; None without a compiler."""
    if _gptq_build.kernel().library is None:
        return None
    torch.manual_seed(0)
    errors = {}
    for bits in (2, 3, 4, 8):
        for name, (inputs, outputs, group, special) in SHAPES.items():
            item = layer(inputs, outputs, bits, group, **special)
            for exact in (True, False):
                module = _gptq_cpu.PackedLinear(item, exact)
                worst = 0.0
                for rows in (1, 7, 67):
                    x = torch.randn(rows, inputs)
                    wanted = wanted_of(item, x)
                    worst = max(worst, float((module(x) - wanted).abs().max() / wanted.abs().max()))
                errors[f"{bits} bits, {name}, {module.kernel}"] = worst
    return errors


def saturated(folder: Path) -> Any:
    """The largest codes with the largest activations: sums of 16 bits must not overflow."""
    if _gptq_build.kernel().library is None:
        return None
    errors = {}
    for bits in (2, 3, 4, 8):
        for code in (0, (1 << bits) - 1):
            item = layer(256, 16, bits, 128)
            item.codes.fill_(code)
            module = _gptq_cpu.PackedLinear(item)
            x = torch.ones(5, 256) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None]
            wanted = wanted_of(item, x)
            errors[f"{bits} bits, all {code}"] = float((module(x) - wanted).abs().max() / wanted.abs().max())
    return errors


def trial(folder: Path) -> Any:
    """What `_gptq_check` says of a sound library, of one for any processor, and of a broken one. None without a compiler."""
    compiler = _gptq_build.find_compiler()
    if compiler is None:
        return None
    text = (_gptq_build.ROOT / "loaders" / "_gptq_kernel.c").read_text(encoding="utf-8")
    shutil.copy(_gptq_build.ROOT / "loaders" / "_gptq_kernel.h", folder)
    codes = {}
    for name, source in {"portable": text, "broken": text.replace("0x0f0f0f0fu", "0x0e0e0e0eu")}.items():
        (folder / f"{name}.c").write_text(source, encoding="utf-8")
        made = folder / f"{name}.so"
        flags = [flag for flag in _gptq_build._FLAGS if flag != "-O3"]
        source_path = str(folder / f"{name}.c")
        subprocess.run([compiler.path, *flags, "-O1", "-x", "c", source_path, "-x", "none", "-o", str(made), "-lm"], check=True)
        check = [sys.executable, "-m", "loaders._gptq_check", str(made)]
        done = subprocess.run(check, cwd=_gptq_build.ROOT, capture_output=True, text=True, check=False)
        codes[name] = [done.returncode, done.stdout.strip()]
    return codes


def no_kernel(folder: Path) -> Any:
    """What is chosen, and said, without a compiler, with one that fails, and with one whose library crashes."""
    found = {}
    liar = folder / "cc"
    liar.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho no library > "$2"\n', encoding="utf-8")
    liar.chmod(0o755)
    layouts = {"x": _gptq_load.LayerLayout("x", 4, 8192, 16384, 64, "v1", False, False)}
    for name, compiler in {"none": None, "fails": Compiler("false"), "lies": Compiler(str(liar))}.items():
        for path in (folder / "kernels").glob("*"):
            path.unlink()
        with (
            _swapped(_gptq_build, "find_compiler", lambda *_, compiler=compiler: compiler),
            _swapped(_gptq_build, "_folders", lambda: [folder / "kernels"]),
            _swapped(_gptq_build, "_found", []),
        ):
            built = _gptq_build.kernel()
            picked = {}
            for wanted in ("auto", "int8", "exact"):
                chooser = _gptq_choose.Chooser(wanted, torch.device("cpu"), layouts)
                picked[wanted] = chooser.wanted
        found[name] = {"problem": built.problem, "picked": picked, "said": list(chooser.reasons)}
    found["left"] = sorted(path.name for path in (folder / "kernels").glob("*"))
    return found


class _swapped:
    """Another value for a module's attribute for a while."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value

    def __enter__(self) -> None:
        self.old = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.old)


def families(folder: Path) -> Any:
    """Logits of the compiled kernels against the dequantised reference, for every architecture; who runs the blocks."""
    results = {}
    ids = torch.arange(40)[None] * 7 % 250
    for number, (name, config) in enumerate(models_lab.configs().items()):
        base, out = folder / name, folder / f"{name}-gptq"
        models_lab.make_model(base, config)
        models_lab.quantize(base, out, bits=4, group_size=32, method="rtn", desc_act=False, sym=number % 2 == 0)
        with torch.inference_mode():
            wanted = models_lab.reference(base, out)(ids).logits
            row: dict[str, Any] = {}
            for kernel in ("exact", "int8"):
                model = models_lab.run_checkpoint(out, kernel).model
                kinds = sorted({module.kernel for module in model.modules() if isinstance(module, GptqLinear)})
                error = float((model(ids).logits - wanted).abs().max() / wanted.std())
                problem = _gptq_decoder.match(model)
                off = None if problem else _gptq_decoder.disagreement(model, 64)
                row[kernel] = {"kernels": kinds, "error": error, "problem": problem, "off": off}
        results[name] = row
    return results


def decoder(folder: Path) -> Any:
    """The C decoder's greedy ids against a plain loop over the model; its cache cut back, grown, put aside; scores."""
    from loaders._gptq_decoder import Decoder, DecoderRunner, make_runner
    from loaders._hf_generate import HfRunner

    config = models_lab.configs()["llama"]
    config.max_position_embeddings = 700
    base, out = folder / "llama", folder / "llama-gptq"
    models_lab.make_model(base, config)
    models_lab.quantize(base, out, bits=3, group_size=32, method="rtn")
    loaded = models_lab.run_checkpoint(out, "exact")
    runner = make_runner(loaded, 512)
    plain = HfRunner(loaded, 512)
    ids = [i * 7 % 250 for i in range(400)]
    with torch.inference_mode():
        one = Decoder(loaded.model, 700)
        at_once = one.step(ids, 400)
        one.crop(0)
        pieces = torch.cat([one.step(ids[:1], 1), one.step(ids[1:6], 5), one.step(ids[6:300], 294), one.step(ids[300:], 100)])
        capacity = one._c.capacity
        one.crop(50)
        again = one.step(ids[50:60], 10)
        theirs = loaded.model(torch.tensor([ids])).logits[0]
        shared = runner._prefix.reuse(ids)
        runner._step(ids, 1)
        kept = runner._prefix.reuse([*ids[:390], 3, 4])
    scale = float(theirs.abs().max())
    scores = [a - b for a, b in zip(runner.score(ids), plain.score(ids), strict=True)]
    return {
        "used": isinstance(runner, DecoderRunner) and "blocks run in C" in runner.info.engine,
        "at once": float((at_once - theirs).abs().max()) / scale,
        "pieces": float((pieces - theirs).abs().max()) / scale,
        "again": float((again - theirs[50:60]).abs().max()) / scale,
        "capacity": capacity,
        "shared": shared,
        "kept": kept,
        "scores": max(map(abs, scores)),
        "beside": max(abs(a - b) for a, b in zip(runner._score_beside(ids[:40]), plain.score(ids[:40]), strict=True)),
        "left alone": len(runner._prefix.ids),
    }


def from_tensors(folder: Path) -> Any:
    """`linear_from_tensors` on the tensors of a file: both zero conventions, act-order, no g_idx; and what it refuses."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (128, 32), dtype=torch.uint8)
    scales = (torch.rand(4, 32) * 0.01 + 0.001).half()
    zeros = torch.randint(1, 16, (4, 32), dtype=torch.uint8)
    qweight = torch.from_numpy(pack_rows(codes.numpy(), 4))
    x, bias = torch.randn(3, 128), torch.randn(32)
    errors = {}
    for version in ("v1", "v2"):
        qzeros = torch.from_numpy(pack_zeros(zeros.numpy(), 4, v1=version == "v1"))
        for order in (None, torch.arange(128, dtype=torch.int32) // 32, torch.randperm(128).int() // 32):
            index = torch.arange(128) // 32 if order is None else order.long()
            wanted = x @ ((codes.float() - zeros.float()[index]) * scales.float()[index]) + bias
            for kernel in ("auto", "int8"):
                new = _gptq_choose.linear_from_tensors(
                    qweight, qzeros, scales, order, bits=4, group_size=32, bias=bias, zeros=version, kernel=kernel
                )
                label = "none" if order is None else "act" if bool((order.diff() < 0).any()) else "plain"
                errors[f"{version} {label} {kernel}"] = float((new(x) - wanted).abs().max() / wanted.abs().max())
    bad = {}
    for name, change in {
        "bits": {"bits": 5},
        "groups": {"group_size": 64},
        "nan": {"scales": torch.full_like(scales, float("nan"))},
        "g_idx": {"g_idx": torch.full((128,), 9)},
    }.items():
        arguments = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": None, "bits": 4, "group_size": 32} | change
        try:
            _gptq_choose.linear_from_tensors(**arguments)
        except AppError as error:
            bad[name] = error.code
    return {"errors": errors, "bad": bad}


EXPERIMENTS = {item.__name__: item for item in (products, saturated, trial, no_kernel, families, decoder, from_tensors)}

if __name__ == "__main__":
    serve(EXPERIMENTS, sys.argv[1])
