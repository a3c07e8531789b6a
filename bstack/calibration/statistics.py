"""Hessians of the inputs of a layer's linears."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from bstack.calibration.products import Operand, ProductWatch
from bstack.calibration.stream import LayerStream

__all__ = ["HessianTable", "InputStatistics", "gather"]

STRIP = 384


class InputStatistics:
    """The hessian of one distinct input.

    Parameters
    ----------
    width : int
        Number of inputs.

    Attributes
    ----------
    total, squares : float
        Sum of the weights so far, and of their squares.
    """

    def __init__(self, width: int):
        self.total = self.squares = 0.0
        self._hessian = torch.zeros(width, width)
        self._mirrored = True

    @property
    def tokens(self) -> int:
        """Return how many tokens of equal weight say as much: the number of tokens where all weigh the same."""
        return max(1, round(self.total**2 / self.squares)) if self.squares else 0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens; `inputs` has shape (..., inputs), `weights` one value for each, 1 by default."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if weights is None:
            self.total, self.squares = self.total + len(rows), self.squares + len(rows)
        else:
            self.total += float(weights.sum(dtype=torch.float64))
            self.squares += float(weights.double().square().sum())
            rows = rows * weights.sqrt()[:, None]
        # X^T X is symmetric, so strips from the diagonal downwards save almost half the work.
        for start in range(0, rows.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            self._hessian[start:, strip].addmm_(rows[:, start:].t(), rows[:, strip])
        self._mirrored = False

    @property
    def hessian(self) -> torch.Tensor:
        """Return `tokens` times the weighted mean of x x^T, float32, shape (inputs, inputs)."""
        if not self._mirrored:
            for start in range(STRIP, self._hessian.shape[0], STRIP):
                strip = slice(start, start + STRIP)
                self._hessian[:start, strip] = self._hessian[strip, :start].t()
            self._mirrored = True
        return self._hessian if self.total == self.squares else self._hessian * (self.tokens / self.total)


@dataclass
class HessianTable:
    """Statistics of all linears of a layer; linears that read the same input share one entry.

    Attributes
    ----------
    operands : dict of str to Operand
        Every linear that was seen, by name, in the order in which the layer used them.
    """

    operands: dict[str, Operand] = field(default_factory=dict)
    _leaders: dict[str, str] = field(default_factory=dict)
    _statistics: dict[str, InputStatistics] = field(default_factory=dict)
    _seen: dict[tuple, tuple[torch.Tensor, list[str]]] = field(default_factory=dict)

    def finish_batch(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Add the inputs of a batch, and forget them; `weights` are those of its tokens, by linear.

        Linears that read the same input share the mean of their weights.
        """
        for inputs, names in self._seen.values():
            statistics = self._statistics.setdefault(names[0], InputStatistics(inputs.shape[-1]))
            known = [weights[name] for name in names if name in weights] if weights else []
            fit = [one for one in known if len(one) == inputs.numel() // inputs.shape[-1]]
            statistics.add(inputs, functools.reduce(torch.add, fit) / len(fit) if fit else None)
        self._seen.clear()

    def report(self, operand: Operand, inputs: torch.Tensor, _output: torch.Tensor, _part: int | None = None) -> None:
        """Record one product (the callback of ProductWatch)."""
        if inputs.numel() == 0:
            return  # an expert without a token in this batch; all empty tensors share one address
        self.operands.setdefault(operand.name, operand)
        key = (inputs.data_ptr(), inputs.shape, inputs.stride())
        # Keep the tensor, so that no other can get its address within the batch.
        _, names = self._seen.setdefault(key, (inputs, []))
        names.append(operand.name)
        self._leaders.setdefault(operand.name, names[0])

    def statistics(self, name: str) -> InputStatistics:
        """Return the statistics of a linear's input."""
        return self._statistics[self._leaders[name]]


def gather(
    stream: LayerStream,
    index: int,
    parameters: dict[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> HessianTable:
    """Run every batch through the current layer and collect the hessians of its linears' inputs.

    Parameters
    ----------
    stream : LayerStream
        In front of layer `index`, whose weights are loaded.
    index : int
        The layer.
    parameters : dict of str to torch.Tensor
        The layer's parameters of two and three dimensions, by full name.
    weights : mapping of str to torch.Tensor, optional
        By linear: weights of the first tokens of all batches (`Sensitivity.tokens`); the others, and the tokens of other
        linears, weigh 1.
    """
    table = HessianTable()
    watch = ProductWatch(parameters, table.report)
    own = {name: given for name, given in (weights or {}).items() if name.partition("[")[0] in parameters}
    start = 0
    for number, batch in enumerate(stream.batches):
        with torch.no_grad(), watch:
            stream.run(index, number)
        stop = start + batch.numel()
        table.finish_batch({name: _filled(given[start:stop], stop - start) for name, given in own.items()})
        start = stop
    return table


def _filled(weights: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([weights, torch.ones(length - len(weights))])
