"""The files of a GPTQ checkpoint in AutoGPTQ's v1 layout or v2, written as a stream: no more than one tensor is in memory.

Layout: per linear layer `qweight` int32 [in·bits/32, out], `qzeros` int32 [groups, out·bits/32] with zero − 1, `scales` float16
[groups, out], `g_idx` int32 [in], `bias` float16 where there is one; all other tensors as in the base model (float32 as float16).
Settings stand in config.json (`quantization_config`) and quantize_config.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from modules.quantize._packing import pack_rows, pack_zeros
from modules.quantize.provenance import FILE as PROVENANCE

if TYPE_CHECKING:
    from torch import Tensor

    from modules.quantize._gptq import QuantizedLayer
    from modules.quantize.settings import QuantizeSettings

SHARD_BYTES = 4 << 30
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json", ".py")
_OWN_JSON = frozenset({"config.json", "quantize_config.json", "quant_config.json", "bundled.json", PROVENANCE})


@dataclass(frozen=True)
class Source:
    """One tensor to be written: its entry in the header, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return int(self.dtype.itemsize) * prod(self.shape)


def layer_tensors(name: str, layer: QuantizedLayer, bias: Tensor | None, bits: int, *, v1: bool = True) -> dict[str, Tensor]:
    """The tensors of one quantised layer under their names in the file."""
    tensors = {
        f"{name}.qweight": torch.from_numpy(pack_rows(layer.codes.cpu().numpy(), bits)),
        f"{name}.qzeros": torch.from_numpy(pack_zeros(layer.zeros.cpu().numpy(), bits, v1=v1)),
        f"{name}.scales": layer.scales.cpu().contiguous(),
        f"{name}.g_idx": layer.g_idx.cpu().contiguous(),
    }
    if bias is not None:
        tensors[f"{name}.bias"] = bias.detach().to("cpu", torch.float16).contiguous()
    return tensors


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype in (torch.float32, torch.float64) else dtype


def write_safetensors(path: Path, sources: Iterable[Source]) -> None:
    """Write one file, tensor by tensor, to a temporary name first."""
    items = list(sources)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in items:
        header[item.name] = {
            "dtype": _DTYPES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.size],
        }
        offset += item.size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with _replaced(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for item in items:
            tensor = item.read().to("cpu", item.dtype).contiguous()
            if tuple(tensor.shape) != item.shape:
                raise ValueError(f"{item.name} changed its shape from {item.shape} to {tuple(tensor.shape)}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def write_weights(folder: Path, sources: list[Source], shard_bytes: int = SHARD_BYTES) -> None:
    """All tensors as model.safetensors, or as shards with their index."""
    shards: list[list[Source]] = [[]]
    filled = 0
    for source in sources:
        if shards[-1] and filled + source.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += source.size
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map.update({source.name: name for source in shard})
    total = sum(source.size for source in sources)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def quantize_config(settings: QuantizeSettings, damp: float) -> dict[str, Any]:
    """What AutoGPTQ, GPTQModel, transformers and vLLM look for.

    To them desc_act means that inputs are scattered over the groups, which costs time. With static groups or a single one they
    are in order, whatever the order of quantising was: that stands under "meta".
    """
    return {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "damp_percent": damp,
        "desc_act": settings.scattered,
        "static_groups": settings.static_groups,
        "sym": settings.sym,
        "lm_head": False,
        "true_sequential": settings.true_sequential,
        "quant_method": "gptq",
        "checkpoint_format": settings.checkpoint_format,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "meta": {
            "quantizer": ["switchyard:0.1.0"],
            "method": settings.method,
            "mse": settings.mse,
            "act_order": settings.desc_act,
        },
    }


def write_configs(folder: Path, base: Path, settings: QuantizeSettings, provenance: dict[str, Any]) -> None:
    """config.json with the quantization, quantize_config.json, the provenance, and the base's tokenizer, template and licence."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name[0] != "." and path.name not in _OWN_JSON and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8-sig"))
    quantization = quantize_config(settings, settings.damp_percent)
    for key in ("torch_dtype", "dtype"):
        if config.get(key) in ("float32", "float64"):
            config[key] = "float16"
    config["quantization_config"] = quantization
    write_json(folder / "config.json", config)
    write_json(folder / "quantize_config.json", quantization)
    write_json(folder / PROVENANCE, provenance)


def write_json(path: Path, value: Any) -> None:
    """Replace a file in one step."""
    with _replaced(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8"))


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on the disk; a broken one leaves nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
