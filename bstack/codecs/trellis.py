"""Trellis blocks: 2 bits per weight on rotated inputs, with error feedback; the default codec.

A block of an m x n matrix is m x n codes of 2 bits and one scale per row. The value of a weight depends on its own
code and on those of the four rows above it in the same column, so the 64 values of the table are chosen along a
path (trellis-coded quantisation: Marcellin and Fischer, IEEE Trans. Commun. 38, 1990; bit-shift trellis: QTIP,
arXiv 2406.11235):

    v_ij = c_(i-1)j + 4 (c_ij ^ c_(i-2)j ^ c_(i-4)j) + 16 c_(i-3)j    (four rows of codes above the first are stored)
    block = diag(scale) TABLE5[v]                                     W ~ unrotate(sum of the blocks)

The own and the oldest code enter by the same two bits, so the four ways into a state and the four out of it all have
different values. Blocks of kind trellis, with four codes and 256 values, are read but no longer written.

The path runs down the rows, because the error feedback (`bstack.numerics.feedback`) couples columns only: so each column is
still quantised with the exact feedback of all columns before it. docs/research/notebook.md has the measurements behind
every choice here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

import bstk
from bstack.codecs.contract import Block, Codec
from bstack.kernels.encode import encode_columns
from bstack.kernels.feedback import GROUP, NARROW, Feedback, feedback_of
from bstack.kernels.matrix import BLOCKS, ROTATED, Matrix
from bstack.kernels.multiply import decode_rows
from bstack.kernels.multiply import rotate as kernel_rotate
from bstack.kernels.native import library
from bstack.kernels.reference import EARLIER5, TABLE5, places
from bstack.numerics.feedback import choose_damping, factorise, spectrum_sample
from bstack.numerics.groups import to_half
from bstack.numerics.hessian import output_errors, shrinkage
from bstack.numerics.rotation import rotate, rotate_hessian, unrotate

__all__ = ["TrellisCodec"]

BITS = 2
# How many later blocks the feedback's damping considers; measured best for the first blocks and for the last two.
LATER, LATER_AT_THE_END = 1.0, 0.5
# The quantiser's range over the row's root mean square, by block, the last for all further ones: a little room for what the
# feedback adds, and more for later blocks, whose inputs have longer tails.
HEADROOM = (1.03, 1.03, 1.06, 1.12)
# The table's unit, in standard deviations of the source it was trained on.
UNIT = 0.02228
# Of the damping: a square of the form below it is rounding.
MIN_FORM = 1e-6
# Fraction of the sample in the better hessian, below which the sample's errors are multiplied out.
LEAST_KEPT = 0.02
# Numbers of which a step makes temporary ones, which the near cache then holds.
NUMBERS_TOGETHER = 2**18
# Of a matrix that is rebuilt, numbers that are decoded together: enough for all threads.
REBUILT_TOGETHER = 2**22


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
    kinds = (bstk.TRELLIS5, bstk.TRELLIS)
    calibrated_with = 2  # the depth of most cuts that people make

    planes: int = 4

    def __post_init__(self) -> None:
        self._check_number("planes", int, "1 to 16 (2 bits per weight each)", lambda planes: 1 <= planes <= 16)

    def encode(
        self, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> Iterator[Block]:
        rotate_rows = _rotation(weight)
        rotated = rotate_hessian(hessian, rotate_rows)
        keep, ridge = shrinkage(rotated, tokens)
        spectrum = spectrum_sample(_damped(rotated, keep, ridge))
        importance = _bounded(importance)
        residual = rotate_rows(weight)

        def sample_errors(form: _Form, product: torch.Tensor) -> torch.Tensor:
            """Return r H r for each row of the residual, H the sample's hessian: the order of blocks is better with it."""
            if keep < LEAST_KEPT:
                return output_errors(residual, rotated)
            better = form.square(product, residual)
            return ((better - ridge * _row_sums(residual, residual)) / keep).clamp_min(0).float()

        form: _Form | None = None
        form_later: float | None = None
        errors: torch.Tensor | None = None
        for plane in range(self.planes):
            later = LATER if self.planes - plane > 2 else LATER_AT_THE_END
            if later != form_later:
                form, form_later = None, later  # free the old factor before the new one is made
                form = _Form.of(lambda: _damped(rotated, keep, ridge), choose_damping(*spectrum, later))
                product = form.feedback.product(residual)
            form = cast(_Form, form)
            before = sample_errors(form, product) if errors is None else errors
            headroom = HEADROOM[min(plane, len(HEADROOM) - 1)]
            scale = residual.square().mean(1).sqrt().clamp_min(1e-30) * (headroom * UNIT)
            codes, values_product = _encode(product, form.feedback, scale, importance, plane)
            values = _values(codes)
            scale = form.refit(values_product, product, values, residual)
            residual -= values.mul_(scale.float()[:, None])
            product -= values_product.mul_(scale.float())
            del values, values_product
            errors = sample_errors(form, product)
            yield Block(_pack(codes, scale), bstk.TRELLIS5, BITS, before, errors)

    @staticmethod
    def rebuild(
        payloads: Sequence[bytes], kinds: Sequence[bstk.Kind], ranks: Sequence[int], shape: tuple[int, int]
    ) -> torch.Tensor:
        blocks = list(zip((kind.code for kind in kinds), ranks, payloads, strict=True))
        matrices = [Matrix.of(*shape, blocks[start : start + BLOCKS]) for start in range(0, len(blocks), BLOCKS)]
        rebuilt = torch.empty(shape)
        for some in _parts(rebuilt, REBUILT_TOGETHER):
            rows = rebuilt[some].zero_()
            for matrix in matrices:
                rows += torch.from_numpy(decode_rows(matrix, ROTATED, some.start, some.start + len(rows)))
            rows.copy_(unrotate(rows))
        return rebuilt


@dataclass(frozen=True)
class _Form:
    """The quadratic form of errors, a H b for rows a and b, from the factor that the feedback has anyway.

    With H + d I = M D M^T and the products a M and b M it is sum_j D_j (a M)_j (b M)_j - d a.b, and the feedback finds the
    products of the values as it goes: a product with H would cost as much as all the rest. Products lie as the columns
    that are encoded, float32, shape (inputs, outputs). Sums are in float64, since d a.b may be most of the first.
    """

    feedback: Feedback
    cost: torch.Tensor
    damping: float

    @classmethod
    def of(cls, hessian: Callable[[], torch.Tensor], damping: float) -> _Form:
        factor, cost, damping = factorise(hessian, damping)
        return cls(feedback_of(factor), cost, damping)

    def square(self, product: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the form of each row with itself, float64, shape (outputs,)."""
        return self._of_each(product, product, rows, rows)

    def refit(
        self, values_product: torch.Tensor, product: torch.Tensor, values: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Fit the scale of each row to the smallest output error, v H r / v H v; half precision, shape (outputs,)."""
        least = MIN_FORM * self.damping * _row_sums(values, values)
        square = torch.maximum(self._of_each(values_product, values_product, values, values), least)
        return to_half((self._of_each(values_product, product, values, residual) / square).float())

    def _of_each(
        self, a_product: torch.Tensor, b_product: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        for some in _parts(a_product):
            weighted = a_product[some] * b_product[some] * self.cost[some, None]
            total += weighted.sum(0, dtype=torch.float64)
        return total - self.damping * _row_sums(a, b)


def _damped(hessian: torch.Tensor, keep: float, ridge: float) -> torch.Tensor:
    """Return the better estimate of a hessian that `shrinkage` describes."""
    damped = keep * hessian
    damped.diagonal().add_(ridge)
    return damped


def _rotation(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what rotates rows: of many inputs the C kernel, in a third of the time that products take."""
    if weight.device.type != "cpu" or weight.shape[1] <= NARROW or library() is None:
        return rotate
    return lambda rows: torch.from_numpy(kernel_rotate(rows.numpy()))


def _bounded(importance: torch.Tensor) -> torch.Tensor:
    """Divide the importances by their mean and raise small ones to 1e-3, so that no row's codes are arbitrary."""
    mean = importance.mean()
    return (importance / mean).clamp_min(1e-3) if mean > 0 else torch.ones_like(importance)


def _encode(
    product: torch.Tensor, feedback: Feedback, scale: torch.Tensor, importance: torch.Tensor, plane: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose all codes of a block, uint8, shape (4 + m, n); return them with the product of their values with M, shape (n, m).

    Of the residual R its product P = R M is needed alone, shape (n, m): the feedback makes P_j - sum_{k<j} q_k M_kj of column j,
    where q are the scaled values chosen before. Columns are encoded in groups: the kernel carries the feedback inside a group, a
    matrix product between groups.
    """
    n, m = product.shape
    table = product.new_tensor(TABLE5)
    # Errors count in units of the output, hence the squared scale.
    squared = importance * scale.square()
    weight = squared / squared.mean().clamp_min(1e-38)
    codes = torch.empty(n, EARLIER5 + m, dtype=torch.uint8, device=product.device)
    values_product = torch.empty_like(product)
    nothing = product.new_zeros(GROUP, m)
    feedback.begin(scale)
    for start in range(0, n, GROUP):
        stop = min(start + GROUP, n)
        target = feedback.targets(product, start)
        given = target, nothing[: stop - start], feedback.inside(start), table, scale, weight
        codes[start:stop], negative = encode_columns(*given, turn=plane)
        feedback.add(start, codes[start:stop], negative)
        # What the quantiser left of its target is what the block leaves of P.
        left = target.add_(negative)
        torch.sub(product[start:stop], left, out=values_product[start:stop])
    return codes.t().contiguous(), values_product.div_(scale)


def _values(codes: torch.Tensor) -> torch.Tensor:
    """Return the table values of codes (4 + m, n), float32, shape (m, n)."""
    rows = len(codes) - EARLIER5
    values = torch.empty(rows, codes.shape[1], device=codes.device)
    table = values.new_tensor(TABLE5)
    for some in _parts(values):
        stop = min(some.stop, rows)
        at = places(codes[some.start : stop + EARLIER5]).int()  # indices take 4 bytes
        values[some] = table.index_select(0, at.view(-1)).view(at.shape)
    return values


def _row_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the sum of a times b over each row, float64, shape (m,)."""
    return torch.cat([(a[rows] * b[rows]).sum(1, dtype=torch.float64) for rows in _parts(a)])


def _parts(matrix: torch.Tensor, numbers: int = NUMBERS_TOGETHER) -> Iterator[slice]:
    """Yield rows a few at a time."""
    rows = max(1, numbers // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        yield slice(start, start + rows)


def _pack(codes: torch.Tensor, scale: torch.Tensor) -> bytes:
    """Lay a block out: four codes to a byte, then the scales.

    A row of n codes takes q = ceil(n / 4) bytes; byte b holds columns b, b + q, b + 2 q and b + 3 q, low bits first.
    So masking a vector of bytes gives runs of neighbouring columns. Codes past column n are 0.
    """
    rows, n = codes.shape
    quarter = -(-n // 4)
    four = torch.nn.functional.pad(codes, (0, 4 * quarter - n)).view(rows, 4, quarter)
    packed = four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6
    return packed.cpu().numpy().tobytes() + scale.cpu().numpy().astype("<f2").tobytes()
