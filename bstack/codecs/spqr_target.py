"""Checks which bits per weight SpQR stacks can have, dense part and outliers together, from bits, group and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bstack.kernels.spqr import ROWS, STATISTICS, dense_bytes, outlier_bytes, rank_of
from bstack.numerics.outliers import MAX_OF_A_GROUP
from bstk.errors import UsageError

__all__ = ["MAX_BITS", "Range", "Shape", "check_target", "check_target_of_layers", "range_of"]

# Bits of a weight in half precision.
MAX_BITS = 16
# Bits of a code.
MIN_BITS = 3

# Outputs and inputs.
Shape = tuple[int, int]


class Range(NamedTuple):
    """Bits per weight: of the dense part alone, and with as many outliers as a group can have."""

    min: float
    max: float


def range_of(shapes: Iterable[Shape], bits: int, group: int) -> Range:
    """Return what matrices of these shapes can take together, everything counted."""
    low = high = weights = 0
    for rows, columns in shapes:
        dense = dense_bytes(rows, columns, rank_of(bits, group))
        whole, rest = divmod(columns, group)
        outliers = whole * MAX_OF_A_GROUP + min(rest, MAX_OF_A_GROUP)
        low += dense
        high += dense + outlier_bytes(rows, rows * outliers)
        weights += rows * columns
    return Range(8 * low / weights, 8 * high / weights)


def check_target(bpw: float, bits: int, group: int) -> None:
    """Refuse a target that no matrix can have, whatever its shape.

    Raises
    ------
    bstk.UsageError
    """
    dense, high = _without_shapes(bits, group)
    if not dense < bpw <= MAX_BITS:
        raise UsageError(
            f"bpw is {bpw}; with {bits} bits in groups of {group} the dense part alone takes {dense:g} bits per weight, and "
            f"outliers at most {high - dense:g} more. Allowed is more than {dense:g}, up to about {high:g}."
            f"{_fewer_bits(bpw, bits, _without_shapes(MIN_BITS, group))}"
        )


def _without_shapes(bits: int, group: int) -> Range:
    """Return about what matrices can take whose rows fill their tiles and whose columns fill their groups."""
    dense = bits + 8 * STATISTICS / (ROWS * group)
    return Range(dense, dense + 32 * MAX_OF_A_GROUP / group)


def check_target_of_layers(bpw: float, bits: int, group: int, layers: Iterable[Sequence[Sequence[Shape]]]) -> None:
    """Refuse a target that the matrices of some layer cannot have.

    Parameters
    ----------
    bpw : float
    bits, group : int
    layers : iterable
        By layer and matrix: the shapes it may have, as `bstack.codecs.Codec.check_shapes` takes them.

    Raises
    ------
    bstk.UsageError
        With the range that is good for every layer.
    """
    layers = [layer for layer in layers if layer]  # one may have no matrix that is large enough
    if not layers:
        return
    possible, certain = _ranges(layers, bits, group)
    if possible.min <= bpw <= possible.max:
        return
    # Rounded inwards, so that what the message offers is taken.
    low, high = math.ceil(certain.min * 1000) / 1000, math.floor(certain.max * 1000) / 1000
    what = (
        f"bpw is {bpw}; with {bits} bits in groups of {group} the linears of this model take at least {low:g} bits per weight, with the "
        f"order of their inputs counted, and at most {high:g}, with {MAX_OF_A_GROUP} outliers in every group."
    )
    if low > min(high, MAX_BITS):
        raise UsageError(f"{what} No value is possible: leave it out, or choose another group.")
    advice = _fewer_bits(bpw, bits, _ranges(layers, MIN_BITS, group)[1])
    raise UsageError(f"{what} Allowed is {low:g} to {min(high, MAX_BITS):g}.{advice}")


def _ranges(layers: Iterable[Sequence[Sequence[Shape]]], bits: int, group: int) -> tuple[Range, Range]:
    """Return what every layer can have: under some reading of its shapes, and under every one."""
    possible: list[Range] = []
    certain: list[Range] = []
    for layer in layers:
        readings = [[range_of([shape], bits, group) for shape in shapes] for shapes in layer]
        weights = [math.prod(shapes[0]) for shapes in layer]
        for found, lower, upper in ((possible, min, max), (certain, max, min)):
            low = _mean((lower(r.min for r in some) for some in readings), weights)
            found.append(Range(low, _mean((upper(r.max for r in some) for some in readings), weights)))
    return _common(possible), _common(certain)


def _common(ranges: Sequence[Range]) -> Range:
    return Range(max(r.min for r in ranges), min(r.max for r in ranges))


def _mean(values: Iterable[float], weights: Sequence[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _fewer_bits(bpw: float, bits: int, fewest: Range) -> str:
    """Advice to take the fewest bits, where the target is in their range."""
    return f" Or take {MIN_BITS} bits." if bits > MIN_BITS and fewest.min < bpw <= fewest.max else ""
