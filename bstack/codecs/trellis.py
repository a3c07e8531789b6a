"""Trellis blocks: 2 bits per weight on rotated inputs, with error feedback; the default codec.

A block of an m x n matrix is m x n codes of 2 bits and one scale per row. The value of a weight depends on its own
code and on those of the three rows above it in the same column, so the 256 values of the table are chosen along a
path (trellis-coded quantisation: Marcellin and Fischer, IEEE Trans. Commun. 38, 1990; bit-shift trellis: QTIP,
arXiv 2406.11235):

    w_ij = c_ij + 4 c_(i-1)j + 16 c_(i-2)j + 64 c_(i-3)j         (three rows of codes above the first are stored)
    block = diag(scale) TABLE[w]                                  W ~ unrotate(sum of the blocks)

The path runs down the rows, because the error feedback (`bstack.numerics.feedback`) couples columns only: so each column is
still quantised with the exact feedback of all columns before it. docs/research/notebook.md has the measurements behind
every choice here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import torch

import bstk
from bstack.codecs.contract import Block, Codec
from bstack.kernels import reference
from bstack.kernels.matrix import BLOCKS, Matrix, pointer
from bstack.kernels.multiply import decode_rows
from bstack.kernels.native import library
from bstack.kernels.reference import EARLIER, TABLE
from bstack.numerics.feedback import choose_damping, factorise, spectrum_sample
from bstack.numerics.groups import to_half
from bstack.numerics.hessian import shrinkage
from bstack.numerics.rotation import rotate, rotate_hessian, unrotate

__all__ = ["TABLE", "TrellisCodec", "encode_columns"]

BITS = 2
# How many later blocks the feedback's damping considers; measured best for the first blocks and for the last two.
LATER, LATER_AT_THE_END = 1.0, 0.5
# The quantiser's range over the row's root mean square: a little room for what the feedback adds.
HEADROOM = 1.03
# The table's unit, in standard deviations of the source it was trained on.
UNIT = 0.0227
COLUMNS_TOGETHER = 64
ROWS_TOGETHER = 256


@dataclass(frozen=True)
class TrellisCodec(Codec):
    """Two bits per weight and block.

    Parameters
    ----------
    planes : int
        Number of blocks, 1 to 16.

    Raises
    ------
    bstk.UsageError
    """

    name = "trellis"
    kinds = (bstk.TRELLIS,)

    planes: int = 4

    def __post_init__(self) -> None:
        self._check_number("planes", int, "1 to 16 (2 bits per weight each)", lambda planes: 1 <= planes <= 16)

    def encode(
        self, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> Iterator[Block]:
        rotated = rotate_hessian(hessian)
        keep, ridge = shrinkage(rotated, tokens)
        spectrum = spectrum_sample(_damped(rotated, keep, ridge))
        importance = _bounded(importance)
        residual = rotate(weight)
        # R H is carried along, since a product with H costs as much as all the rest.
        product = residual @ rotated
        factor: torch.Tensor | None = None
        factor_later: float | None = None
        for plane in range(self.planes):
            later = LATER if self.planes - plane > 2 else LATER_AT_THE_END
            if later != factor_later:
                factor, factor_later = None, later  # free the old factor before the new one is made
                factor, _ = factorise(lambda: _damped(rotated, keep, ridge), choose_damping(*spectrum, later))
            scale = residual.square().mean(1).sqrt().clamp_min(1e-30) * (HEADROOM * UNIT)
            values, codes = _encode(residual, cast(torch.Tensor, factor), scale, importance)
            values_product = values @ rotated
            scale = _refit(residual, values, values_product, keep, ridge)
            residual -= values.mul_(scale.float()[:, None])
            product -= values_product.mul_(scale.float()[:, None])
            del values, values_product
            yield Block(_pack(codes, scale), bstk.TRELLIS, BITS, _row_sums(product, residual).clamp_min(0))

    @staticmethod
    def rebuild(
        payloads: Sequence[bytes], kinds: Sequence[bstk.Kind], ranks: Sequence[int], shape: tuple[int, int]
    ) -> torch.Tensor:
        total = torch.zeros(shape)
        for start in range(0, len(payloads), BLOCKS):
            some = payloads[start : start + BLOCKS]
            matrix = Matrix.of(*shape, [(bstk.TRELLIS.code, BITS, payload) for payload in some])
            total += torch.from_numpy(decode_rows(matrix, bstk.TRELLIS.code, 0, matrix.rows))
        return unrotate(total)


def _damped(hessian: torch.Tensor, keep: float, ridge: float) -> torch.Tensor:
    """Return the better estimate of a hessian that `shrinkage` describes."""
    damped = keep * hessian
    damped.diagonal().add_(ridge)
    return damped


def _bounded(importance: torch.Tensor) -> torch.Tensor:
    """Divide the importances by their mean and raise small ones to 1e-3, so that no row's codes are arbitrary."""
    mean = importance.mean()
    return (importance / mean).clamp_min(1e-3) if mean > 0 else torch.ones_like(importance)


def _encode(
    residual: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, np.ndarray]:
    """Choose all codes of a block, uint8, shape (3 + m, n); return them after their table values, float32, shape (m, n).

    Columns are encoded in groups: the kernel carries the feedback inside a group, a matrix product between groups.
    """
    m, n = residual.shape
    table = np.array(TABLE, np.float32)
    # Errors count in units of the output, hence the squared scale.
    squared = importance * scale.square()
    weight = (squared / squared.mean().clamp_min(1e-38)).numpy()
    columns = residual.t().clone(memory_format=torch.contiguous_format)  # a copy also of a single row
    codes = np.empty((n, EARLIER + m), np.uint8)
    for start in range(0, n, COLUMNS_TOGETHER):
        stop = min(start + COLUMNS_TOGETHER, n)
        # To save memory, `columns` holds the errors of the columns up to `start`.
        target = columns[start:stop] + factor[:start, start:stop].t() @ columns[:start]
        codes[start:stop], errors = encode_columns(
            target.numpy(),
            columns[start:stop].numpy(),
            factor[start:stop, start:stop].contiguous().numpy(),
            table,
            scale.numpy(),
            weight,
        )
        columns[start:stop] = torch.from_numpy(errors)
    del columns
    codes = np.ascontiguousarray(codes.T)
    return _values(codes), codes


def encode_columns(
    target: np.ndarray,
    original: np.ndarray,
    feedback: np.ndarray,
    table: np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the codes of some columns, each of which makes up for part of the errors of those before it.

    Arrays are float32. Columns are contiguous: `target` (overwritten) and `original`, against which errors are measured,
    have shape (columns, rows). Entry [j, t] of `feedback` is the part of column j's error that is added to the target of
    column t > j. `scale`, positive, and `weight`, of the squared error in units of the scale, have shape (rows,).
    Returns the codes, uint8, shape (columns, 3 + rows), and the errors, shape (columns, rows).
    """
    native = library()
    if native is None:
        _warn_once()
        return reference.encode_columns(target, original, feedback, table, scale, weight)
    columns, rows = target.shape
    codes, errors = np.empty((columns, EARLIER + rows), np.uint8), np.empty((columns, rows), np.float32)
    given = [np.ascontiguousarray(array, np.float32) for array in (original, feedback, table, scale, weight)]
    original_, *rest = map(pointer, [*given, codes, errors])
    if native.bstack_trellis_encode(pointer(target), original_, columns, rows, *rest):
        raise MemoryError
    return codes, errors


@cache
def _warn_once() -> None:
    what = "The C kernels are not in use, so the trellis codec encodes some hundred times slower."
    warnings.warn(what, RuntimeWarning, stacklevel=3)


def _values(codes: np.ndarray) -> torch.Tensor:
    """Return the table values of codes (3 + m, n), float32, shape (m, n)."""
    windows = codes[EARLIER:].copy()
    for above in range(1, EARLIER + 1):
        windows |= codes[EARLIER - above : -above] << (BITS * above)
    values = np.empty(windows.shape, np.float32)
    table = np.array(TABLE, np.float32)
    for rows in _parts(windows):  # numpy makes indices of 8 bytes
        values[rows] = table[windows[rows]]
    return torch.from_numpy(values)


def _refit(
    residual: torch.Tensor, values: torch.Tensor, product: torch.Tensor, keep: float, ridge: float
) -> torch.Tensor:
    """Fit the scale of each row to the smallest output error, v H r / v H v; half precision, shape (m,).

    `product` is v times the measured hessian; H is the better estimate of it (`_damped`).
    """
    scale = torch.empty(len(values))
    for rows in _parts(values):
        damped = keep * product[rows] + ridge * values[rows]
        scale[rows] = (damped * residual[rows]).sum(1) / (damped * values[rows]).sum(1).clamp_min(1e-30)
    return to_half(scale)


def _row_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the sum of a times b over each row, shape (m,)."""
    return torch.cat([(a[rows] * b[rows]).sum(1) for rows in _parts(a)])


def _parts(matrix: torch.Tensor | np.ndarray) -> Iterator[slice]:
    """Yield rows a few at a time, so that no product of a large matrix is held whole."""
    for start in range(0, len(matrix), ROWS_TOGETHER):
        yield slice(start, start + ROWS_TOGETHER)


def _pack(codes: np.ndarray, scale: torch.Tensor) -> bytes:
    """Lay a block out: four codes to a byte, then the scales.

    A row of n codes takes q = ceil(n / 4) bytes; byte b holds columns b, b + q, b + 2 q and b + 3 q, low bits first.
    So masking a vector of bytes gives runs of neighbouring columns. Codes past column n are 0.
    """
    rows, n = codes.shape
    quarter = -(-n // 4)
    padded = np.zeros((rows, 4, quarter), np.uint8)
    padded.reshape(rows, -1)[:, :n] = codes
    packed = padded[:, 0] | padded[:, 1] << 2 | padded[:, 2] << 4 | padded[:, 3] << 6
    return packed.tobytes() + scale.numpy().astype("<f2").tobytes()
