"""Quantise with the auto-gptq package, in the quantiser's child process: `server.py quantize MODEL --engine auto-gptq`.

The package holds the whole model in memory and can't be interrupted between blocks, so there is nothing to resume: what it has
done is in a work folder beside the result until it is whole. The calibration text is the same as for our own quantiser.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loaders import _autogptq_package, _hf_compat, _hf_load
from modules.errors import AppError, Conflict, IncompatibleModel, InvalidParameter
from modules.quantize._calibration import read_calibration
from modules.quantize._checkpoint import write_configs, write_json
from modules.quantize.settings import check_layer, check_settings

if TYPE_CHECKING:
    from modules.quantize.settings import QuantizeSettings

OnEvent = Callable[[dict[str, Any]], None]


def run(base: Path, out: Path, settings: QuantizeSettings, device: str, overwrite: bool, on_event: OnEvent) -> dict[str, Any]:
    """Make the checkpoint; returns what `modules.quantize._job.run` does, with the same events. Raises AppError's subclasses."""
    started = time.monotonic()
    check_settings(settings)
    if out.exists() and not overwrite:
        raise Conflict(f"{out.name} exists already.", hint="Give another name with --out, or --overwrite.")
    if not base.is_dir():
        raise InvalidParameter(f"{base} is no folder.", hint="Give a folder with config.json and *.safetensors.")
    config_json = _hf_load.check_folder(base)
    on_event({"stage": "Reading the model"})
    try:
        model, tokenizer = _read(base, device)
    except AppError:
        raise
    except Exception as error:
        raise _hf_load.typed(error, config_json, "The model can't be read") from error
    check_layers(model, settings)
    context = int(getattr(model.config, "max_position_embeddings", 0) or settings.seqlen)
    calibration = read_calibration(tokenizer, settings, context)
    for note in calibration.notes:
        on_event({"note": note})
    work = out.with_name(f".{out.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "model"
    folder.mkdir(parents=True)
    told = Told(started, on_event)
    on_event({"stage": "Quantising with auto-gptq"})
    _autogptq_package.quantize(
        model, calibration.windows, package_settings(settings), folder, told.layer, lambda stage: on_event({"stage": stage})
    )
    if not told.losses:
        raise IncompatibleModel("auto-gptq found no layer to quantise in this model.")
    mean = sum(told.losses.values()) / len(told.losses)
    tool = f"auto-gptq {_autogptq_package.version()}"
    provenance = {
        "tool": f"{tool}, by Switchyard 0.1.0",
        "settings": asdict(settings),
        "calibration": {"name": calibration.name, "sha256": calibration.sha256, "tokens": calibration.tokens},
        "mean_loss": mean,
        "loss_is": "auto-gptq's own: squared error over the calibration windows, not relative",
        "layers": {name: {"loss": loss} for name, loss in told.losses.items()},
    }
    write_configs(folder, base, settings, provenance)
    name_the_quantiser(folder, tool)
    if out.exists():
        os.replace(out, work / "replaced")
    os.replace(folder, out)
    shutil.rmtree(work)
    size = sum(path.stat().st_size for path in out.iterdir())
    seconds = round(time.monotonic() - started, 1)
    return {"path": str(out), "size_bytes": size, "mean_loss": mean, "layers": len(told.losses), "seconds": seconds}


def _read(base: Path, device: str) -> tuple[Any, Any]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        config=_hf_compat.read_config(base),
        torch_dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
    )
    return model.eval().to(device), _hf_compat.read_tokenizer(base)


def package_settings(settings: QuantizeSettings) -> dict[str, Any]:
    """The fields of auto-gptq's BaseQuantizeConfig."""
    return {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "damp_percent": settings.damp_percent,
        "desc_act": settings.desc_act,
        "static_groups": settings.static_groups,
        "sym": settings.sym,
        "true_sequential": settings.true_sequential,
    }


def check_layers(model: Any, settings: QuantizeSettings) -> None:
    """Every linear layer but the output's, before hours are spent: raises IncompatibleModel for a shape that can't be packed."""
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is output or type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        rows, columns = module.weight.shape
        inputs, outputs = (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)
        check_layer(name, inputs, outputs, settings)


class Told:
    """Progress of the package as our events, with each layer's loss kept. Its loss is the mean squared error it reports."""

    def __init__(self, started: float, on_event: OnEvent) -> None:
        self.losses: dict[str, float] = {}
        self._started, self._on_event = started, on_event
        self._per_block = 0

    def layer(self, block: int, blocks: int, name: str, loss: float) -> None:
        self.losses[f"{block - 1}.{name}"] = loss
        if block == 1:
            self._per_block += 1
        in_block = sum(key.startswith(f"{block - 1}.") for key in self.losses)
        fraction = min((block - 1 + in_block / max(self._per_block, in_block)) / blocks, 1.0)
        if block == 1:  # how many layers a block has is not known before its end
            fraction = min(fraction, 1 / blocks)
        passed = time.monotonic() - self._started
        left = passed * (1 - fraction) / fraction
        self._on_event(
            {"block": block, "blocks": blocks, "layer": name, "loss": loss, "fraction": fraction, "eta_s": round(left, 1)}
        )


def name_the_quantiser(folder: Path, tool: str) -> None:
    """The settings name who made the weights."""
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        settings = content.get("quantization_config", content)
        settings["meta"]["quantizer"] = [tool.replace("-", "_").replace(" ", ":")]
        write_json(folder / name, content)
