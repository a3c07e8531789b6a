"""Scores weights as outliers, which stretch the range of their group: a leave-one-out test."""

from __future__ import annotations

import functools

import torch

__all__ = ["MAX_OF_A_GROUP", "outlier_scores"]

# The most outliers of a group.
MAX_OF_A_GROUP = 3


def outlier_scores(weight: torch.Tensor, cost: torch.Tensor, group: int, max_code: int) -> torch.Tensor:
    """Compute how much each group's error falls when one more weight is left out of it.

    A group of range r, quantised in `max_code` steps, has errors of variance (r / max_code)^2 / 12, each weighed by its column's
    cost. Leaving out a weight at an end of the range takes its own error away, and makes the range smaller for all others.
    The end that helps more goes first, three times. Scores fall within a group: where a second step gains more than the
    first, which is so for two equal extremes, both have the mean. Other weights score 0.

    SpQR (arXiv 2306.03078, section 4.1) quantises each group anew for each weight left out; this is what that comes to on
    average over the places of the codes, at a sixteenth of the work, and without the luck of single roundings.

    Parameters
    ----------
    weight : torch.Tensor
        Columns in the order of the groups; float32, shape (rows, columns).
    cost : torch.Tensor
        Of a squared error in each column, float32, shape (columns,).
    group : int
        Columns of a group; the last may have fewer.
    max_code : int
        The largest code.

    Returns
    -------
    torch.Tensor
        Squared output error, float32, shape (rows, columns).
    """
    rows, columns = weight.shape
    groups = -(-columns // group)
    missing = groups * group - columns
    if missing:
        # They cost nothing and lie inside the range, even when the ends are left out.
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
    return (values.gather(2, high) - values.gather(2, low)).square_() * left


def _falling(gains: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the slopes of the least concave curve above the sums of the gains."""

    def mean(start: int, stop: int) -> torch.Tensor:
        return functools.reduce(torch.add, gains[start:stop]) / (stop - start)

    count = len(gains)
    slopes = []
    for at in range(count):
        best = [
            torch.stack([mean(start, stop) for stop in range(at + 1, count + 1)]).amax(0) for start in range(at + 1)
        ]
        slopes.append(torch.stack(best).amin(0))
    return slopes
