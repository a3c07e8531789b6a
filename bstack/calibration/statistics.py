"""Hessians of the inputs of a layer's linears."""

from __future__ import annotations

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
    tokens : int
        Number of rows of X so far.
    """

    def __init__(self, width: int):
        self.tokens = 0
        self._hessian = torch.zeros(width, width)
        self._mirrored = True

    def add(self, inputs: torch.Tensor) -> None:
        """Add tokens; `inputs` has shape (..., inputs)."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        # X^T X is symmetric, so strips from the diagonal downwards save almost half the work.
        for start in range(0, rows.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            self._hessian[start:, strip].addmm_(rows[:, start:].t(), rows[:, strip])
        self.tokens += rows.shape[0]
        self._mirrored = False

    @property
    def hessian(self) -> torch.Tensor:
        """Return X^T X summed over the tokens, float32, shape (inputs, inputs)."""
        if not self._mirrored:
            for start in range(STRIP, self._hessian.shape[0], STRIP):
                strip = slice(start, start + STRIP)
                self._hessian[:start, strip] = self._hessian[strip, :start].t()
            self._mirrored = True
        return self._hessian


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
    _seen: dict[tuple, tuple[torch.Tensor, str]] = field(default_factory=dict)

    def start_batch(self) -> None:
        """Forget the tensors seen, whose memory the next batch may reuse."""
        self._seen.clear()

    def report(self, operand: Operand, inputs: torch.Tensor, _output: torch.Tensor, _part: int | None = None) -> None:
        """Record one product (the callback of ProductWatch)."""
        if inputs.numel() == 0:
            return  # an expert without a token in this batch; all empty tensors share one address
        self.operands.setdefault(operand.name, operand)
        key = (inputs.data_ptr(), inputs.shape, inputs.stride())
        # Keep the tensor, so that no other can get its address within the batch.
        _, leader = self._seen.setdefault(key, (inputs, operand.name))
        if leader == operand.name:
            if operand.name not in self._statistics:
                width = inputs.shape[-1]
                self._statistics[operand.name] = InputStatistics(width)
            self._statistics[operand.name].add(inputs)
        self._leaders.setdefault(operand.name, leader)

    def statistics(self, name: str) -> InputStatistics:
        """Return the statistics of a linear's input."""
        return self._statistics[self._leaders[name]]


def gather(stream: LayerStream, index: int, parameters: dict[str, torch.Tensor]) -> HessianTable:
    """Run every batch through the current layer and collect the hessians of its linears' inputs.

    Parameters
    ----------
    stream : LayerStream
        In front of layer `index`, whose weights are loaded.
    index : int
        The layer.
    parameters : dict of str to torch.Tensor
        The layer's parameters of two and three dimensions, by full name.
    """
    table = HessianTable()
    watch = ProductWatch(parameters, table.report)
    for number in range(len(stream.calls())):
        table.start_batch()
        with torch.no_grad(), watch:
            stream.run(index, number)
    table.start_batch()
    return table
