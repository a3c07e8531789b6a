"""A tensor that stands for packed weights: products with it run packed.

Models apply their weights with a handful of operations (`linear`, `embedding`, `addmm`, `matmul`, an index for an expert).
Replacing the tensor rather than the modules makes every architecture run. An operation that has no packed form gets dense
weights, rebuilt for that call, with a warning once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from bstack.packed.matrix import Packed
from bstk.errors import UsageError

__all__ = ["PackedWeight"]


class PackedWeight(torch.Tensor):
    """A tensor without data that stands for a `Packed` matrix, or for several (experts)."""

    packed: Packed | Sequence[Packed]
    transposed: bool
    label: str

    @staticmethod
    def __new__(
        cls,
        packed: Packed | Sequence[Packed],
        transposed: bool,
        dtype: torch.dtype,
        name: str,
        device: torch.device | None = None,
    ) -> PackedWeight:
        first = packed[0] if isinstance(packed, Sequence) else packed
        shape: tuple[int, ...] = (first.columns, first.rows) if transposed else (first.rows, first.columns)
        if isinstance(packed, Sequence):
            shape = (len(packed), *shape)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.packed, made.transposed, made.label = packed, transposed, name
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.label}, {' x '.join(map(str, tuple(self.shape)))})"

    def rebuilt(self) -> torch.Tensor:
        """Return the dense tensor."""
        if isinstance(self.packed, Sequence):
            dense = torch.stack([packed.dense() for packed in self.packed])
        else:
            dense = self.packed.dense()
        return (dense.transpose(-1, -2) if self.transposed else dense).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ATTRIBUTES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _COPIES:
            raise UsageError(
                "packed weights cannot be copied or pickled.", hint="Load the file once more, or with mode='dense'."
            )
        packed_form = _OPERATIONS.get(func)
        result = packed_form(*args, **kwargs) if packed_form else NotImplemented
        return _dense(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dense(func, args, kwargs or {})


# Packed forms. Parameters have torch's names, since a model's code may pass them by name; `rest` are those without a packed
# form, such as `out`.


def _linear(input: Any, weight: Any, bias: Any = None, **rest: Any) -> Any:
    if rest or not _is_matrix(weight) or weight.transposed or isinstance(input, PackedWeight):
        return NotImplemented
    y = weight.packed.multiply(input)
    return y if bias is None else y + bias


def _matmul(input: Any, other: Any, **rest: Any) -> Any:
    if rest or not _is_matrix(other) or not other.transposed or isinstance(input, PackedWeight) or input.dim() < 2:
        return NotImplemented
    return other.packed.multiply(input)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, **rest: Any) -> Any:
    y = _matmul(mat1, mat2, **rest) if beta == alpha == 1 else NotImplemented
    return y if y is NotImplemented else input + y


def _embedding(input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *args: Any, **rest: Any) -> Any:
    # The other arguments concern gradients, except a maximum norm, which no language model sets.
    if not _is_matrix(weight) or weight.transposed or max_norm is not None:
        return NotImplemented
    return weight.packed.lookup(input, weight.dtype)


def _item(weight: Any, index: Any) -> Any:
    is_scalar = isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype != torch.bool
    single = is_scalar or isinstance(index, int)
    if not isinstance(weight, PackedWeight) or not isinstance(weight.packed, Sequence) or not single:
        return NotImplemented
    packed, label = weight.packed[int(index)], f"{weight.label}[{int(index)}]"
    return PackedWeight(packed, weight.transposed, weight.dtype, label, weight.device)


def _transpose(input: PackedWeight, dim0: int, dim1: int, **rest: Any) -> Any:
    if rest or {axis % input.dim() for axis in (dim0, dim1)} != {input.dim() - 1, input.dim() - 2}:
        return NotImplemented
    return PackedWeight(input.packed, not input.transposed, input.dtype, input.label, input.device)


def _t(input: PackedWeight, **rest: Any) -> Any:
    return _transpose(input, 0, 1, **rest) if input.dim() == 2 else NotImplemented


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, PackedWeight) and not isinstance(weight.packed, Sequence)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    torch.addmm: _addmm,
    torch.Tensor.__getitem__: _item,
    **dict.fromkeys((torch.t, torch.Tensor.t, torch.Tensor.T.__get__), _t),  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: lambda weight: _transpose(weight, -1, -2),  # type: ignore[attr-defined]
    **dict.fromkeys((torch.transpose, torch.Tensor.transpose), _transpose),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, torch.Tensor.mm), lambda input, mat2, **rest: _matmul(input, mat2, **rest)),
}

# Attributes of a tensor without data.
_METHODS = ("dim", "size", "numel", "stride", "is_floating_point", "is_complex", "element_size", "__len__")
_VALUES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn")
_FLAGS = ("is_meta", "is_cuda", "is_quantized", "is_sparse", "is_mps", "is_nested")
_ATTRIBUTES = {
    torch.is_floating_point,
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(getattr(torch.Tensor, name).__get__ for name in (*_VALUES, *_FLAGS)),
}

_COPIES = {torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__}

_warned: set[tuple[str, str]] = set()


def _dense(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on dense weights that are rebuilt for it."""
    name = getattr(func, "__name__", str(func))

    def rebuilt(value: Any) -> Any:
        if isinstance(value, PackedWeight):
            if (value.label, name) not in _warned:
                _warned.add((value.label, name))
                warnings.warn(
                    f"The model's code applies {name} to {value.label}, which has no packed form: its dense weights are "
                    "rebuilt at every call, slowly. bstack.load(..., mode='dense') keeps them.",
                    RuntimeWarning,
                    stacklevel=5,
                )
            return value.rebuilt()
        if isinstance(value, (list, tuple)):
            return type(value)(map(rebuilt, value))
        return value

    return func(*map(rebuilt, args), **{key: rebuilt(value) for key, value in kwargs.items()})
