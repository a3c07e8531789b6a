"""SpQR: small groups of 3 or 4 bits with separate outliers (arXiv 2306.03078), and trellis blocks on top of them.

    level 0   dense part: groups of inputs with a scale and a zero point each, both codes of 3 bits
    next      outliers: what the dense part lacks at the weights that cost their group most; no block if there are none
    above     trellis blocks of the residual

The encoder takes the columns in order of falling diagonal of the hessian; later columns make up for the errors of earlier
ones (`bstack.numerics.feedback`). It chooses the outliers before that: by a leave-one-out test (`bstack.numerics.groups`)
in units of the predicted divergence, with one threshold for all matrices of a layer. docs/research/notebook.md has the
measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

import bstk
from bstack.codecs.contract import Block, Codec, Task
from bstack.codecs.spqr_columns import Damped, bounded, code_columns, damp
from bstack.codecs.trellis import TrellisCodec
from bstack.kernels.matrix import PLAIN, Matrix
from bstack.kernels.multiply import decode_rows
from bstack.kernels.spqr import ROWS, STATISTICS, Outliers, dense_bytes, outlier_bytes, rank_of
from bstack.numerics.groups import MAX_OF_A_GROUP, outlier_scores
from bstack.numerics.hessian import output_errors
from bstk.errors import UsageError
from bstk.kinds import MAX_SPARSE_COLUMNS, SPQR_BITS, SPQR_GROUPS, one_of

__all__ = ["SpqrCodec", "range_of"]

# The largest fraction of outliers in the paper.
AUTO_FRACTION = 0.01
MAX_PLANES = 14  # a stack has 16 blocks
# Thresholds are numbered on a logarithmic scale: this many to an octave, from 2^-LOWEST on.
TO_AN_OCTAVE, LOWEST = 1024, 200
PLACES = 2 * LOWEST * TO_AN_OCTAVE
BYTES_OF_AN_OUTLIER = 4
# Bits of a code, at least; and of a weight in half precision.
MIN_BITS, MAX_BITS = min(SPQR_BITS), 16

# Outputs and inputs.
Shape = tuple[int, int]


@dataclass(frozen=True)
class SpqrCodec(Codec):
    """SpQR blocks and residual planes.

    Parameters
    ----------
    bits : int
        Of a code, 3 or 4.
    group : int
        Inputs that share a scale and a zero point: 16, 32, 64 or 128.
    outliers : float or "auto"
        Fraction of the weights of each layer that are outliers, 0 to .5; auto is 1 %, or what `bpw` leaves room for.
    bpw : float, optional
        Bits per weight that dense part and outliers of each layer may take, everything counted; in place of a fraction.
    planes : int
        Trellis blocks on top, 0 to 14.
    threshold : int, optional
        What `for_layer` found; without it each matrix has the fraction for itself.

    Raises
    ------
    bstk.UsageError
    """

    name = "spqr"
    kinds = (bstk.SPQR,)

    bits: int = 4
    group: int = 16
    outliers: float | str = "auto"
    bpw: float | None = None
    planes: int = 2
    threshold: int | None = None

    def __post_init__(self) -> None:
        self._check_number("bits", int, one_of(SPQR_BITS), lambda bits: bits in SPQR_BITS)
        self._check_number("group", int, one_of(SPQR_GROUPS), lambda group: group in SPQR_GROUPS)
        self._check_number(
            "planes", int, f"0 to {MAX_PLANES} (2 bits per weight each)", lambda planes: 0 <= planes <= MAX_PLANES
        )
        auto = isinstance(self.outliers, str) and self.outliers == "auto"
        if self.bpw is not None and not auto:
            raise UsageError(
                f"outliers is {self.outliers} and bpw is {self.bpw}; give one: bpw decides how many outliers there are."
            )
        if not auto:
            allowed = "a fraction of the weights, 0 to 0.5, or auto"
            self._check_number("outliers", float, allowed, lambda outliers: 0 <= outliers <= 0.5)
        if self.bpw is not None:
            self._check_number("bpw", float, "a number of bits per weight", lambda bpw: not abs(bpw) > 1e6)
            _check_target(self.bpw, self.bits, self.group)

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        del settings["threshold"]
        # With a target there is no fraction to record, even if auto was given.
        return settings | {"outliers": self.outliers if self.bpw is None else None}

    def for_embeddings(self) -> Codec:
        """Return the default codec, whose stacks can be cut in finer steps."""
        return TrellisCodec()

    def check_shapes(self, layers: Iterable[Sequence[Sequence[Shape]]]) -> None:
        # Only groups cut off at a matrix's end could hold a larger fraction.
        if not isinstance(self.outliers, str) and self.outliers > (largest := MAX_OF_A_GROUP / self.group):
            raise UsageError(
                f"outliers is {self.outliers}; with groups of {self.group} it is at most {largest:g}, as at most "
                f"{MAX_OF_A_GROUP} of a group can be outliers."
            )
        layers = list(layers)
        for layer in layers:
            for shapes in layer:
                _check_width(min(shapes, key=lambda shape: shape[1]))
        if self.bpw is not None:
            _check_target_of_layers(self.bpw, self.bits, self.group, layers)

    def for_layer(self, tasks: Iterable[Task]) -> SpqrCodec:
        """Choose one threshold, at which the matrices of a layer have together the outliers that they may have."""
        prices = np.zeros(PLACES, np.int64)
        shapes = []
        for task in tasks:
            shapes.append((task[0].shape[0], task[0].shape[1]))
            _check_width(shapes[-1])
            prices += self._prices(self.outlier_places(*task)[0])
        return replace(self, threshold=_threshold(prices, self._allowed(shapes)))

    def encode(
        self, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> Iterator[Block]:
        shape = (weight.shape[0], weight.shape[1])
        _check_width(shape)
        places, damped = self.outlier_places(weight, hessian, tokens, importance)
        threshold = self.threshold
        if threshold is None:
            threshold = _threshold(self._prices(places), self._allowed([shape]))
        outlier_mask = places >= threshold
        dense, values, rows, columns, added = code_columns(
            weight, damped, outlier_mask, importance, self.bits, self.group
        )
        residual = weight - values
        rank = rank_of(self.bits, self.group)
        errors = output_errors(residual, hessian)
        yield Block(dense.pack(rank), bstk.SPQR, rank, output_errors(weight, hessian), errors)
        if len(added):
            residual[rows, columns] -= added.float()
            outliers = Outliers(_pointer(rows, shape[0]), columns.numpy(), added.numpy())
            yield Block(outliers.pack(), bstk.OUTLIERS, 0, errors, output_errors(residual, hessian))
        if self.planes:
            yield from TrellisCodec(self.planes).encode(residual, hessian, tokens, importance)

    @staticmethod
    def rebuild(
        payloads: Sequence[bytes], kinds: Sequence[bstk.Kind], ranks: Sequence[int], shape: tuple[int, int]
    ) -> torch.Tensor:
        below = sum(kind not in TrellisCodec.kinds for kind in kinds)
        blocks = zip(kinds[:below], ranks[:below], payloads[:below], strict=True)
        matrix = Matrix.of(*shape, [(kind.code, rank, payload) for kind, rank, payload in blocks])
        total = torch.from_numpy(decode_rows(matrix, PLAIN, 0, matrix.rows))
        if below < len(kinds):  # separately: a stack may have more of them than a packed matrix takes
            total += TrellisCodec.rebuild(payloads[below:], kinds[below:], ranks[below:], shape)
        return total

    def outlier_places(
        self, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> tuple[torch.Tensor, Damped]:
        """Return each weight's score as an outlier, numbered on a logarithmic scale, int64; and the damped hessian."""
        damped = damp(hessian, tokens)
        scores = outlier_scores(weight[:, damped.order], damped.cost, self.group, 2**self.bits - 1)
        # Half the importance, by token: the predicted divergence, in the same unit for all matrices of a layer.
        scores *= (bounded(importance) * (0.5 / max(tokens, 1)))[:, None]
        numbers = ((scores.double().clamp_min(1e-300).log2() + LOWEST) * TO_AN_OCTAVE).clamp_(0, PLACES - 1).long()
        places = torch.empty_like(numbers)
        places[:, damped.order] = numbers
        return places, damped

    def _prices(self, places: torch.Tensor) -> np.ndarray:
        """Return what the outliers of each score cost a matrix: their count, or with `bpw` their bytes; int64, shape (PLACES,)."""
        counts = np.bincount(places.reshape(-1).numpy(), minlength=PLACES)
        if self.bpw is None:
            return counts
        counts *= BYTES_OF_AN_OUTLIER
        counts[int(places.max())] += outlier_bytes(len(places), 0)  # a matrix's first outlier needs the row pointer
        return counts

    def _allowed(self, shapes: Sequence[Shape]) -> int:
        """Return what outliers of matrices of these shapes may cost together, in the unit of `_prices`."""
        weights = sum(math.prod(shape) for shape in shapes)
        if self.bpw is None:
            return int((AUTO_FRACTION if self.outliers == "auto" else self.outliers) * weights)
        if not shapes:
            return 0
        low = range_of(shapes, self.bits, self.group).min
        if self.bpw < low:
            raise UsageError(
                f"bpw is {self.bpw}, but the {len(shapes)} matrices of a layer here take {low:.4f} bits per "
                "weight without any outlier, with the order of their inputs counted.",
                hint=f"Give more{(', or take 3 bits' if self.bits == 4 else '')}.",
            )
        return int((self.bpw - low) * weights / 8)


def _threshold(prices: np.ndarray, allowed: int) -> int:
    """Choose the smallest threshold above 0 at which the scores that reach it cost no more than `allowed`."""
    reaching = prices[::-1].cumsum()[::-1]
    return max(1, int((reaching > allowed).sum()))


def _pointer(rows: torch.Tensor, count: int) -> np.ndarray:
    """Return where the outliers of each row begin, and the last one's end, from their rising row numbers."""
    pointer = np.zeros(count + 1, np.uint32)
    pointer[1:] = torch.bincount(rows, minlength=count).cumsum(0).numpy()
    return pointer


def _check_width(shape: Shape) -> None:
    if shape[1] > MAX_SPARSE_COLUMNS:
        raise UsageError(
            f"a linear has {shape[1]} inputs; the spqr codec numbers them with 16 bits, up to {MAX_SPARSE_COLUMNS}.",
            hint="Use the trellis codec.",
        )


class Range(NamedTuple):
    """Bits per weight: of the dense part alone, and with as many outliers as a group can have."""

    min: float
    max: float


def range_of(shapes: Iterable[Shape], bits: int, group: int) -> Range:
    """Return how many bits per weight matrices of these shapes can take together, everything counted."""
    low = high = weights = 0
    for rows, columns in shapes:
        dense = dense_bytes(rows, columns, rank_of(bits, group))
        whole, rest = divmod(columns, group)
        outliers = whole * MAX_OF_A_GROUP + min(rest, MAX_OF_A_GROUP)
        low += dense
        high += dense + outlier_bytes(rows, rows * outliers)
        weights += rows * columns
    return Range(8 * low / weights, 8 * high / weights)


def _check_target(bpw: float, bits: int, group: int) -> None:
    """Refuse a target that no matrix can have, whatever its shape."""
    dense, high = _without_shapes(bits, group)
    if not dense < bpw <= MAX_BITS:
        raise UsageError(
            f"bpw is {bpw}; with {bits} bits in groups of {group} the dense part alone takes {dense:g} bits per weight, and "
            f"outliers at most {high - dense:g} more. Allowed is more than {dense:g}, up to about {high:g}."
            f"{_fewer_bits(bpw, bits, _without_shapes(MIN_BITS, group))}"
        )


def _without_shapes(bits: int, group: int) -> Range:
    """Return the same, about, for matrices whose rows fill their tiles and whose columns fill their groups."""
    dense = bits + 8 * STATISTICS / (ROWS * group)
    return Range(dense, dense + 32 * MAX_OF_A_GROUP / group)


def _check_target_of_layers(bpw: float, bits: int, group: int, layers: Iterable[Sequence[Sequence[Shape]]]) -> None:
    """Refuse a target that the matrices of some layer cannot have; name the range that all layers can have."""
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
    """Return the range that every layer can have: under some reading of its shapes, and under each reading."""
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
    """Advise the fewest bits where the target is in their range."""
    return f" Or take {MIN_BITS} bits." if bits > MIN_BITS and fewest.min < bpw <= fewest.max else ""
