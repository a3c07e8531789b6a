"""What a bench run is to measure. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from bstack.bench.baselines.choice import Choice

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes
    ----------
    budgets : list of Decimal or None
        Sizes in MB; None: ten from the smallest to the whole file.
    speed, quality : bool
    text : str or None
        File, folder or hub data set; None: the default of `bstack.bench.text`.
    windows : int
    length : int or None
        Tokens in each window; None: 512, or what the model reads if that is less.
    original : str or None
        The model that the file was made from.
    force : bool
        Take another for it, too.
    against : list of Choice
        Baselines; they need the original.
    calibration : str or None
        For GPTQ; None: what the file's metadata names.
    tasks : list of str
        For lm-eval.
    trust_remote_code : bool
        Run the Python code that the model needs.
    code : str or None
        Folder or hub id with that code.
    """

    budgets: Sequence[Decimal] | None = None
    speed: bool = True
    quality: bool = True
    text: str | None = None
    windows: int = 16
    length: int | None = None
    original: str | None = None
    force: bool = False
    against: Sequence[Choice] = ()
    calibration: str | None = None
    tasks: Sequence[str] = ()
    trust_remote_code: bool = False
    code: str | None = None
