"""Experiments with torch for tests/unit/test_quantize_models.py, in the Transformers environment (the tests' own has none):

python tests/quantize_lab.py FOLDER     reads names of experiments, prints one line of JSON for each: {"result"} or {"error"}
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loaders import _gptq_linear as kernels  # noqa: E402
from loaders._gptq_tensors import Unpacked  # noqa: E402
from modules.errors import AppError  # noqa: E402
from modules.quantize import _job  # noqa: E402
from modules.quantize._failures import typed  # noqa: E402
from modules.quantize._gptq import quantize_gptq, quantize_rtn  # noqa: E402
from modules.quantize.settings import QuantizeSettings  # noqa: E402

TEXT = (ROOT / "modules" / "quantize" / "calibration.txt").read_text(encoding="utf-8")
CONTEXT = 128


# --- one layer -------------------------------------------------------------------------------------------------


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
        "nan": _error(lambda: quantize_gptq(weight, torch.full((64, 64), float("nan")), settings)),
        "huge": _error(lambda: quantize_gptq(weight * 1e7, torch.eye(64), settings)),
    }


def _error(call: Any) -> list[str]:
    try:
        call()
    except AppError as error:
        return [error.code, str(error)]
    return ["none", ""]


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


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def configs() -> dict[str, Any]:
    from transformers import BloomConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

    common = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    llama = common | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    return {
        "llama": LlamaConfig(**llama),
        "mistral": MistralConfig(**llama),
        "qwen2": Qwen2Config(**llama, tie_word_embeddings=True),
        "gpt_neox": GPTNeoXConfig(**{k: v for k, v in llama.items() if k != "num_key_value_heads"}),
        "opt": OPTConfig(
            **common, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT,
            word_embed_proj_dim=64,
        ),
        "bloom": BloomConfig(**common, hidden_size=64, n_layer=2, n_head=4),
        "gpt2": GPT2Config(**common, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT),
    }  # fmt: skip


def make_model(folder: Path, config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    tokenizer(folder)
    return model


def reference(base: Path, checkpoint: Path) -> Any:
    """The base model through transformers in float32 with the checkpoint's weights dequantised bit by bit (not our unpacking)."""
    import transformers
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    bits = json.loads((checkpoint / "quantize_config.json").read_text(encoding="utf-8"))["bits"]
    tensors = {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}

    def stream(words: np.ndarray) -> np.ndarray:
        """Values along the last axis of int32 words."""
        flat = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
        return (flat.reshape(*words.shape[:-1], -1, bits) << np.arange(bits, dtype=np.uint8)).sum(-1).astype(np.float32)

    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name = next(
            (n for n in (key, f"{model.base_model_prefix}.{key}", key.replace("embed_out", "lm_head")) if n in parameters), None
        )
        if name is not None:
            parameters[name].data.copy_(tensor)
    for key in [k for k in tensors if k.endswith(".qweight")]:
        stem = key.removesuffix(".qweight")
        codes = stream(tensors[key].numpy().T).T
        zeros = stream(tensors[f"{stem}.qzeros"].numpy()) + 1
        index = tensors[f"{stem}.g_idx"].long()
        weight = (torch.from_numpy(codes) - torch.from_numpy(zeros)[index]) * tensors[f"{stem}.scales"].float()[index]
        module = next(modules[n] for n in (stem, f"{model.base_model_prefix}.{stem}") if n in modules)
        target = module.weight.data
        target.copy_(weight if type(module).__name__ == "Conv1D" else weight.T)
    return model


def run_checkpoint(checkpoint: Path, kernel: str) -> Any:
    """Our runtime's model for a checkpoint."""
    from loaders._gptq_load import load
    from loaders.gptq_for_llama import SPEC

    options = {option.name: option.default for option in SPEC.options} | {"kernel": kernel}
    return load(str(checkpoint), options, lambda _: None)


def settings_for(base: Path, **settings: Any) -> QuantizeSettings:
    """Few and short windows of a short text: reading the bundled sample takes longer than all the rest here."""
    text = base.parent / "calibration.txt"
    if not text.exists():
        pieces = (TEXT[start : start + 1_500] for start in range(0, 190_000, 9_500))  # of all it holds, not its beginning
        text.write_text("".join(pieces), encoding="utf-8")
    given = {"nsamples": 24, "seqlen": 64, "group_size": 32, "calibration": str(text)}
    return QuantizeSettings(**given | settings)


def quantize(base: Path, out: Path, **settings: Any) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    result = _job.run(_job.Job(base, out, settings_for(base, **settings)), events.append)
    return result | {"events": [event for event in events if "layer" in event or "note" in event]}


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
    import resource

    from transformers import LlamaConfig

    base = folder / "wide"
    make_model(base, LlamaConfig(**configs()["llama"].to_dict() | {"intermediate_size": 3072}))
    unlimited = resource.getrlimit(resource.RLIMIT_AS)

    def tighten(event: dict[str, Any]) -> None:
        if event.get("block") == 2 and event["layer"].endswith("o_proj"):
            used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), unlimited[1]))  # down_proj's Hessian: 36 MiB

    def run(out: str) -> None:
        try:
            _job.run(_job.Job(base, folder / out, settings_for(base)), tighten)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)

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
        "ffn": _error(lambda: quantize(odd, folder / "o1")),
        "group": _error(lambda: quantize(base, folder / "o2", group_size=256)),
        "bits": _error(lambda: quantize(base, folder / "o3", bits=5)),
        "short": _error(lambda: quantize(base, folder / "o4", calibration=str(short))),
        "missing text": _error(lambda: quantize(base, folder / "o5", calibration=str(folder / "nowhere.txt"))),
        "nan": _error(lambda: quantize(nan, folder / "o6")),
        "cut": _error(lambda: quantize(cut, folder / "o7")),
        "twice": _error(lambda: quantize(base, folder / "good")),
        "quantised": _error(lambda: quantize(folder / "good", folder / "o8")),
        "no room": _error(no_room),
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
    return {"reads": reads, "bad": {name: _error(lambda path=path: run_checkpoint(path, "dense")) for name, path in bad.items()}}


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
    "interrupted": interrupted,
    "out_of_memory": out_of_memory,
    "full_disk": full_disk,
    "bad_input": bad_input,
    "damaged": damaged,
    "trained": trained,
}


def main(folder: str) -> None:
    torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gains, most of all on a busy machine
    answers = sys.stdout
    for line in sys.stdin:
        target = Path(folder) / line.strip()
        target.mkdir(parents=True)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answer = {"result": EXPERIMENTS[line.strip()](target)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        shutil.rmtree(target)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
