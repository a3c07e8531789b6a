"""SpQR blocks decoded one weight at a time, from the words of format/SPEC.md: slow, and shares nothing with the codec."""

from __future__ import annotations

import struct

import numpy as np


def dense(payload: bytes, shape: tuple[int, int], rank: int) -> np.ndarray:
    """The matrix of an spqr block, float32; every operation is rounded on its own."""
    (m, n), bits, g = shape, rank % 16, rank - rank % 16
    perm = struct.unpack_from(f"<{n}H", payload)
    at, matrix = -(-2 * n // 64) * 64, np.zeros(shape, np.float32)
    size = 2 * bits * g + 20
    for tile_row in range(-(-m // 16)):
        for group in range(-(-n // g)):
            tile = payload[at : at + size]
            at += size
            scales = int.from_bytes(tile[2 * bits * g :][:6], "little")
            zeros = int.from_bytes(tile[2 * bits * g + 6 :][:6], "little")
            s0, s1, z0, z1 = (np.float32(value) for value in struct.unpack_from("<4e", tile, 2 * bits * g + 12))
            for r in range(min(16, m - 16 * tile_row)):
                s = s0 + s1 * np.float32(scales >> 3 * r & 7)
                z = z0 + z1 * np.float32(zeros >> 3 * r & 7)
                for p in range(min(g, n - g * group)):
                    q = np.float32(_code(tile[p // 16 * 32 * bits :], bits, r, p % 16))
                    matrix[16 * tile_row + r, perm[g * group + p]] = s * (q - z)
    assert at == len(payload)
    return matrix


def _code(subtile: bytes, bits: int, r: int, p: int) -> int:
    if bits == 4:
        half, rest = divmod(p, 8)
        high, i = divmod(rest, 4)
        return subtile[64 * half + 4 * r + i] >> 4 * high & 15
    j, i = divmod(p, 4)
    low = subtile[4 * r + i] >> 2 * j & 3
    (word,) = struct.unpack_from("<Q", subtile, 64 + 8 * j)
    return low | (word >> (4 * r + i) & 1) << 2


def outliers(payload: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The matrix of an outliers block, float32."""
    m, _ = shape
    matrix = np.zeros(shape, np.float32)
    pointer = struct.unpack_from(f"<{m + 1}I", payload)
    count = pointer[-1]
    columns = struct.unpack_from(f"<{count}H", payload, 4 * (m + 1))
    values = struct.unpack_from(f"<{count}e", payload, 4 * (m + 1) + 2 * count)
    for row in range(m):
        for place in range(pointer[row], pointer[row + 1]):
            matrix[row, columns[place]] = values[place]
    assert len(payload) == 4 * (m + 1) + 4 * count
    return matrix
