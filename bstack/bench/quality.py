"""Quality of a model on windows of tokens: perplexity, and the distance from a reference."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

import bstk
from bstack.bench.reference import Reference
from bstack.eval.divergence import divergence
from bstack.eval.estimates import Estimate, mean_estimate, percentile_estimate, perplexity_estimate

__all__ = ["Quality", "Scores"]


@dataclass(frozen=True)
class Quality:
    """What the table shows of one model.

    Attributes
    ----------
    perplexity : Estimate
    kld, kld_99 : Estimate or None
        Mean and 99th percentile of the divergence from the reference, nats per token.
    same_top : Estimate or None
        Share of the positions at which both find the same token most likely.
    """

    perplexity: Estimate
    kld: Estimate | None = None
    kld_99: Estimate | None = None
    same_top: Estimate | None = None

    def to_json(self) -> dict[str, dict[str, float | None] | None]:
        """As plain JSON values."""
        return {f.name: e and e.to_json() for f in fields(self) for e in [getattr(self, f.name)]}

    @classmethod
    def from_plain(cls, pairs: dict[str, list[float | None] | None]) -> Quality:
        """What ``vars`` of a quality has become on its way through JSON; unlike `to_json`, that keeps infinity."""
        return cls(**{name: pair and Estimate(*pair) for name, pair in pairs.items()})


class Scores:
    """Collects one window's logits after the other.

    Every position but the last of a window counts, in all figures: those that predict a token of the window.

    Parameters
    ----------
    windows : torch.Tensor
        Token ids, int64, shape (windows, length), length at least 2.
    reference : Reference or None
        What to compare with.
    """

    def __init__(self, windows: torch.Tensor, reference: Reference | None):
        self._windows = windows
        self._reference = reference
        shape = (len(windows), windows.shape[1] - 1)
        self._surprise, self._kl, self._same = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)

    def add(self, number: int, logits: torch.Tensor) -> None:
        """Take the logits of window `number`, floating, shape (length, vocabulary)."""
        logits = logits[:-1].float()
        self._surprise[number] = torch.nn.functional.cross_entropy(logits, self._windows[number, 1:], reduction="none")
        if self._reference is not None:
            if self._reference.shape[2] != logits.shape[1]:
                raise bstk.UsageError(
                    f"the reference has a vocabulary of {self._reference.shape[2]}, this model one of {logits.shape[1]}. "
                    "Compare a file with the model it was made from."
                )
            compared = divergence(self._reference.window(number), logits)
            self._kl[number], self._same[number] = compared.kl, compared.same_top

    def quality(self) -> Quality:
        """The figures, after all windows."""
        perplexity = perplexity_estimate(self._surprise)
        if self._reference is None:
            return Quality(perplexity)
        return Quality(
            perplexity, mean_estimate(self._kl), percentile_estimate(self._kl, 99), mean_estimate(self._same)
        )
