"""All that is particular to the auto-gptq package (0.7.1): reading a checkpoint with it, and quantising with it.

The package is unmaintained and was written for CUDA and for an older transformers. What stands in the way is replaced in this
process, never on disk: names in its own modules, and `torch.cuda.synchronize` where there is no CUDA.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modules.errors import CorruptModel, IncompatibleModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

# It says at each import that its CUDA kernels are missing; they are not used.
_QUIET = ("auto_gptq", "auto_gptq.modeling._base", "auto_gptq.modeling._utils", "accelerate.utils.modeling")


def load(folder: Path, file: str, config: Any, quantization: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """The transformers model with auto-gptq's own packed layers, its weights read.

    `file` is the checkpoint's file name, or its index's; `quantization` holds BaseQuantizeConfig's fields.
    """
    logging.getLogger("auto_gptq").setLevel(logging.ERROR)
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    check_architecture(config)
    with _names_replaced(config):
        wrapper = AutoGPTQForCausalLM.from_quantized(
            str(folder),
            device=device,
            torch_dtype=dtype,
            low_cpu_mem_usage=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            quantize_config=BaseQuantizeConfig(**quantization),
            model_basename=file.removesuffix(".index.json").removesuffix(".safetensors"),
            disable_exllama=True,
            disable_exllamav2=True,
        )
    return wrapper.model


def check_architecture(config: Any) -> None:
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP

    if config.model_type not in GPTQ_CAUSAL_LM_MODEL_MAP:
        raise IncompatibleModel(
            f"auto-gptq {version()} has no model of type {config.model_type!r}.",
            hint="Load it with GPTQ-for-LLaMA, which takes any architecture of Transformers.",
        )


def version() -> str:
    from auto_gptq import __version__

    return str(__version__)


class _Ready:
    """Stands for transformers.AutoConfig inside the package: the configuration that was read and translated before."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def from_pretrained(self, *_: Any, **__: Any) -> Any:
        return self._config


@contextmanager
def _names_replaced(config: Any) -> Iterator[None]:
    """While the package loads: it gets our configuration, and a model without weights ties its tensors before it is moved."""
    from auto_gptq.modeling import _base, _utils

    dispatch = _base.simple_dispatch_model

    def tie_and_dispatch(model: Any, device_map: Any) -> Any:
        model.tie_weights()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        missing = [name for name, tensor in tensors if tensor.device.type == "meta"]
        if missing:
            raise CorruptModel(
                f"{len(missing)} tensors are missing, the first is {missing[0]}.",
                hint="The download is incomplete or config.json is of another model.",
            )
        return dispatch(model, device_map)

    ready = _Ready(config)
    with replaced(_base, AutoConfig=ready, simple_dispatch_model=tie_and_dispatch), replaced(_utils, AutoConfig=ready):
        yield


@contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Set attributes of a module, and put the old ones back at the end."""
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


# --- quantising ------------------------------------------------------------------------------------------------

OnLayer = Callable[[int, int, str, float], None]
"""Called with (block from 1, blocks, layer, loss) after each layer."""


def quantize(
    model: Any, windows: torch.Tensor, quantization: dict[str, Any], out: Path, on_layer: OnLayer, on_stage: Callable[[str], None]
) -> None:
    """Quantise `model` (float, in memory, on its device) with the package and write the checkpoint to the folder `out`.

    `windows` int64 [n, length] is the calibration.
    """
    import torch
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP

    check_architecture(model.config)
    family = GPTQ_CAUSAL_LM_MODEL_MAP[model.config.model_type]
    # Made directly: from_pretrained refuses to begin where there is no CUDA.
    wrapper = family(model, False, BaseQuantizeConfig(**quantization, model_file_base_name="model"))
    examples = [{"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]} for window in windows]
    with _cuda_not_needed(_base), _told(on_layer):
        wrapper.quantize(examples, batch_size=1, cache_examples_on_gpu=model.device.type == "cuda")
    on_stage("Writing the checkpoint")
    model.to(torch.float16)  # scales are stored as float16; packed words are integers and stay
    with _tied_once(_base, model):
        wrapper.save_quantized(str(out), use_safetensors=True)


@contextmanager
def _tied_once(base: Any, model: Any) -> Iterator[None]:
    """The package writes a tied output layer a second time; it is left out, as transformers does."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    save = base.safe_save

    def save_once(tensors: dict[str, Any], *arguments: Any) -> None:
        save({name: tensor for name, tensor in tensors.items() if name not in tied}, *arguments)

    with replaced(base, safe_save=save_once):
        yield


@contextmanager
def _cuda_not_needed(base: Any) -> Iterator[None]:
    """Where there is no CUDA: its first device is the CPU, and there is nothing to wait for."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    with replaced(base, CUDA_0=torch.device("cpu")), replaced(torch.cuda, synchronize=lambda *_: None):
        yield


@contextmanager
def _told(on_layer: OnLayer) -> Iterator[None]:
    """The package tells its progress to its log only: "Quantizing NAME in layer 1/6...", then "avg loss: 0.1"."""
    handler = _Progress(on_layer)
    loggers = [logging.getLogger(name) for name in ("auto_gptq.modeling._base", "auto_gptq.quantization.gptq")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


class _Progress(logging.Handler):
    def __init__(self, on_layer: OnLayer) -> None:
        super().__init__()
        self._on_layer = on_layer
        self._place: tuple[int, int, str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        place = parse_place(record.getMessage())
        if place is not None:
            self._place = place
        loss = parse_loss(record.getMessage())
        if loss is not None and self._place is not None:
            self._on_layer(*self._place, loss)


def parse_place(line: str) -> tuple[int, int, str] | None:
    """(block, blocks, layer) of "Quantizing self_attn.q_proj in layer 1/6..."."""
    words = line.split()
    if len(words) != 5 or words[0] != "Quantizing" or words[2:4] != ["in", "layer"]:
        return None
    block, _, blocks = words[4].rstrip(".").partition("/")
    return (int(block), int(blocks), words[1]) if block.isdigit() and blocks.isdigit() else None


def parse_loss(line: str) -> float | None:
    """The number of "avg loss: 0.012"."""
    name, _, value = line.partition(":")
    try:
        return float(value) if name == "avg loss" else None
    except ValueError:
        return None
