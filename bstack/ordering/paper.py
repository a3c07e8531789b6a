"""BitStack's search for the importance of blocks (arXiv 2410.23918, section 3.3), for comparison.

All linears stand at full depth but one, which is cut to its first i blocks; the perplexity of a few tokens then is
the score of block i, the first that is missing. Inside a level the block whose absence hurts most comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["PrefixCache", "cut_scores"]


class PrefixCache:
    """Skip the layers in front of the one that changes: their outputs are the same in every run.

    Parameters
    ----------
    layers : list of nn.Module
        The repeated layers of a model with all its weights.
    measure : callable
        Runs that model on the same tokens at every call and returns the perplexity.
    """

    def __init__(self, layers: list[nn.Module], measure: Callable[[], float]):
        self._layers, self._measure = layers, measure
        self._outputs: list[object] = []
        hooks = [layer.register_forward_hook(lambda *call: self._outputs.append(call[2])) for layer in layers]
        try:
            measure()
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def from_layer(self, index: int) -> Iterator[Callable[[], float]]:
        """Yield a function that measures the perplexity, running layer `index` and what follows."""
        for layer, output in zip(self._layers[:index], self._outputs, strict=False):
            layer.forward = lambda *args, output=output, **kwargs: output
        try:
            yield self._measure
        finally:
            for layer in self._layers[:index]:
                layer.__dict__.pop("forward", None)


def cut_scores(weight: torch.Tensor, prefixes: Iterator[torch.Tensor], measure: Callable[[], float]) -> list[float]:
    """Score the blocks above the first of one linear.

    Parameters
    ----------
    weight : torch.Tensor
        A view of the linear's weight in the model, shape (outputs, inputs); restored at the end.
    prefixes : iterator of torch.Tensor
        The weight rebuilt from the first 1, 2, ... blocks, the last one but not the whole stack.
    measure : callable
        The perplexity of the model as it is.

    Returns
    -------
    list of float
        Entry i: the perplexity with the first i + 1 blocks, which is the score of block i + 1.
    """
    whole = weight.clone()
    scores = []
    try:
        for prefix in prefixes:
            weight.copy_(prefix)
            scores.append(measure())
    finally:
        weight.copy_(whole)
    return scores
