"""Quality of a model on windows of tokens: perplexity, and the divergence from a reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.bench.reference import Reference, ReferenceWriter, cached, file_bytes, write_reference
from bstack.eval.divergence import divergence
from bstack.eval.estimates import Estimate, mean_estimate, percentile_estimate, perplexity_estimate
from bstack.eval.streamed import altered, run_streamed, to_bfloat16
from bstack.models.skeleton import Skeleton

__all__ = ["Quality", "Scores", "original_reference", "reference_key"]


@dataclass(frozen=True)
class Quality:
    """Perplexity, mean and 99th percentile of the divergence in nats per token, fraction of equal likeliest tokens."""

    perplexity: Estimate
    kld: Estimate | None = None
    kld_99: Estimate | None = None
    same_top: Estimate | None = None

    def to_json(self) -> dict[str, dict[str, float | None] | None]:
        """Return plain JSON values; those that are not finite become None."""
        return {f.name: e and e.to_json() for f in fields(self) for e in [getattr(self, f.name)]}

    @classmethod
    def from_plain(cls, pairs: dict[str, Any]) -> Quality:
        """Read what ``vars`` of a quality becomes in Python's JSON, which keeps infinity and NaN."""
        return cls(**{name: pair and Estimate(*pair) for name, pair in pairs.items()})


class Scores:
    """Collect the logits of one window after the other.

    Every position but the last of a window counts, in all figures: those that predict a token of the window.
    """

    def __init__(self, windows: torch.Tensor, reference: Reference | None):
        self._windows = windows
        self._reference = reference
        shape = (len(windows), windows.shape[1] - 1)
        self._nll, self._kl, self._same = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)

    def add(self, number: int, logits: torch.Tensor) -> None:
        """Take the logits of window `number`, floating, shape (length, vocabulary)."""
        logits = logits[:-1].float()
        self._nll[number] = torch.nn.functional.cross_entropy(logits, self._windows[number, 1:], reduction="none")
        if self._reference is not None:
            if self._reference.shape[2] != logits.shape[1]:
                raise bstk.UsageError(
                    f"the reference has a vocabulary of {self._reference.shape[2]}, this model one of "
                    f"{logits.shape[1]}.",
                    hint="Compare a file with the model it was made from.",
                )
            compared = divergence(self._reference.window(number), logits)
            self._kl[number], self._same[number] = compared.kl, compared.same_top

    def quality(self) -> Quality:
        """Return the figures, after all windows."""
        perplexity = perplexity_estimate(self._nll)
        if self._reference is None:
            return Quality(perplexity)
        kl = self._kl
        return Quality(perplexity, mean_estimate(kl), percentile_estimate(kl, 99), mean_estimate(self._same))


def reference_key(skeleton: Skeleton, windows: torch.Tensor) -> str:
    """Digest what decides the log probabilities: the checkpoint, its code, the token ids, and the versions."""
    code = skeleton.checkpoint.code
    about = {
        "model": skeleton.checkpoint.provenance(),
        "windows": list(windows.shape),
        "ids": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        **({} if code is None else {"code": code.to_json()}),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def original_reference(
    skeleton: Skeleton, windows: torch.Tensor, scratch: Path, progress: Callable[[], None] = lambda: None
) -> Reference:
    """Open the cached reference of an original model on these windows, or make it with one layer in memory at a time.

    Its ``extra`` holds the ``original``'s own quality and the ``noise_floor``: the quality of the same model with
    weights and arithmetic in bfloat16 instead of float32. A smaller divergence than that is not worth bytes.
    `progress` is called after each layer of both passes.
    """
    key = reference_key(skeleton, windows)
    vocabulary = skeleton.checkpoint.config.get_text_config().vocab_size

    def make(path: Path) -> Reference:
        own = Scores(windows, None)

        def fill(writer: ReferenceWriter) -> None:
            def take(number: int, logits: torch.Tensor) -> None:
                writer.add(number, logits)
                own.add(number, logits)

            run_streamed(skeleton, windows, take, progress=progress)

        def extra(unfinished: Reference) -> dict[str, Any]:
            rounded = Scores(windows, unfinished)
            run_streamed(skeleton, windows, rounded.add, loaded=altered(skeleton, to_bfloat16), progress=progress)
            return {"original": vars(own.quality()), "noise_floor": vars(rounded.quality())}

        return write_reference(path, key, len(windows), fill, extra)

    windows_count, length = windows.shape
    return cached(key, file_bytes(windows_count, length, vocabulary), scratch, make)
