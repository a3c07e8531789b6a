"""Codes the columns of a matrix as SpQR's dense part and outliers: group after group, with error feedback."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch

from bstack.kernels.spqr import ROWS, Dense
from bstack.numerics.feedback import factorise
from bstack.numerics.groups import LEVELS, Coded, code_group, fit_groups, fit_levels, refit_groups
from bstack.numerics.hessian import shrinkage

__all__ = ["OUTLIER_COST", "Damped", "bounded", "code_columns", "damp"]

# Relative to the mean of the hessian's diagonal, as in GPTQ.
DAMPING = 0.01
# How much an outlier's error counts in its group's fit, against other weights, times the square of the largest code: its
# own block corrects it, so it counts less. What leaving it out costs, over what it brings, grows with that square.
OUTLIER_COST = 4.5
# Scales tried for each row and group, the nearest of the eight, and zero points with each of them.
SCALES, ZEROS = 4, 3
ROUNDS = 2


class Damped(NamedTuple):
    """A damped hessian: its columns by falling diagonal, and factor and cost (`factorise`) in that order."""

    order: torch.Tensor
    factor: torch.Tensor
    cost: torch.Tensor


def damp(hessian: torch.Tensor, tokens: int) -> Damped:
    """Shrink, order and factorise a hessian, float32, shape (inputs, inputs)."""
    keep, ridge = shrinkage(hessian, tokens)
    order = hessian.diagonal().argsort(stable=True, descending=True)
    damping = ridge + DAMPING * float((keep * hessian.diagonal()[order]).mean())
    return Damped(order, *factorise(lambda: keep * hessian[order][:, order], damping if damping > 0 else 1.0)[:2])


def code_columns(
    weight: torch.Tensor, damped: Damped, outlier_mask: torch.Tensor, importance: torch.Tensor, bits: int, group: int
) -> tuple[Dense, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code all columns, group after group, each with the feedback of those before it.

    `weight` and `outlier_mask` have shape (outputs, inputs); `importance` weighs the rows that share a second level.
    Returns the dense part, its weights, rows and columns of the outliers (by row, then by column), and what these add, float16.
    """
    m, n = weight.shape
    order, max_code = damped.order, 2**bits - 1
    # The last row fills up the last tile, without weight.
    rows = torch.arange(-(-m // ROWS) * ROWS).clamp_max(m - 1)
    original = weight[rows][:, order].t().contiguous()
    counts = torch.where(outlier_mask, OUTLIER_COST / max_code**2, 1.0)[rows][:, order].t().contiguous()
    row_weight = bounded(importance)
    row_weight = row_weight[rows] / row_weight.mean()
    row_weight[m:] = 0
    errors, dense, added = (torch.empty_like(original) for _ in range(3))
    groups = -(-n // group)
    codes, small = np.zeros((len(rows), groups * group), np.uint8), np.zeros((2, len(rows), groups), np.uint8)
    levels = np.zeros((len(rows) // ROWS, groups, 4), np.float16)
    for number, start in enumerate(range(0, n, group)):
        here = slice(start, min(start + group, n))
        target = original[here]
        if start:
            target = target + damped.factor[:start, here].t() @ errors[:start]
        found = _code(
            target, original[here], damped.factor[here, here], damped.cost[here], counts[here], row_weight, max_code
        )
        errors[here], dense[here], added[here] = found.coded.errors, found.coded.dense, found.coded.added
        codes[:m, here] = found.coded.codes.t()[:m].to(torch.uint8).numpy()
        small[:, :m, number] = found.numbers[:, :m].to(torch.uint8).numpy()
        levels[:, number] = found.levels.numpy()
    values, difference = torch.empty_like(weight), torch.empty_like(weight)
    values[:, order], difference[:, order] = dense.t()[:m], added.t()[:m]
    # An outlier that adds nothing is not stored.
    rows_out, columns_out = ((difference != 0) & outlier_mask).nonzero(as_tuple=True)
    packed = Dense(order.numpy(), codes, small[0], small[1], levels)
    return packed, values, rows_out, columns_out, difference[rows_out, columns_out].half()


class _Found(NamedTuple):
    """A coded group: scale and zero codes, shape (2, rows), and the second level, shape (tiles, 4)."""

    coded: Coded
    numbers: torch.Tensor
    levels: torch.Tensor


def _code(
    target: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    cost: torch.Tensor,
    counts: torch.Tensor,
    row_weight: torch.Tensor,
    max_code: int,
) -> _Found:
    """Code one group: fit it, quantise the fits of 16 rows together, code with the nearest of those, and do so again.

    The second round starts from the codes of the first; it is kept for the tiles that it improves.
    """
    best: _Found | None = None
    scale, zero = fit_groups(target, cost, counts, max_code)
    position_weight = cost[:, None] * counts
    mass = position_weight.sum(0)
    for _round in range(ROUNDS):
        if best is not None:
            wanted = target + factor.triu(1).t() @ best.coded.errors
            scale, zero = refit_groups(wanted, best.coded.codes, position_weight, scale)
        # The group's power weighs a relative error of the scale, its mass an error of the zero point.
        power = (position_weight * target.square()).sum(0) / scale.square()
        statistics = torch.stack([scale, zero]), torch.stack([power, mass * scale.square()]) * row_weight
        levels = torch.stack(fit_levels(*map(_tiles, statistics)), 2).transpose(0, 1).flatten(1)
        numbers, scales, zeros = _candidates(scale, zero, levels, max_code)
        coded = code_group(target, weight, factor, cost, counts, scales, zeros, max_code)
        choice = coded.cost.argmin(0)
        chosen = coded.chosen(choice)
        numbers = numbers.gather(1, choice.expand(2, 1, -1)).squeeze(1)
        if best is not None:
            better = _tiles(row_weight * chosen.cost).sum(1) < _tiles(row_weight * best.coded.cost).sum(1)
            by_row = better.repeat_interleave(ROWS)
            chosen = Coded(*(torch.where(by_row, new, old) for new, old in zip(chosen, best.coded, strict=True)))
            numbers = torch.where(by_row, numbers, best.numbers)
            levels = torch.where(better[:, None], levels, best.levels)
        best = _Found(chosen, numbers, levels)
    return cast(_Found, best)


def _candidates(
    scale: torch.Tensor, zero: torch.Tensor, levels: torch.Tensor, max_code: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the stored scales nearest to each row's own, with the zero points that keep the middle of the range.

    Returns scale and zero codes, float32, shape (2, candidates, rows), then scales and zeros, shape (candidates, rows).
    """
    base, step = (levels[:, i].float().repeat_interleave(ROWS) for i in (0, 1))
    near = _near(scale, base, step, SCALES)
    # A product and a sum in float32, as in the decoders.
    scales = base + step * near
    wanted = max_code / 2 - (max_code / 2 - zero) * scale / torch.where(scales == 0, 1.0, scales)
    base, step = (levels[:, i].float().repeat_interleave(ROWS) for i in (2, 3))
    near_zero = _near(wanted, base, step, ZEROS).transpose(0, 1).flatten(0, 1)
    near, scales = near.repeat_interleave(ZEROS, 0), scales.repeat_interleave(ZEROS, 0)
    return torch.stack([near, near_zero]), scales, base + step * near_zero


def _near(wanted: torch.Tensor, base: torch.Tensor, step: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` codes whose values base + step * code are nearest, on a new first axis; float32."""
    place = (wanted - base) / torch.where(step == 0, 1.0, step)
    first = (place - (count - 2) / 2).floor_() if count % 2 == 0 else (place - (count - 1) / 2).round_()
    return first.clamp_(0, LEVELS - count) + torch.arange(count, dtype=torch.float32).reshape(-1, *[1] * wanted.dim())


def _tiles(by_row: torch.Tensor) -> torch.Tensor:
    """Split the last axis into tiles of rows."""
    return by_row.unflatten(-1, (-1, ROWS))


def bounded(importance: torch.Tensor) -> torch.Tensor:
    """Raise small importances to a thousandth of the mean, so that every row counts; all are 1 if none is positive."""
    mean = float(importance.mean())
    return importance.clamp_min(1e-3 * mean) if mean > 0 else torch.ones_like(importance)
