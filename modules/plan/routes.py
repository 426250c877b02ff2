"""What a model could be made into here: the files that converting or quantising it would give, with their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from modules.convert.gguf_types import estimated_bytes
from modules.schema import ModelFiles, Quantization

if TYPE_CHECKING:
    from modules.plan.types import How, Shape

_GGUF = (("F16", 16.0), ("Q8_0", 8.5), ("Q4_K_M", 4.8))
_GPTQ_BITS, _GPTQ_GROUP = 4, 128


def derived(model: ModelFiles, shape: Shape) -> Iterator[tuple[ModelFiles, Shape, How]]:
    """GGUFs and a 4-bit GPTQ of a plain Hugging Face folder; nothing of what is quantised already, which would only lose more."""
    if model.format != "hf" or model.quantization is not None or not shape.parameters:
        return
    for name, bits in _GGUF:
        size = estimated_bytes(shape.parameters, name)
        quantization = Quantization(name, bits)
        files = dataclasses.replace(model, format="gguf", quantization=quantization, size_bytes=size)
        scale = size / max(shape.parameters, 1)
        made = dataclasses.replace(
            shape,
            format="gguf",
            quantization=quantization,
            file_bytes=size,
            stored={name.removesuffix("_M"): size},
            embedding_bytes=int(shape.embedding * scale),
            output_bytes=int(shape.output * scale),
        )
        yield files, made, "convert"
    packed = shape.matrices * _GPTQ_BITS // 8
    ends = 2 * (shape.embedding + shape.output)
    quantization = Quantization("gptq", _GPTQ_BITS, _GPTQ_GROUP)
    size = packed + packed // 14 + ends
    files = dataclasses.replace(model, format="gptq", quantization=quantization, size_bytes=size)
    made = dataclasses.replace(
        shape,
        format="gptq",
        quantization=quantization,
        file_bytes=size,
        stored={"I32": packed, "F16": size - packed},
        packed=shape.matrices,
        packed_bytes=packed,
        group_size=_GPTQ_GROUP,
    )
    yield files, made, "quantize"
