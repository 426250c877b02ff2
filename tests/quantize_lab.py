"""Experiments with torch for tests/unit/test_quantize_models.py, in the Transformers environment (the tests' own has none):

python tests/quantize_lab.py FOLDER     reads names of experiments, prints one line of JSON for each: {"result"} or {"error"}
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import quantize_faults_lab as faults
import torch
from models_lab import CONTEXT, TEXT, configs, error_of, make_model, quantize, reference, run_checkpoint
from serve_lab import serve

from loaders import _gptq_linear as kernels
from loaders._gptq_tensors import Unpacked
from modules.quantize._gptq import QuantizedLayer, quantize_group, quantize_rtn
from modules.quantize.settings import QuantizeSettings

# --- one layer -------------------------------------------------------------------------------------------------


def quantize_gptq(weight: torch.Tensor, hessian: torch.Tensor, settings: QuantizeSettings) -> QuantizedLayer:
    return quantize_group([weight], hessian, settings)[0]


def layers(folder: Path) -> Any:
    """Relative output error of GPTQ and RTN on inputs that are correlated and of very different sizes."""
    torch.manual_seed(0)
    mixing = torch.randn(256, 256) * torch.logspace(0, -2, 256)
    x = torch.randn(2048, 256) @ mixing * torch.logspace(0.5, -0.5, 256)[torch.randperm(256)]
    weight = torch.randn(256, 64) / 16
    moments = x.T @ x / len(x)
    results = []
    for bits in (2, 3, 4, 8):
        for options in (
            {"group_size": -1},
            {"group_size": 32},
            {"group_size": 128},
            {"group_size": 32, "desc_act": True},
            {"group_size": 32, "desc_act": True, "static_groups": True},
            {"group_size": 64, "static_groups": True},
            {"group_size": 64, "sym": False},
            {"group_size": 256, "sym": False, "mse": True},
        ):
            settings = QuantizeSettings(bits=bits, **options)
            ours = quantize_gptq(weight, moments.clone(), settings)
            plain = quantize_rtn(weight, QuantizeSettings(bits=bits, group_size=settings.group_size, sym=settings.sym))
            off = x @ (plain.weight() - weight)
            rtn_loss = float(off.pow(2).sum() / (x @ weight).pow(2).sum())
            measured = float((x @ (ours.weight() - weight)).pow(2).sum() / (x @ weight).pow(2).sum())
            results.append(
                {
                    "case": f"{bits} bits {options}",
                    "gptq": ours.loss,
                    "measured": measured,
                    "rtn": rtn_loss,
                    "codes": [int(ours.codes.min()), int(ours.codes.max())],
                    "zeros": [int(ours.zeros.min()), int(ours.zeros.max())],
                    "groups": [len(ours.scales), int(ours.g_idx.min()), int(ours.g_idx.max())],
                    "order_is_plain": bool((ours.g_idx == torch.arange(256) // (options["group_size"] % 257)).all()),
                }
            )
    return results


def odd_layers(folder: Path) -> Any:
    """Weights and inputs at the edge: dead inputs, all-zero weights, all-positive asymmetric ones, singular moments, NaN."""
    settings = QuantizeSettings(bits=4, group_size=32)
    x = torch.randn(512, 64)
    x[:, 5] = 0
    weight = torch.randn(64, 32)
    dead = quantize_gptq(weight, x.T @ x / 512, settings)
    zero = quantize_gptq(torch.zeros(64, 32), torch.eye(64), settings)
    positive = quantize_gptq(torch.rand(64, 32) + 0.5, torch.eye(64), QuantizeSettings(bits=4, group_size=32, sym=False))
    one = torch.randn(1, 64)
    singular = quantize_gptq(weight, one.T @ one, settings)
    return {
        "dead": float(dead.weight()[5].abs().max()),
        "zero": float(zero.weight().abs().max()),
        "positive_zeros": [int(positive.zeros.min()), int(positive.zeros.max())],
        "positive_loss": positive.loss,
        "singular": [singular.loss, singular.damp],
        "nan": error_of(lambda: quantize_gptq(weight, torch.full((64, 64), float("nan")), settings)),
        "huge": error_of(lambda: quantize_gptq(weight * 1e7, torch.eye(64), settings)),
    }


# --- kernels ---------------------------------------------------------------------------------------------------


def run_kernels(folder: Path) -> Any:
    """Each kernel's largest error over the largest output, against the product in float64."""
    torch.manual_seed(1)
    results = []
    for bits in (2, 3, 4, 8):
        for group, order in ((32, False), (64, True), (128, False), (256, False)):
            inputs, outputs = 256, 96
            g_idx = torch.arange(inputs) // group
            perm = torch.randperm(inputs) if order else None
            layer = Unpacked(
                torch.randint(0, 1 << bits, (inputs, outputs), dtype=torch.uint8),
                torch.rand(inputs // group, outputs) * 0.02 + 0.001,
                torch.randint(1, 1 << bits, (inputs // group, outputs)).float(),
                bits,
                group,
                None,
                perm,
                torch.randn(outputs),
            )
            exact = layer.weight().double()
            if perm is not None:
                exact[perm] = exact.clone()
            del g_idx
            for rows in (1, 3, 80):
                x = torch.randn(rows, inputs)
                wanted = x.double() @ exact + layer.bias.double()
                for kind in (kernels.DenseLinear, kernels.UnpackLinear, kernels.Int4Linear):
                    if kind is kernels.Int4Linear and kernels.why_not_int4(layer):
                        continue
                    error = float((kind(layer)(x).double() - wanted).abs().max() / wanted.abs().max())
                    results.append({"kernel": kind.kernel, "bits": bits, "rows": rows, "order": order, "error": error})
    return {"int4": kernels.int4_works(), "results": results}


def triton(folder: Path) -> Any:
    """The CUDA kernel's errors in Triton's interpreter, on the CPU; None without Triton."""
    import importlib.util
    import os

    if importlib.util.find_spec("triton") is None:
        return None
    os.environ["TRITON_INTERPRET"] = "1"
    from loaders._gptq_triton import TritonLinear

    errors = {}
    for bits in (2, 4, 8):
        for group, order in ((32, False), (64, True), (128, False)):
            layer = Unpacked(
                torch.randint(0, 1 << bits, (256, 96), dtype=torch.uint8),
                torch.rand(256 // group, 96) * 0.01,
                torch.randint(1, 1 << bits, (256 // group, 96)).float(),
                bits,
                group,
                None,
                torch.randperm(256) if order else None,
                torch.randn(96),
            )
            for rows in (1, 70):
                x = torch.randn(rows, 256)
                wanted = kernels.DenseLinear(layer)(x)
                kernel = TritonLinear(layer)
                error = float((kernel(x) - wanted).abs().max() / wanted.abs().max())
                errors[f"{bits} bits, group {group}, {rows} rows"] = [error, kernel._fallback is None]
    return errors


# --- whole models ----------------------------------------------------------------------------------------------


def architectures(folder: Path) -> Any:
    """Quantise every architecture; logits of our kernels against the dequantised reference."""
    results = {}
    ids = torch.arange(40)[None] * 7 % 250
    for number, (name, config) in enumerate(configs().items()):
        base = folder / name
        make_model(base, config)
        out = folder / f"{name}-gptq"
        done = quantize(base, out, bits=4, group_size=32, desc_act=number % 2 == 1)
        with torch.inference_mode():
            wanted = reference(base, out)(ids).logits
            scale = float(wanted.std())
            errors = {}
            for kernel in ("dense", "unpack", "int4"):
                got = run_checkpoint(out, kernel).model(ids).logits
                errors[kernel] = float((got - wanted).abs().max()) / scale
        results[name] = {
            "layers": done["layers"],
            "order": [e["layer"] for e in done["events"] if e.get("block") == 1],
            "errors": errors,
        }
    return results


def variants(folder: Path) -> Any:
    """Every width and layout option on one architecture, through files and back."""
    base = folder / "variants"
    make_model(base, configs()["llama"])
    ids = torch.arange(40)[None] * 7 % 250
    results = {}
    for bits in (2, 3, 4, 8):
        for label, options in {
            "column": {"group_size": -1},
            "group": {"group_size": 32, "sym": False},
            "order": {"group_size": 32, "desc_act": True},
            "static": {"group_size": 64, "desc_act": True, "static_groups": True, "true_sequential": False},
            "rtn": {"group_size": 64, "method": "rtn"},
        }.items():
            out = folder / f"variants-{bits}-{label}"
            quantize(base, out, bits=bits, **options)
            with torch.inference_mode():
                wanted = reference(base, out)(ids).logits
                got = run_checkpoint(out, "unpack").model(ids).logits
            results[f"{bits} {label}"] = float((got - wanted).abs().max() / wanted.std())
    return results


# --- a trained model -------------------------------------------------------------------------------------------


def perplexity(model: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        rows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        logits = model(rows).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))
    return float(loss.exp())


def trained(folder: Path) -> Any:
    """Perplexity on held-out text of a small model, trained here for some seconds on bytes, and of its quantisations."""
    import transformers

    base = folder / "trained"
    model = make_model(base, configs()["llama"])
    names = transformers.AutoTokenizer.from_pretrained(base)
    ids = torch.tensor(names(TEXT[:200_000])["input_ids"])
    train, held_out = ids[:-8192], ids[-8192:]
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    steps = 150
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(train) - 64, (16,)).tolist()
        rows = torch.stack([train[start : start + 64] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(base)
    results = {"fp": perplexity(model, held_out)}
    for bits in (8, 4, 3):
        for method in ("gptq", "rtn"):
            out = folder / f"trained-{method}-{bits}"
            quantize(base, out, bits=bits, group_size=32, method=method, nsamples=64, seqlen=CONTEXT)
            results[f"{method}{bits}"] = perplexity(run_checkpoint(out, "dense").model, held_out)
    checkpoint = folder / "trained-gptq-4"
    results["int4 kernel"] = perplexity(run_checkpoint(checkpoint, "int4").model, held_out)
    results["greedy"] = greedy(reference(base, checkpoint), checkpoint)
    return results


def greedy(judge: Any, checkpoint: Path) -> dict[str, list[bool]]:
    """Whether each kernel's greedy tokens are the reference's, by transformers' own generate(); one per prompt."""
    from loaders.gptq_for_llama import SPEC, GptqEngine
    from modules.engine import CancelToken
    from modules.schema import GenerationRequest, StopParams, TokenEvent

    prompts = ("Once upon a time", "user\nWhat is", "The dog was", "Tom and his")
    same: dict[str, list[bool]] = {}
    for kernel in ("dense", "unpack", "int4"):
        engine = GptqEngine()
        engine.load(str(checkpoint), {o.name: o.default for o in SPEC.options} | {"kernel": kernel}, lambda _: None)
        for prompt in prompts:
            ids = engine.encode(prompt, add_special=False)
            with torch.inference_mode():
                wanted = judge.generate(
                    torch.tensor([ids]), max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=2
                )[0, len(ids) :].tolist()
            request = GenerationRequest(
                "r", token_ids=tuple(ids), sampling={"temperature": 0.0}, stop=StopParams(40, min_tokens=40, ignore_eos=True)
            )
            events = [e for e in engine.generate(request, CancelToken()) if isinstance(e, TokenEvent)]
            same.setdefault(kernel, []).append([i for e in events for i in e.token_ids] == wanted)
    return same


EXPERIMENTS = {
    "layers": layers,
    "odd_layers": odd_layers,
    "kernels": run_kernels,
    "triton": triton,
    "architectures": architectures,
    "variants": variants,
    "interrupted": faults.interrupted,
    "out_of_memory": faults.out_of_memory,
    "full_disk": faults.full_disk,
    "bad_input": faults.bad_input,
    "damaged": faults.damaged,
    "trained": trained,
}

if __name__ == "__main__":
    serve(EXPERIMENTS, *sys.argv[1:])
