"""Watches a layer's matrix products, finds its linears by them, and collects the hessians of their inputs.

Whatever an architecture calls its linears, in the end a parameter is an operand of `linear`, `addmm`, `matmul`
or `bmm`. Watching those calls finds nn.Linear, GPT-2's Conv1D (inputs x outputs), and the slices of
three-dimensional expert parameters, each with the input that it was applied to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bstack.calibration.stream import LayerStream

__all__ = ["HessianTable", "InputStatistics", "Operand", "ProductWatch", "gather"]

STRIP = 384


@dataclass(frozen=True)
class Operand:
    """A parameter, or one slice along its first axis, that was the weight of a product.

    Attributes
    ----------
    name : str
        Full parameter name; ``[i]`` follows it for slice i of a three-dimensional parameter.
    transposed : bool
        True when the parameter is stored as inputs x outputs.
    """

    name: str
    transposed: bool


class ProductWatch(TorchFunctionMode):
    """Report each product of a watched parameter while the context is entered.

    Parameters
    ----------
    parameters : dict of str to torch.Tensor
        The parameters to watch, loaded, of 2 or 3 dimensions.
    report : callable
        Called as ``report(operand, input, output, part)`` with the input of shape (..., inputs) and the output of
        shape (..., outputs). In a batched product `output` is that of all slices, since the model goes on with that one,
        and `part` is the slice's index in it; otherwise `part` is None.
    """

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        report: Callable[[Operand, torch.Tensor, torch.Tensor, int | None], None],
    ):
        super().__init__()
        self._report = report
        self._owners: dict[int, tuple[str, torch.Tensor]] = {}
        self._whole: dict[int, tuple[str, torch.Tensor]] = {}
        for name, parameter in parameters.items():
            if parameter.dim() == 2:
                self._owners[parameter.data_ptr()] = (name, parameter)
            elif parameter.dim() == 3:
                self._whole[parameter.data_ptr()] = (name, parameter)
                for index, part in enumerate(parameter):
                    self._owners[part.data_ptr()] = (f"{name}[{index}]", part)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "linear":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._two_dimensional(args[0] if args else kwargs["input"], weight, output)
        elif name == "addmm":
            self._two_dimensional(args[1], args[2].t(), output)
        elif name in ("matmul", "__matmul__", "mm", "bmm") and len(args) == 2:
            left, right = args
            if right.dim() == 2:
                self._two_dimensional(left, right.t(), output)
            elif right.dim() == 3 and left.dim() == 3:
                self._three_dimensional(left, right, output)
        return output

    def _two_dimensional(self, inputs: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> None:
        if (owner := self._owners.get(weight.data_ptr())) is None:
            return
        name, parameter = owner
        if weight.shape == parameter.shape and weight.stride() == parameter.stride():
            self._report(Operand(name, transposed=False), inputs, output, None)
        elif weight.shape == parameter.t().shape and weight.stride() == parameter.t().stride():
            self._report(Operand(name, transposed=True), inputs, output, None)

    def _three_dimensional(self, inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor) -> None:
        owner = self._whole.get(weights.data_ptr())
        if owner is None or owner[1].shape[0] != inputs.shape[0]:
            return
        name, parameter = owner
        transposed = weights.shape == parameter.shape and weights.stride() == parameter.stride()
        for index in range(parameter.shape[0]):
            self._report(Operand(f"{name}[{index}]", transposed), inputs[index], output, index)


class InputStatistics:
    """The hessian X^T X of `width` inputs; `tokens` counts the rows of X so far."""

    def __init__(self, width: int):
        self.tokens = 0
        self._hessian = torch.zeros(width, width)
        self._mirrored = True

    def add(self, inputs: torch.Tensor) -> None:
        """Add tokens, shape (..., inputs)."""
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
                self._statistics[operand.name] = InputStatistics(inputs.shape[-1])
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
