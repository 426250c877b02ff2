"""Which GGUF type holds a GPTQ checkpoint as it is, decided from its header and settings. Standard library only.

A packed layer is w = s · (q − z), one s and z for each group of inputs and each output. GGUF's blocks of 32 inputs hold

    Q4_0   w = d · (n − 8)     exact for symmetric grids of 2, 3 and 4 bits: d = s, n = q − z + 8
    Q4_1   w = d · n + m       2, 3 and 4 bits with zero points: d = s, n = q, m = −s · z rounded to float16
    Q8_0   w = d · n           symmetric grids of 8 bits: d = s, n = q − z

so nothing is quantised a second time. What the header can't tell (the order of the groups, each zero point) is checked by the
child that writes the file (children/gptq_layers.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.detect.draft import read_json
from modules.detect.weights import find_weights, read_weights
from modules.errors import IncompatibleModel
from modules.quantize.layout import LayerLayout, read_layouts

if TYPE_CHECKING:
    from modules.schema import ModelFiles

EXACT = ("Q4_0", "Q4_1", "Q8_0")
BLOCK = 32
_SETTINGS = ("quantize_config.json", "quant_config.json")
HINT = (
    "Quantise the original model again without --desc-act (or with --static-groups) and in groups of 32 or more; or write "
    "--type F16, at the size of the original; or let it be quantised a second time, at a loss: --type Q4_K_M --requantize."
)


def settings_of(folder: Path) -> dict[str, Any]:
    """What the quantiser noted: config.json's quantization_config, and what the older files beside it add."""
    found: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        inner = read_json(folder / "config.json").get("quantization_config")
        found.update(inner if isinstance(inner, dict) else {})
    for name in _SETTINGS:
        if (folder / name).is_file():
            for key, value in read_json(folder / name).items():
                found.setdefault(key, value)
    return found


def exact_type(model: ModelFiles, wanted: str | None = None) -> str:
    """The type of the GGUF that holds the GPTQ folder `model` exactly; `wanted` asks for one of `EXACT`.

    Raises IncompatibleModel with the reason when no type does, or the wanted one does not; CorruptModel for a broken header.
    """
    folder = Path(model.path)
    settings = settings_of(folder)
    tensors, _ = read_weights(folder, find_weights(folder, dict.fromkeys(model.files, 0)))
    layouts = read_layouts(tensors, settings, lambda stem: None)
    if settings.get("desc_act") and not settings.get("static_groups"):
        raise refused(f"{model.id} was quantised with desc_act: its groups are scattered over the inputs, GGUF's are in order")
    for layout in layouts.values():
        reason = why_not(layout, settings)
        if reason:
            raise refused(f"Layer {layout.name} of {model.id} {reason}")
    widest = max(layout.bits for layout in layouts.values())
    natural = "Q8_0" if widest == 8 else "Q4_0" if settings.get("sym") is True else "Q4_1"
    if wanted in (None, natural) or (wanted == "Q4_1" and widest < 8):
        return wanted or natural
    what = "8 bits" if widest == 8 else f"{widest} bits" + (" with zero points" if natural == "Q4_1" else "")
    raise IncompatibleModel(
        f"{model.id} has {what}, which {wanted} does not hold as they are.",
        hint=f"Use --type {natural}, which loses nothing, or --requantize to quantise a second time.",
    )


def why_not(layout: LayerLayout, settings: dict[str, Any]) -> str | None:
    """Why GGUF can't hold this layer as it is, or None."""
    if layout.in_features % BLOCK:
        return f"has {layout.in_features} inputs, which GGUF's blocks of {BLOCK} don't divide"
    size = group_size(layout, settings)
    if layout.groups > 1 and size % BLOCK:
        return f"has groups of {size} inputs, which GGUF's blocks of {BLOCK} don't divide"
    if layout.bits == 8 and (settings.get("sym") is False or layout.zeros == "float"):
        return "has 8 bits with zero points, for which GGUF has no type"
    return None


def group_size(layout: LayerLayout, settings: dict[str, Any]) -> int:
    """Inputs per group: the settings' where the number of groups agrees (the last one may be short), else even groups."""
    noted = settings.get("group_size")
    if isinstance(noted, int) and noted > 0 and -(-layout.in_features // noted) == layout.groups:
        return noted
    return layout.group_size


def refused(reason: str) -> IncompatibleModel:
    return IncompatibleModel(f"{reason}, so it can't become GGUF without being quantised again.", hint=HINT)
