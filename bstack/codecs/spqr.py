"""SpQR: small groups of 3 or 4 bits with outliers apart (arXiv 2306.03078), and trellis blocks on top of them.

    level 0   dense part: groups of inputs with a scale and a zero point each, both codes of 3 bits
    level 1   outliers: what the dense part lacks at the places where a group would suffer most
    above     trellis blocks of what these two leave

The encoder takes the columns in order of falling second moment and feeds each column's error on to the later ones
(`bstack.numerics.feedback`). Which weights are outliers is decided before: a leave-one-out test
(`bstack.numerics.outliers`) in units of the predicted divergence, with one threshold for all matrices of a layer.
docs/quality.md has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import bstk
from bstack.codecs.contract import Block, Codec, Task
from bstack.codecs.trellis import TrellisCodec
from bstack.errors import CodecError
from bstack.kernels.matrix import PLAIN, Matrix
from bstack.kernels.matrix import TRELLIS as TRELLIS_CODE
from bstack.kernels.multiply import decode_rows
from bstack.kernels.spqr import GROUPS, ROWS, WIDEST, Dense, Outliers, dense_bytes, outlier_bytes, rank_of
from bstack.numerics.errors import output_errors
from bstack.numerics.feedback import factorise
from bstack.numerics.groups import LEVELS, Coded, code_group, fit_groups, fit_levels, refit_groups
from bstack.numerics.outliers import outlier_scores
from bstack.numerics.rotation import unrotate
from bstack.numerics.shrinkage import shrinkage
from bstack.settings import Settings

__all__ = ["Damped", "SpqrCodec", "code_columns", "damped"]

# Share of the weights that the paper keeps apart, at most.
AUTO_SHARE = 0.01
PLANES = 2
MOST_PLANES = 14  # a stack has 16 blocks
# Of the mean of the second moment's diagonal, as in GPTQ.
DAMPING = 0.01
# Scales tried for each row and group, the nearest of the eight, and zero points with each of them.
SCALES, ZEROS = 4, 3
ROUNDS = 2
# Thresholds are numbered by this many to an octave, from 2^-LOWEST on.
TO_AN_OCTAVE, LOWEST = 1024, 200
PLACES = 2 * LOWEST * TO_AN_OCTAVE
BYTES_OF_AN_OUTLIER = 4


class SpqrCodec(Codec):
    """SpQR blocks and residual planes.

    Parameters
    ----------
    bits : int
        Of a code, 3 or 4.
    group : int
        Inputs that share a scale and a zero point: 16, 32, 64 or 128.
    outliers : float or "auto"
        Share of the weights of each layer that are kept apart, 0 to .5; auto is 1 %.
    bpw : float, optional
        Bits per weight that dense part and outliers of each layer may take, everything counted; in place of `outliers`.
    planes : int
        Trellis blocks on top, 0 to 14.
    threshold : int, optional
        What `for_layer` found; without it each matrix has the share for itself.

    Raises
    ------
    bstack.errors.CodecError
    """

    name = "spqr"
    kinds = (bstk.SPQR,)

    def __init__(
        self, bits: int = 4, group: int = 16, outliers: float | str | None = None, bpw: float | None = None,
        planes: int = PLANES, threshold: int | None = None,
    ):  # fmt: skip
        if bits not in (3, 4):
            raise CodecError(f"bits is {bits}; the spqr codec takes 3 or 4.")
        if group not in GROUPS:
            raise CodecError(f"group is {group}; the spqr codec takes {', '.join(map(str, GROUPS))}.")
        if not 0 <= planes <= MOST_PLANES:
            raise CodecError(f"planes is {planes}; the spqr codec takes 0 to {MOST_PLANES} (2 bits per weight each).")
        if bpw is not None and outliers is not None:
            raise CodecError(f"outliers is {outliers} and bpw is {bpw}; give one: --bpw decides how many outliers there are.")
        outliers = "auto" if outliers is None else outliers
        if outliers != "auto" and not (isinstance(outliers, (int, float)) and 0 <= outliers <= 0.5):
            raise CodecError(f"outliers is {outliers!r}; the spqr codec takes a share of the weights, 0 to 0.5, or auto.")
        least = bits + 160 / (ROWS * group)
        if bpw is not None and not least < bpw <= 16:
            raise CodecError(
                f"bpw is {bpw}; with {bits} bits in groups of {group} the dense part alone takes {least:g} bits per weight, so "
                f"--bpw takes more than that, up to 16.{' Or give --bits 3.' if bits == 4 else ''}"
            )
        self.bits, self.group, self.outliers, self.bpw, self.planes = bits, group, outliers, bpw, planes
        self.threshold = threshold

    @classmethod
    def from_settings(cls, settings: Settings) -> SpqrCodec:
        cls.refuse_foreign(settings)
        names = ("bits", "group", "outliers", "bpw", "planes")
        return cls(**{name: value for name in names if (value := getattr(settings, name)) is not None})

    def settings(self) -> dict[str, Any]:
        share = {"outliers": self.outliers} if self.bpw is None else {"bpw": self.bpw}
        return {"codec": self.name, "bits": self.bits, "group": self.group, **share, "planes": self.planes}

    def for_tables(self) -> Codec:
        """Embeddings and heads are stacks of the default codec: they are cut into finer steps."""
        return TrellisCodec()

    def for_layer(self, tasks: Iterable[Task]) -> SpqrCodec:
        """Find the threshold that gives all matrices of a layer together the outliers that they may have."""
        counts = np.zeros(PLACES, np.int64)
        shapes = []
        for task in tasks:
            shapes.append(tuple(task[0].shape))
            _check_width(shapes[-1])
            counts += np.bincount(self._places(*task[:3], task[3])[0].reshape(-1).numpy(), minlength=PLACES)
        return SpqrCodec(
            self.bits, self.group, None if self.bpw is not None else self.outliers, self.bpw, self.planes,
            _threshold(counts, self._allowed(shapes)),
        )  # fmt: skip

    def encode(
        self, weight: torch.Tensor, moment: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> Iterator[Block]:
        shape = tuple(weight.shape)
        _check_width(shape)
        places, trusted = self._places(weight, moment, tokens, importance)
        threshold = self.threshold
        if threshold is None:
            threshold = _threshold(np.bincount(places.reshape(-1).numpy(), minlength=PLACES), self._allowed([shape]))
        apart = places >= threshold
        dense, values, rows, columns, added = code_columns(weight, trusted, apart, importance, self.bits, self.group)
        residual = weight - values
        rank = rank_of(self.bits, self.group)
        yield Block(dense.pack(rank), bstk.SPQR, rank, output_errors(residual, moment))
        residual[rows, columns] -= added.float()
        outliers = Outliers(_pointer(rows, shape[0]), columns.numpy(), added.numpy())
        yield Block(outliers.pack(), bstk.OUTLIERS, 0, output_errors(residual, moment))
        if self.planes:
            yield from TrellisCodec(self.planes).encode(residual, moment, tokens, importance)

    @staticmethod
    def rebuild(
        payloads: Sequence[bytes], kinds: Sequence[bstk.Kind], ranks: Sequence[int], shape: tuple[int, int]
    ) -> torch.Tensor:
        matrix = Matrix.of(*shape, [(kind.code, rank, p) for kind, rank, p in zip(kinds, ranks, payloads, strict=True)])
        total = torch.from_numpy(decode_rows(matrix, PLAIN, 0, matrix.rows))
        if bstk.TRELLIS in kinds:
            total += unrotate(torch.from_numpy(decode_rows(matrix, TRELLIS_CODE, 0, matrix.rows)))
        return total

    def _places(
        self, weight: torch.Tensor, moment: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> tuple[torch.Tensor, Damped]:
        """Each weight's score as an outlier, numbered on a logarithmic scale: int64, shape (outputs, inputs)."""
        trusted = damped(moment, tokens)
        scores = outlier_scores(weight[:, trusted.order], trusted.cost, self.group, 2**self.bits - 1)
        # Half the importance, by token: the predicted divergence, in the same unit for all matrices of a layer.
        scores *= (_bounded(importance) * (0.5 / max(tokens, 1)))[:, None]
        numbers = ((scores.double().clamp_min(1e-300).log2() + LOWEST) * TO_AN_OCTAVE).clamp_(0, PLACES - 1).long()
        places = torch.empty_like(numbers)
        places[:, trusted.order] = numbers
        return places, trusted

    def _allowed(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Outliers that matrices of these shapes may have."""
        weights = sum(math.prod(shape) for shape in shapes)
        if self.bpw is None:
            return int((AUTO_SHARE if self.outliers == "auto" else self.outliers) * weights)
        fixed = sum(dense_bytes(*shape, rank_of(self.bits, self.group)) + outlier_bytes(shape[0], 0) for shape in shapes)
        room = int(self.bpw * weights / 8 - fixed)
        if room < 0:
            raise CodecError(
                f"bpw is {self.bpw}, but the {len(shapes)} matrices of a layer here take {8 * fixed / weights:.4f} bits per weight "
                "without any outlier, with their row pointers and the order of their inputs counted. Give more"
                f"{', or --bits 3' if self.bits == 4 else ''}."
            )
        return room // BYTES_OF_AN_OUTLIER


class Damped(NamedTuple):
    """A second moment made ready for feedback.

    Attributes
    ----------
    order : torch.Tensor
        Columns by falling second moment, int64, shape (inputs,).
    factor : torch.Tensor
        The feedback factor of the columns in that order (`factorise`), shape (inputs, inputs).
    cost : torch.Tensor
        What an error in each costs, shape (inputs,).
    """

    order: torch.Tensor
    factor: torch.Tensor
    cost: torch.Tensor


def damped(moment: torch.Tensor, tokens: int) -> Damped:
    """Shrink, order and factorise a second moment, float32, shape (inputs, inputs)."""
    kept, ridge = shrinkage(moment, tokens)
    order = moment.diagonal().argsort(stable=True, descending=True)
    trusted = kept * moment[order][:, order]
    damping = ridge + DAMPING * float(trusted.diagonal().mean())
    return Damped(order, *factorise(trusted, damping if damping > 0 else 1.0))


def code_columns(
    weight: torch.Tensor, trusted: Damped, apart: torch.Tensor, importance: torch.Tensor, bits: int, group: int
) -> tuple[Dense, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code all columns, group after group, each with the feedback of those before it.

    Parameters
    ----------
    weight : torch.Tensor
        Float32, shape (outputs, inputs).
    trusted : Damped
    apart : torch.Tensor
        True for outliers; bool, shape (outputs, inputs).
    importance : torch.Tensor
        Of the outputs, shape (outputs,); weighs the rows that share a second level.
    bits, group : int

    Returns
    -------
    dense : Dense
    values : torch.Tensor
        What `dense` stands for, float32, shape (outputs, inputs).
    rows, columns : torch.Tensor
        Places of the outliers, by row and then by column, int64.
    added : torch.Tensor
        What the outliers add there, float16.
    """
    m, n = weight.shape
    order, most = trusted.order, 2**bits - 1
    # Rows in whole tiles: the last one again, without weight.
    rows = torch.arange(-(-m // ROWS) * ROWS).clamp_max(m - 1)
    original = weight[rows][:, order].t().contiguous()
    kept = (~apart)[rows][:, order].t().float().contiguous()
    share = _bounded(importance)
    share = share[rows] / share.mean()
    share[m:] = 0
    errors, dense, added = (torch.empty_like(original) for _ in range(3))
    codes = np.zeros((len(rows), -(-n // group) * group), np.uint8)
    small = np.zeros((2, len(rows), -(-n // group)), np.uint8)
    levels = np.zeros((len(rows) // ROWS, -(-n // group), 4), np.float16)
    for number, start in enumerate(range(0, n, group)):
        here = slice(start, min(start + group, n))
        target = original[here]
        if start:
            target = target + trusted.factor[:start, here].t() @ errors[:start]
        found = _code(target, original[here], trusted.factor[here, here], trusted.cost[here], kept[here], share, most)
        errors[here], dense[here], added[here] = found.coded.errors, found.coded.dense, found.coded.added
        codes[:m, here] = found.coded.codes.t()[:m].to(torch.uint8).numpy()
        small[:, :m, number] = found.numbers[:, :m].to(torch.uint8).numpy()
        levels[:, number] = found.levels.numpy()
    values, difference = torch.empty_like(weight), torch.empty_like(weight)
    values[:, order], difference[:, order] = dense.t()[:m], added.t()[:m]
    # An outlier that adds nothing needs no place.
    places = ((difference != 0) & apart).nonzero(as_tuple=True)
    packed = Dense(order.numpy(), codes, small[0], small[1], levels)
    return packed, values, *places, difference[places].half()


class _Found(NamedTuple):
    coded: Coded
    numbers: torch.Tensor
    levels: torch.Tensor


def _code(
    target: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor, cost: torch.Tensor, kept: torch.Tensor,
    share: torch.Tensor, most: int,
) -> _Found:
    """Code one group: fit it, quantise the fits of 16 rows together, try the nearest of those in earnest; then once more.

    The second round starts from the codes of the first, and is kept for those tiles that it makes better.
    """
    best = None
    scale, zero = fit_groups(target, cost, kept, most)
    weighed = cost[:, None] * kept
    mass = weighed.sum(0)
    for turn in range(ROUNDS):
        if turn:
            wanted = target + factor.triu(1).t() @ best.coded.errors
            scale, zero = refit_groups(wanted, best.coded.codes, weighed, scale)
        # A relative error of the scale counts by the group's power, an error of the zero point by its mass.
        power = (weighed * target.square()).sum(0) / scale.square()
        wanted = torch.stack([scale, zero]), torch.stack([power, mass * scale.square()]) * share
        levels = torch.stack(fit_levels(*map(_tiles, wanted)), 2).transpose(0, 1).flatten(1)
        numbers, scales, zeros = _candidates(scale, zero, levels, most)
        coded = code_group(target, weight, factor, cost, kept, scales, zeros, most)
        choice = coded.cost.argmin(0)
        chosen = coded.chosen(choice)
        numbers = numbers.gather(1, choice.expand(2, 1, -1)).squeeze(1)
        found = _Found(chosen, numbers, levels)
        if best is not None:
            better = (_tiles(share * chosen.cost).sum(1) < _tiles(share * best.coded.cost).sum(1))
            by_row = better.repeat_interleave(ROWS)
            mixed = Coded(*(torch.where(by_row, new, old) for new, old in zip(chosen, best.coded, strict=True)))
            found = _Found(
                mixed, torch.where(by_row, numbers, best.numbers), torch.where(better[:, None], levels, best.levels)
            )
        best = found
    return best


def _candidates(
    scale: torch.Tensor, zero: torch.Tensor, levels: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The stored scales nearest to what each row wants, with the zero points that keep the middle of the range.

    Returns
    -------
    numbers : torch.Tensor
        Scale and zero codes, float32, shape (2, candidates, rows).
    scales, zeros : torch.Tensor
        What they stand for, float32, shape (candidates, rows).
    """
    base, step = (levels[:, i].float().repeat_interleave(ROWS) for i in (0, 1))
    near = _near(scale, base, step, SCALES)
    # As a decoder computes them: in float32, a product and a sum.
    scales = base + step * near
    wanted = most / 2 - (most / 2 - zero) * scale / torch.where(scales == 0, 1.0, scales)
    base, step = (levels[:, i].float().repeat_interleave(ROWS) for i in (2, 3))
    near_zero = _near(wanted, base, step, ZEROS).transpose(0, 1).flatten(0, 1)
    near, scales = near.repeat_interleave(ZEROS, 0), scales.repeat_interleave(ZEROS, 0)
    return torch.stack([near, near_zero]), scales, base + step * near_zero


def _near(wanted: torch.Tensor, base: torch.Tensor, step: torch.Tensor, count: int) -> torch.Tensor:
    """The codes of the nearest values base + step * code; float32, one more axis in front."""
    place = (wanted - base) / torch.where(step == 0, 1.0, step)
    first = (place - (count - 2) / 2).floor_() if count % 2 == 0 else (place - (count - 1) / 2).round_()
    return first.clamp_(0, LEVELS - count) + torch.arange(count, dtype=torch.float32).reshape(-1, *[1] * wanted.dim())


def _tiles(by_row: torch.Tensor) -> torch.Tensor:
    return by_row.unflatten(-1, (-1, ROWS))


def _bounded(importance: torch.Tensor) -> torch.Tensor:
    """Importance with none so small that its row would not count at all; 1 where there is none."""
    mean = float(importance.mean())
    return importance.clamp_min(1e-3 * mean) if mean > 0 else torch.ones_like(importance)


def _threshold(counts: np.ndarray, allowed: int) -> int:
    """The smallest threshold above 0 that no more than `allowed` of the counted scores reach."""
    reaching = counts[::-1].cumsum()[::-1]
    return max(1, int((reaching > allowed).sum()))


def _pointer(rows: torch.Tensor, count: int) -> np.ndarray:
    pointer = np.zeros(count + 1, np.uint32)
    pointer[1:] = torch.bincount(rows, minlength=count).cumsum(0).numpy()
    return pointer


def _check_width(shape: tuple[int, int]) -> None:
    if shape[1] > WIDEST:
        raise CodecError(
            f"a linear has {shape[1]} inputs; the spqr codec numbers them with 16 bits, up to {WIDEST}. Use --codec trellis."
        )
