"""The two ends of a model, which GPTQ files leave unpacked: input embeddings and output layer. On a CPU they would be the largest
part of memory as float32, and the output layer a fifth of what a token reads.

Embeddings stay in the file's own 16 bits (a row becomes float32 when it is looked up: exact). With the int8 kernel the output
layer is rounded to 8 bits in groups of 32, finer than any packed layer; the other kernels keep it in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StoredEmbedding(nn.Embedding):
    """An embedding that keeps the file's dtype and gives float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


def kept_as_stored(model: Any, wanted: str) -> frozenset[str]:
    """The parameters that need no float32 copy when the packed layers run on kernel `wanted`."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return frozenset()
    rounded = wanted == "int8" and type(output) is nn.Linear
    tied = bool(model.config.get_text_config(decoder=True).tie_word_embeddings)
    if tied and not rounded:
        return frozenset()  # the output layer multiplies with the same tensor
    ends = [embedding, output] if rounded else [embedding]
    weights = {id(part.weight) for part in ends}
    return frozenset(name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in weights)


def finish(model: Any, wanted: str) -> bool:
    """Put the lighter modules in, after the weights are there. True when the output layer was rounded to 8 bits."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding and embedding.weight.dtype in (torch.float16, torch.bfloat16):
        embedding.__class__ = StoredEmbedding
    if wanted != "int8" or type(output) is not nn.Linear:
        return False
    from loaders._gptq_cpu import PackedLinear, round_to_8_bits

    name = next(name for name, module in model.named_modules() if module is output)
    model.set_submodule(name, PackedLinear(round_to_8_bits(output)))
    return True
