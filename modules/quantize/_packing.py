"""Packed integers of GPTQ checkpoints: a little-endian stream of bits in 32-bit words, along the first axis.

`qweight` [in·bits/32, out] holds the codes along `in`; `qzeros` [groups, out·bits/32] the zero points along `out`. 2, 4 and 8
bits fill words evenly. 3 bits put 32 values into 3 words, of which the 11th and the 22nd lie across a border: that is the
same stream. Source: the layout that GPTQ-for-LLaMa wrote and AutoGPTQ named "gptq".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from modules.quantize.settings import period

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]


def pack_rows(codes: npt.NDArray[Any], bits: int) -> Words:
    """Codes [n, m] (0 … 2^bits − 1) -> words [n·bits/32, m]. Raises ValueError when n does not fill whole words."""
    values, words = period(bits)
    rows, columns = codes.shape
    if rows % values:
        raise ValueError(f"{rows} values of {bits} bits do not fill whole 32-bit words")
    if codes.size and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    source = codes.reshape(rows // values, values, columns)
    packed = np.zeros((rows // values, words, columns), dtype=np.uint32)
    for index in range(values):
        word, shift = divmod(index * bits, 32)
        value = source[:, index].astype(np.uint32)
        packed[:, word] |= value << np.uint32(shift)
        if shift + bits > 32:
            packed[:, word + 1] |= value >> np.uint32(32 - shift)
    return packed.reshape(-1, columns).view(np.int32)


def unpack_rows(packed: npt.NDArray[Any], bits: int) -> Codes:
    """The inverse of `pack_rows`: words [r, m] -> codes [r·32/bits, m]. Raises ValueError for a torn number of words."""
    values, words = period(bits)
    rows, columns = packed.shape
    if rows % words:
        raise ValueError(f"{rows} words hold no whole number of {bits}-bit values")
    source = np.ascontiguousarray(packed).view(np.uint32).reshape(rows // words, words, columns)
    codes = np.empty((rows // words, values, columns), dtype=np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for index in range(values):
        word, shift = divmod(index * bits, 32)
        value = source[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= source[:, word + 1] << np.uint32(32 - shift)
        codes[:, index] = (value & mask).astype(np.uint8)
    return codes.reshape(-1, columns)


def pack_zeros(zeros: npt.NDArray[Any], bits: int, *, v1: bool = True) -> Words:
    """Zero points [groups, out] -> `qzeros` [groups, out·bits/32]. v1 ("gptq") stores zero − 1."""
    stored = (zeros.astype(np.int32) - int(v1)) & ((1 << bits) - 1)
    return np.ascontiguousarray(pack_rows(stored.T, bits).T)


def unpack_zeros(packed: npt.NDArray[Any], bits: int, *, v1: bool = True) -> Codes:
    """The zero points [groups, out]. In v1 a stored 2^bits − 1 is a zero point of 0: readers add 1 and mask."""
    stored = unpack_rows(np.ascontiguousarray(packed.T), bits).T.astype(np.int32)
    return np.ascontiguousarray((stored + int(v1)) & ((1 << bits) - 1)).astype(np.uint8)
