"""Means with their standard errors. Windows are independent samples, tokens of one window are not.

The standard error of a mean over W windows is the standard deviation of the W window means (W - 1 in the divisor) over
sqrt(W): how far another sample of the same text would move the value. It does not apply to the difference of two models,
because both are measured on the same windows and most of the spread is common to them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

__all__ = ["Estimate", "mean_estimate", "percentile_estimate", "perplexity_estimate"]

RESAMPLES = 200


class Estimate(NamedTuple):
    """A measured value and its standard error, None for a single sample."""

    value: float
    error: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """Return plain JSON values; values that are not finite become None, because JSON has no others."""
        return {"value": _finite(self.value), "standard_error": _finite(self.error)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def mean_estimate(values: torch.Tensor) -> Estimate:
    """Return the mean over all tokens, shape (windows, positions), with its standard error over windows."""
    means = values.double().mean(1)
    error = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else None
    return Estimate(float(means.mean()), error)


def perplexity_estimate(nll: torch.Tensor) -> Estimate:
    """Return the exponential of the mean negative log likelihood, with its error by the delta method."""
    mean, error = mean_estimate(nll)
    value = math.exp(mean) if mean < 700 else math.inf
    return Estimate(value, None if error is None else value * error)


def percentile_estimate(values: torch.Tensor, percent: float) -> Estimate:
    """Return a percentile over all tokens, with its standard error from a bootstrap over whole windows."""
    values, fraction = values.double(), percent / 100
    value = float(values.quantile(fraction))
    if len(values) < 2:
        return Estimate(value)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(values), (RESAMPLES, len(values)), generator=generator)
    return Estimate(value, float(torch.stack([values[rows].quantile(fraction) for rows in drawn]).std()))
