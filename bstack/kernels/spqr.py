"""Packs and unpacks blocks of SpQR (arXiv 2306.03078): the dense part, 3 or 4 bits a weight in small groups, and its outliers.

format/SPEC.md, section 6, describes every byte. In short: the dense part is the order of its inputs, then one tile for each
16 rows and each group of inputs. A tile holds the codes, for each row a scale code c and a zero code k of 3 bits, and
four numbers S0, S1, Z0, Z1, from which scale = S0 + S1 c, zero = Z0 + Z1 k, weight = scale (code - zero).
Outliers are stored by rows: where each row begins, then the inputs of all, then their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

import bstk
from bstk.kinds import MAX_SPARSE_COLUMNS, spqr_form, spqr_parts

__all__ = ["LANES", "ROWS", "STATISTICS", "Dense", "Outliers", "dense_bytes", "outlier_bytes", "rank_of"]

# Rows of a tile.
ROWS = 16
# Partial sums of a row's outliers.
LANES = 16
# Bytes of a tile's scale and zero codes and their second level.
STATISTICS = spqr_parts((ROWS, 1), 16 + 4).statistics


def rank_of(bits: int, group: int) -> int:
    """Return the record's rank of a dense part: ``16 * (group / 16) + bits``."""
    return group + bits


def dense_bytes(rows: int, columns: int, rank: int) -> int:
    """Return the length of a dense part in bytes; raise ValueError for an impossible rank or width."""
    return cast(int, bstk.SPQR.rule((rows, columns), "f16", rank))


def outlier_bytes(rows: int, count: int) -> int:
    """Return the length of a block of so many outliers in bytes."""
    return cast(range, bstk.OUTLIERS.rule((rows, MAX_SPARSE_COLUMNS), "f16", 0))[count]


def _start(columns: int) -> int:
    """Return where the tiles begin."""
    return spqr_parts((ROWS, columns), rank_of(4, 16)).permutation


@dataclass(frozen=True)
class Dense:
    """The dense part of some rows, a multiple of 16 of them; m and n are the matrix's rows and inputs.

    Attributes
    ----------
    order : np.ndarray
        Which input stands at each place, uint16, shape (n,).
    codes : np.ndarray
        uint8, shape (m rounded up to 16, n rounded up to the group), inputs in that order; 0 beyond m and n.
    scale_codes, zero_codes : np.ndarray
        0 to 7, uint8, shape (m rounded up, groups).
    scales : np.ndarray
        S0, S1, Z0, Z1 of 16 rows and a group, float16, shape (m rounded up / 16, groups, 4).
    """

    order: np.ndarray
    codes: np.ndarray
    scale_codes: np.ndarray
    zero_codes: np.ndarray
    scales: np.ndarray

    @classmethod
    def unpack(cls, payload: np.ndarray, columns: int, rank: int, start: int, stop: int) -> Dense:
        """Unpack the tiles with rows start to stop - 1 from a payload, uint8; the first row is ``start // 16 * 16``."""
        bits, group = spqr_form(rank)
        groups = -(-columns // group)
        tile_bytes = group * bits * ROWS // 8 + STATISTICS
        tiles = payload[_start(columns) :].reshape(-1, groups, tile_bytes)[start // ROWS : -(-stop // ROWS)]
        count = len(tiles)
        packed = tiles[..., :-STATISTICS].reshape(count, groups, group // 16, 32 * bits)
        if bits == 4:  # 16 rows of 4 bytes for each 8 inputs: 4 in the low halves, 4 in the high ones
            halves = packed.reshape(count, groups, group // 16, 2, ROWS, 1, 4)
            codes = halves >> np.array([0, 4], np.uint8)[:, None] & 15
            codes = codes.transpose(0, 4, 1, 2, 3, 5, 6)
        else:  # 16 rows of 4 bytes, two bits for each 4 inputs, then their third bits
            quads = packed[..., :64].reshape(count, groups, group // 16, 1, ROWS, 4)
            low = quads >> np.array([0, 2, 4, 6], np.uint8)[:, None, None] & 3
            high = np.unpackbits(packed[..., 64:], axis=-1, bitorder="little").reshape(low.shape)
            codes = (low | high << 2).transpose(0, 4, 1, 2, 3, 5)
        codes = np.ascontiguousarray(codes).reshape(count * ROWS, groups * group)
        statistics = tiles[..., -STATISTICS:]
        scale_codes, zero_codes = (_unpack_codes(statistics[..., at : at + 6]) for at in (0, 6))
        scales = np.ascontiguousarray(statistics[..., 12:]).view("<f2")
        return cls(payload[: 2 * columns].view("<u2"), codes, scale_codes, zero_codes, scales)

    def pack(self, rank: int) -> bytes:
        """Return the payload of the whole block."""
        bits, _ = spqr_form(rank)
        count, groups = self.scales.shape[:2]
        if bits == 4:
            halves = self.codes.reshape(count, ROWS, groups, -1, 2, 2, 4).transpose(0, 2, 3, 4, 1, 5, 6)
            packed = halves[..., 0, :] | halves[..., 1, :] << 4
        else:
            quads = self.codes.reshape(count, ROWS, groups, -1, 4, 4).transpose(0, 2, 3, 4, 1, 5)
            low = np.bitwise_or.reduce((quads & 3) << np.array([0, 2, 4, 6], np.uint8)[:, None, None], axis=3)
            high = np.packbits((quads >> 2).reshape(*quads.shape[:3], -1), axis=-1, bitorder="little")
            packed = np.concatenate([low.reshape(*high.shape[:-1], -1), high], -1)
        parts = [packed.reshape(count, groups, -1), _pack_codes(self.scale_codes), _pack_codes(self.zero_codes)]
        parts.append(np.ascontiguousarray(self.scales, "<f2").view(np.uint8).reshape(count, groups, 8))
        order = self.order.astype("<u2").tobytes()
        return order.ljust(_start(self.order.size), b"\0") + np.concatenate(parts, -1, dtype=np.uint8).tobytes()

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute scale and zero of each row and group, float32, shape (m rounded up, groups)."""
        s0, s1, z0, z1 = np.repeat(self.scales.astype(np.float32), ROWS, 0).transpose(2, 0, 1)
        return s0 + s1 * self.scale_codes.astype(np.float32), z0 + z1 * self.zero_codes.astype(np.float32)

    def weights(self) -> np.ndarray:
        """Decode the matrix, float32, shape (m rounded up, n), inputs in the model's order; round after each operation."""
        scale, zero = (np.repeat(of, self.codes.shape[1] // of.shape[1], 1) for of in self.statistics())
        ordered = scale * (self.codes.astype(np.float32) - zero)
        plain = np.empty((len(ordered), self.order.size), np.float32)
        plain[:, self.order] = ordered[:, : self.order.size]
        return plain

    def sums(self, x: np.ndarray) -> np.ndarray:
        """Multiply with quantised inputs, int16, shape (t, n): float32, shape (t, m rounded up), in the kernels' order.

        For each group in turn: scale times (the exact sum of codes times inputs - zero times the sum of the inputs).
        """
        scale, zero = self.statistics()
        groups = scale.shape[1]
        ordered = np.zeros((len(x), self.codes.shape[1]))
        ordered[:, : self.order.size] = x[:, self.order]
        total = np.zeros((len(x), len(self.codes)), np.float32)
        by_group = zip(np.split(ordered, groups, 1), np.split(self.codes.astype(np.float64), groups, 1), strict=True)
        for k, (given, codes) in enumerate(by_group):
            product, sum_ = (given @ codes.T).astype(np.float32), given.sum(1, keepdims=True).astype(np.float32)
            total += scale[:, k] * (product - zero[:, k] * sum_)
        return total


def _unpack_codes(packed: np.ndarray) -> np.ndarray:
    """Unpack codes of 3 bits, the first in the lowest: (row tiles, groups, 6 bytes) -> (rows, groups)."""
    bits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:2], ROWS, 3)
    return (bits @ np.array([1, 2, 4], np.uint8)).transpose(0, 2, 1).reshape(-1, packed.shape[1])


def _pack_codes(codes: np.ndarray) -> np.ndarray:
    """Undo `_unpack_codes`."""
    by_tile = codes.reshape(-1, ROWS, codes.shape[1]).transpose(0, 2, 1)
    bits = by_tile[..., None] >> np.arange(3, dtype=np.uint8) & 1
    return np.packbits(bits.reshape(*by_tile.shape[:2], -1), axis=-1, bitorder="little")


@dataclass(frozen=True)
class Outliers:
    """Differences of some weights from the dense part.

    Attributes
    ----------
    pointer : np.ndarray
        Where each row begins and the last one ends, uint32, shape (m + 1,).
    index : np.ndarray
        Inputs, rising within a row, uint16, shape (count,).
    value : np.ndarray
        float16, shape (count,).
    """

    pointer: np.ndarray
    index: np.ndarray
    value: np.ndarray

    @classmethod
    def unpack(cls, payload: np.ndarray, rows: int) -> Outliers:
        """Return the arrays of a payload, uint8, that has been checked; they share its memory."""
        pointer, rest = np.split(payload, [outlier_bytes(rows, 0)])
        index, value = np.split(rest, 2)
        return cls(pointer.view("<u4"), index.view("<u2"), value.view("<f2"))

    def pack(self) -> bytes:
        """Return the payload."""
        return b"".join(
            np.ascontiguousarray(of, kind).tobytes()
            for of, kind in ((self.pointer, "<u4"), (self.index, "<u2"), (self.value, "<f2"))
        )

    def add_to(self, weights: np.ndarray, start: int) -> None:
        """Add the rows from `start` on to `weights`, float32, in place."""
        pointer = self.pointer[start : start + len(weights) + 1].astype(np.int64)
        rows = np.repeat(np.arange(len(weights)), np.diff(pointer))
        here = slice(pointer[0], pointer[-1])
        weights[rows, self.index[here]] += self.value[here].astype(np.float32)

    def sums(self, x: np.ndarray) -> np.ndarray:
        """Multiply with quantised inputs, int16, shape (t, n): float32, shape (t, m), in the kernels' order.

        Lane l sums the outliers l, l + 16... of the row; then the upper half of the lanes is added to the lower, four times.
        """
        counts = np.diff(self.pointer.astype(np.int64))
        place = np.arange(-(-max(counts.max(), 1) // LANES) * LANES)
        there = place < counts[:, None]
        at = np.where(there, self.pointer[:-1, None].astype(np.int64) + place, 0)
        index, value = (of[at] if of.size else np.zeros(at.shape, of.dtype) for of in (self.index, self.value))
        value = np.where(there, value.astype(np.float32), np.float32(0))
        total = np.empty((len(x), len(counts)), np.float32)
        for row, given in zip(total, x, strict=True):
            products = (value * given[index].astype(np.float32)).reshape(len(counts), -1, LANES)
            lanes = np.zeros((len(counts), LANES), np.float32)
            for step in range(products.shape[1]):
                lanes += products[:, step]
            while lanes.shape[1] > 1:
                half = lanes.shape[1] // 2
                lanes = lanes[:, :half] + lanes[:, half:]
            row[:] = lanes[:, 0]
        return total
