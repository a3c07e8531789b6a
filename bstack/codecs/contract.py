"""The interface of a codec, which turns a matrix into ordered blocks, each of which lowers the error that is left.

A codec works on arrays; it knows no files, models or names. One codec a file; the registry is in `bstack.codecs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, cast

import torch

import bstk
from bstk.errors import UsageError

__all__ = ["Block", "Codec", "Task"]

# What `Codec.encode` takes: weight, hessian, tokens, importance.
Task = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]


@dataclass(frozen=True)
class Block:
    """A block as it leaves the encoder.

    Attributes
    ----------
    payload : bytes
        The block's bytes as its chunk kind lays them out (format/SPEC.md).
    kind : bstk.Kind
        The chunk kind of the container.
    rank : int
        The rank field of the chunk.
    errors_before, row_errors : torch.Tensor
        Squared output error before and after this block, per output row, float32, shape (outputs,).
    """

    payload: bytes
    kind: bstk.Kind
    rank: int
    errors_before: torch.Tensor
    row_errors: torch.Tensor


class Codec(ABC):
    """Encode a matrix into blocks, and rebuild it from the first few of them.

    A subclass is a frozen dataclass whose fields are the encoder's settings, each of which it checks. Rebuilding needs no
    settings: everything is in the blocks.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[bstk.Kind, ...]]
    # Blocks of the layers before it with which a layer is calibrated; None: with their original weights.
    calibrated_with: ClassVar[int | None] = None

    def _check_number(self, setting: str, kind: type, allowed: str, fits: Callable[[Any], bool]) -> None:
        """Make a setting a plain number (numpy has its own), or raise UsageError with what is allowed."""
        value = getattr(self, setting)
        # bool is a subclass of int; reject it.
        if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real) or not fits(value):
            raise UsageError(f"{setting} is {value!r}; the {self.name} codec takes {allowed}.")
        object.__setattr__(self, setting, kind(value))

    def check_shapes(self, layers: Iterable[Sequence[Sequence[tuple[int, int]]]]) -> None:  # noqa: B027
        """Refuse settings that matrices of these shapes make impossible, before any work; by default, none are.

        Parameters
        ----------
        layers : iterable
            By layer and matrix: the shapes (outputs, inputs) that it may have, two where only a run of the model shows which
            of its sides the inputs are.

        Raises
        ------
        bstk.UsageError
        """

    def for_layer(self, tasks: Iterable[Task]) -> Codec:
        """Return the encoder for the matrices of one layer, which it may look at together first; by default, this one.

        Parameters
        ----------
        tasks : iterable of tuple
            By matrix: weight, hessian, tokens and importance, as `encode` takes them.

        Raises
        ------
        bstk.UsageError
            These matrices make a setting impossible.
        """
        return self

    def for_embeddings(self) -> Codec:
        """Return the encoder for embeddings and heads; by default, this one."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, as the file records them."""
        return {"codec": self.name, **{field.name: getattr(self, field.name) for field in fields(cast(Any, self))}}

    @abstractmethod
    def encode(
        self, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> Iterator[Block]:
        """Yield the blocks of a matrix, most significant first, at least one.

        Parameters
        ----------
        weight : torch.Tensor
            W, float32, shape (outputs, inputs).
        hessian : torch.Tensor
            H = X^T X of the matrix's input, float32, shape (inputs, inputs), symmetric, not negative.
        tokens : int
            Rows of X, which say how reliable H is.
        importance : torch.Tensor
            How much a squared error in each output raises the divergence (docs/method.md), float32, shape (outputs,),
            not negative, in any unit. A codec may ignore it.
        """

    @staticmethod
    @abstractmethod
    def rebuild(
        payloads: Sequence[bytes], kinds: Sequence[bstk.Kind], ranks: Sequence[int], shape: tuple[int, int]
    ) -> torch.Tensor:
        """Add up the first blocks of a stack.

        Parameters
        ----------
        payloads, kinds, ranks : sequence
            Of the blocks at levels 0, 1, 2, ..., at least one.
        shape : tuple of int
            (outputs, inputs).

        Returns
        -------
        torch.Tensor
            Float32, shape (outputs, inputs).
        """
