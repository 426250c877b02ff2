"""LoRA adapters: PEFT folders whose small matrices are put over a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import AppError, CorruptModel, IncompatibleModel, InvalidParameter, one_line
from modules.schema import LoadProgress

if TYPE_CHECKING:
    from modules.engine import Progress


def lora_weights(options: dict[str, Any], name: str = "lora_weights") -> list[float]:
    """One weight per adapter from the option of that name, such as "1,0.5"; 1 each when empty. Raises InvalidParameter."""
    text, count = options[name], len(options["lora"])
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        weights = [float(part) for part in parts] or [1.0] * count
    except ValueError:
        raise InvalidParameter(f"{name} {text!r} are no numbers.", param=name) from None
    if len(weights) != count:
        raise InvalidParameter(f"There are {count} adapters and {len(weights)} weights.", param=name)
    return weights


def adapters(options: dict[str, Any]) -> list[tuple[Path, float]]:
    """The folder and the weight of each adapter of the load options. Raises CorruptModel and InvalidParameter."""
    weights = lora_weights(options)
    folders = [Path(path) for path in options["lora"]]
    for folder in folders:
        if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
            raise CorruptModel(
                f"{folder.name} is no LoRA adapter.", hint="It needs adapter_config.json and adapter_model.safetensors."
            )
    return list(zip(folders, weights, strict=True))


def put_over(model: Any, options: dict[str, Any], progress: Progress) -> tuple[Any, list[str]]:
    """A transformers model with its adapters, and a note on each: merged into full-precision weights, beside quantised ones."""
    found = adapters(options)
    if not found:
        return model, []
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = [f"adapter{number}" for number in range(len(found))]
    for name, (folder, _) in zip(names, found, strict=True):
        progress(LoadProgress(f"Reading adapter {folder.name}"))
        try:
            if name == names[0]:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
        except AppError:
            raise
        except Exception as error:
            raise IncompatibleModel(
                f"The adapter {folder.name} does not fit this model: {one_line(error)}.",
                hint="An adapter works with the base model it was trained on.",
            ) from error
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, (_, weight) in zip(names, found, strict=True):
                if name in module.scaling:
                    module.set_scale(name, weight)
    model.base_model.set_adapter(names)
    notes = [f"LoRA {folder.name} at {weight:g}" for folder, weight in found]
    if options["load_in_8bit"] or options["load_in_4bit"]:
        return model.get_base_model(), notes  # merging into quantised weights would round the adapter away
    return model.merge_and_unload(), notes
