"""Experiments for tests/unit/test_loader_autogptq.py, in AutoGPTQ's environment (the tests' own has no torch):

python tests/autogptq_lab.py FOLDER     reads names of experiments, prints one line of JSON for each: {"result"} or {"error"}
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from serve_lab import serve

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loaders import _autogptq_load, _autogptq_quantize, _hf_compat  # noqa: E402
from loaders._gptq_load import open_checkpoint  # noqa: E402
from loaders._gptq_tensors import unpack  # noqa: E402
from loaders.autogptq import SPEC  # noqa: E402
from modules.errors import AppError  # noqa: E402
from modules.quantize.settings import QuantizeSettings  # noqa: E402

WREN = ROOT / "models" / "wren-6m"
BUNDLED = ROOT / "models" / "wren-6m-gptq-4bit-128g"
PROMPT = "Once upon a time there was a little girl named"


def load(path: Path, **values: Any) -> Any:
    options = {option.name: option.default for option in SPEC.options} | {"threads": 1, "cpu": True} | values
    return _autogptq_load.load(str(path), options, lambda _: None)


def logits(loaded: Any, text: str = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        ids = torch.tensor([loaded.text.encode(text, add_special=True)])
        return loaded.model(input_ids=ids).logits[0].float()


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def dequantised(folder: Path) -> Any:
    """The checkpoint's weights in float32 in a plain model of transformers: the judge."""
    import transformers

    checkpoint = open_checkpoint(folder)
    config = _hf_compat.read_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    read, packed = checkpoint.reader(), _autogptq_load.read_packed(checkpoint)
    state = {name: read(name).float() for name in checkpoint.entries if name in dict(model.named_parameters())}
    for name, layout in packed.layouts.items():
        layer = unpack(layout, read, None)
        weight = layer.weight()
        if layer.perm is not None:
            weight = weight[torch.argsort(layer.perm)]
        state[f"{name}.weight"] = weight.T
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    missing = [name for name in model.load_state_dict(state, strict=False).missing_keys if "lm_head" not in name]
    assert not missing, missing
    model.tie_weights()
    return model


# --- loading ---------------------------------------------------------------------------------------------------


def bundled(folder: Path) -> Any:
    """The bundled checkpoint by our kernel and by the package's, against the dequantised weights."""
    ours = load(BUNDLED)
    with torch.inference_mode():
        ids = torch.tensor([ours.text.encode(PROMPT, add_special=True)])
        judge = dequantised(BUNDLED)(input_ids=ids).logits[0]
    package = load(BUNDLED, kernel="package")
    kinds = {type(part).__module__.partition(".")[0] for part in package.model.modules() if hasattr(part, "qweight")}
    return {
        "ours": off(logits(ours), judge),
        "package": off(logits(package), judge),
        "same_greedy": bool((logits(ours).argmax(-1) == judge.argmax(-1)).all()),
        "engines": [ours.info.engine, package.info.engine],
        "notes": list(package.info.notes),
        "package_layers_from": sorted(kinds),
        "package_layers_left": sum(hasattr(part, "qweight") for part in ours.model.modules()),
    }


def newer_files(folder: Path) -> Any:
    """The same model as transformers 5 writes it: rope_parameters, dtype, TokenizersBackend, a list of special tokens."""
    copy = folder / "as five writes it"
    shutil.copytree(BUNDLED, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    theta = config.pop("rope_theta")
    config |= {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "dtype": config.pop("torch_dtype")}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokens = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<|im_start|>"]}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    new, old = load(copy), load(BUNDLED)
    return {
        "same": bool(torch.equal(logits(new), logits(old))),
        "eos": [sorted(new.eos_ids), sorted(old.eos_ids)],
        "template": new.info.chat_template == old.info.chat_template is not None,
    }


# --- quantising ------------------------------------------------------------------------------------------------


def quantised(folder: Path) -> Any:
    """A small model quantised by the package; each result read by our kernels and, where that works, by the package's own."""
    base = small_model(folder / "small")
    results = []
    for name, settings in (
        ("4bit", QuantizeSettings(bits=4, group_size=32)),
        ("3bit-asym-actorder", QuantizeSettings(bits=3, group_size=32, sym=False, desc_act=True)),
        ("8bit-column", QuantizeSettings(bits=8, group_size=-1)),
    ):
        events: list[dict[str, Any]] = []
        out = folder / f"made {name}"
        settings = QuantizeSettings(**{**settings.to_dict(), "engine": "auto-gptq", "nsamples": 4, "seqlen": 64})
        done = _autogptq_quantize.run(base, out, settings, "cpu", False, events.append)
        layers = [event for event in events if "layer" in event]
        judge = dequantised(out)
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        loaded, package = load(out), load(out, kernel="package")
        ids = torch.tensor([[5, 9, 40, 11, 3, 8]])
        with torch.inference_mode():
            rows = [model(input_ids=ids).logits[0] for model in (loaded.model, package.model, judge)]
        results.append(
            {
                "case": name,
                "layers": [done["layers"], len(layers), len({(event["block"], event["layer"]) for event in layers})],
                "fractions": [event["fraction"] for event in layers],
                "losses": [event["loss"] for event in layers],
                "quantization": [
                    loaded.info.quantization.bits, loaded.info.quantization.group_size, loaded.info.quantization.desc_act,
                    loaded.info.quantization.sym,
                ],
                "ours": off(rows[0], rows[2]),
                "package": off(rows[1], rows[2]),
                "quantizer": config["quantization_config"]["meta"]["quantizer"],
                "files": sorted(path.name for path in out.iterdir()),
                "left": sorted(path.name for path in folder.glob(".*.part")),
            }
        )  # fmt: skip
    return results


def small_model(folder: Path) -> Path:
    """A random Llama of 64 and 96 columns with Wren's tokenizer."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=0, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(WREN / name, folder / name)
    return folder


# --- what is refused -------------------------------------------------------------------------------------------


def refusals(folder: Path) -> Any:
    """What a bad or unsuitable checkpoint is called."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    def copy(name: str) -> Path:
        target = folder / name
        shutil.copytree(BUNDLED, target, copy_function=shutil.copyfile)
        return target

    def changed(name: str, change: Any) -> Path:
        target = copy(name)
        with safe_open(BUNDLED / "model.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        change(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target

    def settings(name: str, **values: Any) -> Path:
        target = copy(name)
        for file in ("config.json", "quantize_config.json"):
            content = json.loads((target / file).read_text(encoding="utf-8"))
            content.get("quantization_config", content).update(values)
            (target / file).write_text(json.dumps(content), encoding="utf-8")
        return target

    layer = "model.layers.0.self_attn.q_proj"

    def two_widths(tensors: dict[str, torch.Tensor]) -> None:
        rows = tensors[f"{layer}.qweight"].shape[0]
        tensors[f"{layer}.qweight"] = tensors[f"{layer}.qweight"].repeat(2, 1)
        tensors[f"{layer}.qzeros"] = tensors[f"{layer}.qzeros"].repeat(1, 2)
        assert rows * 2 == tensors[f"{layer}.qweight"].shape[0]

    def architecture() -> Path:
        target = copy("other architecture")
        content = json.loads((target / "config.json").read_text(encoding="utf-8"))
        content |= {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"]}
        (target / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return target

    cases: dict[str, tuple[Path, dict[str, Any]]] = {
        "two widths": (changed("widths", two_widths), {}),
        "no norm": (changed("norm", lambda t: t.pop("model.norm.weight")), {}),
        "no zeros": (changed("zeros", lambda t: t.pop(f"{layer}.qzeros")), {}),
        "v2 by the package": (settings("v2", checkpoint_format="gptq_v2"), {"kernel": "package"}),
        "marlin": (settings("marlin", is_marlin_format=True), {}),
        "architecture": (architecture(), {}),
        "nothing": (folder / "nothing here", {}),
    }
    found = {}
    for name, (path, options) in cases.items():
        try:
            load(path, **options)
            found[name] = ["loaded", "", ""]
        except AppError as error:
            found[name] = [type(error).__name__, error.message, error.hint or ""]
    return found


EXPERIMENTS = {work.__name__: work for work in (bundled, newer_files, quantised, refusals)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(EXPERIMENTS, sys.argv[1])
