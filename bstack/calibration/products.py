"""Watch a layer's matrix products: which parameter met which input. No list of module classes is needed.

Whatever an architecture calls its linears, in the end a parameter is an operand of `linear`, `addmm`, `matmul`
or `bmm`. Watching those calls finds nn.Linear, GPT-2's Conv1D (inputs x outputs), and the slices of
three-dimensional expert parameters, each with the input that it was applied to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Operand", "ProductWatch"]


@dataclass(frozen=True)
class Operand:
    """A parameter, or one slice along its first axis, seen as the weight of a product.

    Attributes
    ----------
    name : str
        Full parameter name, with ``[i]`` behind it for slice i of a three-dimensional parameter.
    transposed : bool
        True when the parameter is kept as inputs x outputs.
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
        shape (..., outputs). In a batched product `output` is that of all slices, since only it takes part in what
        follows, and `part` is this one's index in it; else `part` is None.
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
