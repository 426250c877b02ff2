"""Run in a child process: does this compiled GPTQ kernel compute what the format says?

    python -m loaders._gptq_check LIBRARY

Ends with 0, or with 1 and a line, or dies of what the compiler did wrong. Plain Python from the definition, so that it shares
no mistake with the code that packs real checkpoints; without torch, so that it takes no second.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Sequence

LANES, BLOCK = 8, 32


class Weights(ctypes.Structure):
    """`Weights` of _gptq_kernel.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("bits", "n", "k", "blocks", "groups", "half_scales", "zero_kind")),
        ("zero", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "group_end", "perm", "bias")),
    )


def pack(codes: Sequence[Sequence[int]], bits: int) -> bytes:
    """codes[input][output], both multiples of the layout's units -> the kernel's bytes, one output and input at a time."""
    inputs, outputs = len(codes), len(codes[0])
    blocks = inputs // BLOCK
    packed = bytearray(outputs // LANES * blocks * bits * 32)
    for i in range(inputs):
        block, place = divmod(i, BLOCK)
        quad, j = divmod(place, 4)
        for o in range(outputs):
            panel, lane = divmod(o, LANES)
            base = (panel * blocks + block) * bits * 32 + lane * 4 + j
            code = codes[i][o]
            if bits == 3:
                packed[base + quad // 4 * 32] |= (code & 3) << 2 * (quad % 4)
                packed[base + 64] |= (code >> 2) << quad
            else:
                per = 8 // bits
                packed[base + quad // per * 32] |= code << bits * (quad % per)
    return bytes(packed)


def main(path: str) -> int:
    library = ctypes.CDLL(path)
    library.gptq_linear.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    chance = random.Random(1)
    inputs, outputs, ends = 128, 24, (2, 4)
    for bits in (2, 3, 4, 8):
        most = (1 << bits) - 1
        codes = [[chance.choice((0, most, chance.randint(0, most))) for _ in range(outputs)] for _ in range(inputs)]
        scales = [[chance.uniform(0.5, 2) for _ in range(outputs)] for _ in ends]
        zero = 1 << (bits - 1)
        packed = ctypes.create_string_buffer(pack(codes, bits))
        grid = (ctypes.c_float * (outputs * 2))(
            *(scales[g][p + lane] for p in range(0, outputs, LANES) for g in range(2) for lane in range(LANES))
        )
        group_end = (ctypes.c_int32 * 2)(*ends)
        layer = Weights(bits, outputs - 3, inputs, 4, 2, 0, 0, zero)
        layer.codes, layer.scales, layer.group_end = (ctypes.addressof(part) for part in (packed, grid, group_end))
        for rows in (1, 7):
            x = [[chance.choice((-1.0, 1.0, chance.uniform(-1, 1))) for _ in range(inputs)] for _ in range(rows)]
            given = (ctypes.c_float * (rows * inputs))(*(value for row in x for value in row))
            for exact in (0, 1):
                y = (ctypes.c_float * (rows * (outputs - 3)))()
                if library.gptq_linear(ctypes.byref(layer), given, rows, y, exact):
                    print("the kernel found no memory")
                    return 1
                for r in range(rows):
                    for o in range(outputs - 3):
                        terms = [x[r][i] * (codes[i][o] - zero) * scales[i // 64][o] for i in range(inputs)]
                        allowed = (1e-5 if exact else 5e-3) * sum(map(abs, terms))
                        if not abs(y[r * (outputs - 3) + o] - sum(terms)) <= allowed:
                            print(f"{bits} bits, {rows} rows, exact {exact}: {y[r * (outputs - 3) + o]} for {sum(terms)}")
                            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
