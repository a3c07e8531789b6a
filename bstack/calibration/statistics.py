"""Watches a layer's matrix products, finds its linears by them, and collects the hessians of their inputs.

Whatever an architecture calls its linears, in the end a parameter is an operand of `linear`, `addmm`, `matmul`
or `bmm`. Watching those calls finds nn.Linear, GPT-2's Conv1D (inputs x outputs), and the slices of
three-dimensional expert parameters, each with the input that it was applied to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
    """The hessian of `width` inputs, on a device; `total` and `squares` are the sums of the tokens' weights and of their squares so far."""

    def __init__(self, width: int, device: torch.device | None = None):
        self.total = self.squares = 0.0
        self._hessian = torch.zeros(width, width, device=device)
        self._mirrored = True

    @property
    def tokens(self) -> int:
        """Return the number of tokens of equal weight that would say as much."""
        return max(1, round(self.total**2 / self.squares)) if self.squares else 0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens, shape (..., inputs), each with its weight, shape (tokens,), by default 1."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if weights is None:
            self.total, self.squares = self.total + len(rows), self.squares + len(rows)
        else:
            self.total += float(weights.sum(dtype=torch.float64))
            self.squares += float(weights.double().square().sum())
            rows = rows * weights.to(rows.device).sqrt()[:, None]
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
            statistics = self._statistics.setdefault(names[0], InputStatistics(inputs.shape[-1], inputs.device))
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
