"""Quantises small groups of weights, whose scales and zero points are quantised too, and finds outliers (SpQR, arXiv 2306.03078).

A weight is scale * (code - zero), codes 0 to `max_code`. Arrays of a group have the shape (positions, rows), so that what a
step needs of one position is contiguous.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

__all__ = [
    "LEVELS",
    "MAX_OF_A_GROUP",
    "Coded",
    "code_group",
    "fit_groups",
    "fit_levels",
    "outlier_scores",
    "refit_groups",
]

# Scales and zero points are codes of 3 bits.
LEVELS = 8
# Fraction of the range of a group's weights that the codes span at first: all of it, or less, clipping the extremes.
SPANS = (1.0, 0.85)
LEVEL_SPANS = (1.0, 0.85, 0.7)
REFITS = 2
# A zero point lies at most this many code ranges away, so that it is stored precisely where weights are nearly equal.
MAX_ZERO = 2
TINY = 1e-30
# The most outliers of a group.
MAX_OF_A_GROUP = 3


def to_half(numbers: torch.Tensor) -> torch.Tensor:
    """Round to half precision; numbers beyond its range become its largest."""
    largest = torch.finfo(torch.half).max
    return numbers.clamp(-largest, largest).half()


def fit_groups(
    target: torch.Tensor, cost: torch.Tensor, weight: torch.Tensor, max_code: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit scale and zero point of each row's group: least squares and rounding in turn, from several clipped ranges.

    Parameters
    ----------
    target : torch.Tensor
        What to represent, float32, shape (positions, rows).
    cost : torch.Tensor
        Of a squared error at each position, float32, shape (positions,).
    weight : torch.Tensor
        How much the error of each weight counts: 1, and less for outliers; float32, shape (positions, rows).
    max_code : int

    Returns
    -------
    scale, zero : torch.Tensor
        Float32, shape (rows,); scale positive.
    """
    outlier_mask = weight < 1
    weight = cost[:, None] * weight
    ranges = [_range(target, outlier_mask, max_code)]
    if bool(outlier_mask.any()):
        ranges.append(_range(target, torch.zeros_like(outlier_mask), max_code))
    # One more axis in front: the ranges and the fractions of them.
    middle, half, min_scale = torch.stack(ranges, 1).repeat_interleave(len(SPANS), 1)
    scale = torch.maximum(2 * half / max_code * torch.tensor(SPANS * len(ranges))[:, None], min_scale)
    zero = max_code / 2 - middle / scale
    best = torch.full((3, *scale.shape), torch.inf)
    for step in range(REFITS + 1):
        codes = (target / scale[:, None] + zero[:, None]).round_().clamp_(0, max_code)
        error = (weight * (target - scale[:, None] * (codes - zero[:, None])).square_()).sum(1)
        found = torch.stack([error, scale, zero])
        best = torch.where(error < best[0], found, best) if step else found
        if step < REFITS:
            scale, zero = refit_groups(target, codes, weight, scale)
            scale = torch.maximum(scale, min_scale)
    choice = best[0].argmin(0)[None]
    return best[1].gather(0, choice)[0], best[2].gather(0, choice)[0]


def _range(target: torch.Tensor, without: torch.Tensor, max_code: int) -> torch.Tensor:
    """Return middle and half width of what each row's weights span, and the smallest scale; shape (3, rows)."""
    high = target.masked_fill(without, -torch.inf).amax(0)
    low = target.masked_fill(without, torch.inf).amin(0)
    empty = high < low
    high, low = high.masked_fill(empty, 0.0), low.masked_fill(empty, 0.0)
    min_scale = (torch.maximum(high.abs(), low.abs()) / (MAX_ZERO * max_code)).clamp_min(TINY)
    return torch.stack([(high + low) / 2, (high - low) / 2, min_scale])


def refit_groups(
    target: torch.Tensor, codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit target ~ scale * (codes - zero) by row; where all codes are equal the scale stays as it is.

    Parameters
    ----------
    target, weight : torch.Tensor
        Float32, shape (positions, rows).
    codes : torch.Tensor
        Float32, shape (..., positions, rows).
    scale : torch.Tensor
        Float32, shape (..., rows).
    """
    total = weight.sum(0).clamp_min(TINY)
    mean, middle = (weight * target).sum(0) / total, (weight * codes).sum(-2) / total
    centred = codes - middle[..., None, :]
    spread = (weight * centred.square()).sum(-2)
    found = (weight * centred * (target - mean)).sum(-2) / spread.clamp_min(TINY)
    scale = torch.where((spread > 1e-6 * total) & (found > 0), found, scale)
    return scale, middle - mean / scale


def fit_levels(values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the second level, base + step * (0 to 7) for the numbers of each tile, as it is stored.

    Parameters
    ----------
    values : torch.Tensor
        Scales or zero points, float32, shape (..., rows of a tile).
    weight : torch.Tensor
        Of a squared error in each, float32, the same shape.

    Returns
    -------
    base, step : torch.Tensor
        Float16, shape (...).
    """
    high, low = values.amax(-1), values.amin(-1)
    total = weight.sum(-1).clamp_min(TINY)
    mean = (weight * values).sum(-1) / total
    around = values - mean[..., None]
    spans = torch.tensor(LEVEL_SPANS).reshape(-1, *[1] * high.dim())
    step = (high - low) * spans / (LEVELS - 1)
    base = (high + low) / 2 - step * (LEVELS - 1) / 2
    best = torch.full((3, *base.shape), torch.inf)
    for turn in range(REFITS + 1):
        codes = ((values - base[..., None]) / step.clamp_min(TINY)[..., None]).round_().clamp_(0, LEVELS - 1)
        error = (weight * (values - base[..., None] - step[..., None] * codes).square_()).sum(-1)
        found = torch.stack([error, base, step])
        best = torch.where(error < best[0], found, best) if turn else found
        if turn < REFITS:
            middle = (weight * codes).sum(-1) / total
            centred = codes - middle[..., None]
            spread = (weight * centred.square()).sum(-1)
            slope = (weight * centred * around).sum(-1) / spread.clamp_min(TINY)
            step = torch.where(spread > 1e-6 * total, slope, step)
            base = mean - step * middle
    choice = best[0].argmin(0)[None]
    base, step = (to_half(part.gather(0, choice)[0]) for part in best[1:])
    return base, step


class Coded(NamedTuple):
    """A coded group, for each of some candidates of scale and zero; float32, shape (positions, candidates, rows)."""

    codes: torch.Tensor
    dense: torch.Tensor  # scale * (code - zero), rounded as a decoder does
    added: torch.Tensor  # what an outlier adds to that, rounded to half precision; 0 for other weights
    errors: torch.Tensor  # original weight - stored weight
    cost: torch.Tensor  # of the dense part's errors after later columns made up for them; shape (candidates, rows)

    def chosen(self, candidate: torch.Tensor) -> Coded:
        """Return one candidate for each row; `candidate` is int64, shape (rows,). The axis of candidates is dropped."""
        index = candidate.expand(self.codes.shape[0], 1, -1)
        codes, dense, added, errors = (part.gather(1, index).squeeze(1) for part in self[:4])
        return Coded(codes, dense, added, errors, self.cost.gather(0, candidate[None]).squeeze(0))


def code_group(
    target: torch.Tensor,
    original: torch.Tensor,
    factor: torch.Tensor,
    cost: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    max_code: int,
) -> Coded:
    """Code a group position by position, each with the feedback of those before it.

    Parameters
    ----------
    target, original : torch.Tensor
        The weights with the feedback of earlier groups, and without; float32, shape (positions, rows).
    factor : torch.Tensor
        The group's own part of the feedback factor, unit upper triangular, shape (positions, positions).
    cost, weight, max_code
        As in `fit_groups`.
    scale, zero : torch.Tensor
        Float32, shape (candidates, rows). A scale may be 0.
    """
    positions = len(target)
    shape = (positions, *scale.shape)
    codes, dense, errors = torch.empty(shape), torch.empty(shape), torch.empty(shape)
    added = torch.zeros(shape)
    total = torch.zeros_like(scale)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    has_outliers = (weight < 1).any(1).tolist()
    for j in range(positions):
        wanted = target[j].expand_as(scale)
        if j:
            wanted = wanted + (factor[:j, j] @ errors[:j].view(j, -1)).view_as(scale)
        torch.addcmul(zero, wanted, inverse, out=codes[j]).round_().clamp_(0, max_code)
        torch.mul(scale, codes[j] - zero, out=dense[j])
        stored = dense[j]
        if has_outliers[j]:
            difference = to_half(wanted - stored).float()
            added[j] = torch.where(weight[j] < 1, difference, 0.0)
            stored = stored + added[j]
        torch.sub(original[j], stored, out=errors[j])
        total.add_((wanted - dense[j]).square_().mul_(weight[j]), alpha=float(cost[j]))
    return Coded(codes, dense, added, errors, total)


def outlier_scores(weight: torch.Tensor, cost: torch.Tensor, group: int, max_code: int) -> torch.Tensor:
    """Compute how much each group's error falls when one more weight is left out of it.

    A group of range r, quantised in `max_code` steps, has errors of variance (r / max_code)^2 / 12, each weighed by its column's
    cost. Leaving out a weight at an end of the range removes its own error and makes the range smaller for all others.
    The end that helps more is left out first, three times. Scores fall within a group: where a second step gains more than
    the first, as with two equal extremes, both get the mean. Other weights score 0.

    SpQR (arXiv 2306.03078, section 4.1) quantises each group again for each weight left out. This is the average of that
    over the positions of the codes, at a sixteenth of the work and without the noise of single roundings.

    Parameters
    ----------
    weight : torch.Tensor
        Columns in the order of the groups; float32, shape (rows, columns).
    cost : torch.Tensor
        Of a squared error in each column, float32, shape (columns,).
    group : int
        Columns of a group; the last may have fewer.
    max_code : int

    Returns
    -------
    torch.Tensor
        Squared output error, float32, shape (rows, columns).
    """
    rows, columns = weight.shape
    groups = -(-columns // group)
    missing = groups * group - columns
    if missing:
        # Fill up with weights that cost nothing and lie inside the range, even when its ends are left out.
        inside = weight[:, columns - group + missing :].median(1, keepdim=True).values
        weight = torch.cat([weight, inside.expand(rows, missing)], 1)
        cost = torch.cat([cost, cost.new_zeros(missing)])
    values, places = weight.reshape(rows, groups, group).sort(2)
    cost = cost.reshape(1, groups, group).expand(rows, -1, -1)
    low = torch.zeros(rows, groups, 1, dtype=torch.int64)
    high = torch.full_like(low, group - 1)
    left = cost.sum(2, keepdim=True)
    error = _error(values, low, high, left)
    taken, falls = [], []
    for _ in range(min(MAX_OF_A_GROUP, group - 1)):
        below, above = (left - cost.gather(2, places.gather(2, end)) for end in (low, high))
        without_low, without_high = _error(values, low + 1, high, below), _error(values, low, high - 1, above)
        lower = without_low < without_high
        taken.append(places.gather(2, torch.where(lower, low, high)))
        smaller = torch.where(lower, without_low, without_high)
        falls.append(error - smaller)
        error, left = smaller, torch.where(lower, below, above)
        low, high = low + lower, high - (~lower).long()
    scores = torch.zeros(rows, groups, group)
    for place, score in zip(taken, _falling(falls), strict=True):
        scores.scatter_(2, place, score / (12 * max_code**2))
    return scores.reshape(rows, -1)[:, :columns]


def _error(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Compute the squared range from value number `low` to number `high`, times the cost that is left."""
    return (values.gather(2, high) - values.gather(2, low)).square_() * left


def _falling(gains: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the slopes of the least concave curve above the sums of the gains."""

    def mean(start: int, stop: int) -> torch.Tensor:
        return functools.reduce(torch.add, gains[start:stop]) / (stop - start)

    count = len(gains)
    slopes = []
    for at in range(count):
        stops = range(at + 1, count + 1)
        best = [torch.stack([mean(start, stop) for stop in stops]).amax(0) for start in range(at + 1)]
        slopes.append(torch.stack(best).amin(0))
    return slopes
