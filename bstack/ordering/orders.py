"""Sort the blocks of all linears into one universal stack: by gain per byte, or as the BitStack paper does.

The paper searches (arXiv 2410.23918, section 3.3): all linears stand at full depth but one, which is cut to its first i
blocks; the perplexity of a few tokens then is the score of block i, the first that is missing. Inside a level the block
whose absence hurts most comes first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["PrefixCache", "by_gain_per_byte", "by_level", "cut_scores"]


def by_gain_per_byte(
    gains: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]]
) -> list[tuple[str, int, float]]:
    """Take the best gain per byte first, levels of different linears interleaved.

    The one constraint is that block i of a linear comes before block i + 1. A weak block in front of a strong one
    is therefore scored together with it: a block's score is the best mean gain per byte of any run of blocks that
    starts with it.

    Parameters
    ----------
    gains, sizes : mapping of str to sequence
        By linear: the gain of each block, and its bytes, which are positive.

    Returns
    -------
    list of (str, int, float)
        Linear, level within the given sequences, score; ties go to the linear that comes first in `gains`.
    """

    def entry(position: int, name: str, level: int) -> tuple[float, int, str, int]:
        best, gain, size = float("-inf"), 0.0, 0
        for more_gain, more_size in zip(gains[name][level:], sizes[name][level:], strict=True):
            gain, size = gain + more_gain, size + more_size
            best = max(best, gain / size)
        return -best, position, name, level

    heap = [entry(position, name, 0) for position, name in enumerate(gains) if gains[name]]
    heapq.heapify(heap)
    order = []
    while heap:
        negative, position, name, level = heapq.heappop(heap)
        order.append((name, level, -negative))
        if level + 1 < len(gains[name]):
            heapq.heappush(heap, entry(position, name, level + 1))
    return order


def by_level(scores: Mapping[str, Sequence[float]]) -> list[tuple[str, int, float]]:
    """Order blocks as the paper does: level by level, the highest score first; arguments as for `by_gain_per_byte`."""
    blocks = [(name, level, score) for name, levels in scores.items() for level, score in enumerate(levels)]
    return sorted(blocks, key=lambda block: (block[1], -block[2]))


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
    """Score the blocks above the first of one linear: the perplexity with the blocks below each.

    `weight` is a view of the linear's weight in the model, shape (outputs, inputs), restored at the end. `prefixes` yields it
    rebuilt from the first 1, 2, ... blocks, without the whole stack. `measure` returns the perplexity of the model as it is.
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
