"""What every codec promises.

A codec turns a matrix into an ordered list of blocks, each of which lowers the error that the earlier ones left.
It knows arrays, not files, models or names. One codec a file; the registry in `bstack.codecs` finds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import bstk
from bstack.errors import CodecError
from bstack.settings import Settings

__all__ = ["Block", "Codec", "Task"]

# Settings that one codec alone has.
_OWNERS = {"rank": "sign", "bits": "spqr", "group": "spqr", "outliers": "spqr", "bpw": "spqr"}

# What `Codec.encode` takes: weight, hessian, tokens, importance.
Task = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]


@dataclass(frozen=True)
class Block:
    """One block as it leaves the encoder.

    Attributes
    ----------
    payload : bytes
        The block's bytes as its chunk kind lays them out (format/SPEC.md).
    kind : bstk.Kind
        The chunk kind of the container.
    rank : int
        The rank field of the chunk.
    row_errors : torch.Tensor
        Squared output error that remains after this block, per output row, float32, shape (outputs,).
    """

    payload: bytes
    kind: bstk.Kind
    rank: int
    row_errors: torch.Tensor


class Codec(ABC):
    """Encode a matrix into blocks, and rebuild it from the first few of them.

    An instance holds the encoder's settings; rebuilding needs none, everything is in the blocks.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[bstk.Kind, ...]]

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Settings) -> Codec:
        """An encoder with the settings that concern this codec.

        Raises
        ------
        bstack.errors.CodecError
            For a value that the codec does not allow, or a setting that it does not have.
        """

    @classmethod
    def refuse_foreign(cls, settings: Settings) -> None:
        """Raise CodecError for a setting that belongs to another codec."""
        for field, owner in _OWNERS.items():
            value = getattr(settings, field)
            if owner != cls.name and value is not None:
                raise CodecError(
                    f"{field} is {value}, but the {cls.name} codec has none; it belongs to --codec {owner}."
                )

    def check_shapes(self, layers: Iterable[Sequence[Sequence[tuple[int, int]]]]) -> None:
        """Refuse settings that matrices of these shapes make impossible, before any work; by default, none are.

        Parameters
        ----------
        layers : iterable
            By layer and matrix: the shapes (outputs, inputs) that it may have. They are two where it only shows in use which
            of its sides the inputs are.

        Raises
        ------
        bstack.errors.CodecError
        """

    def for_layer(self, tasks: Iterable[Task]) -> Codec:
        """The encoder for the matrices of one layer, which it may look at together first; by default, as it is.

        Parameters
        ----------
        tasks : iterable of tuple
            By matrix: weight, hessian, tokens and importance, as `encode` takes them.

        Raises
        ------
        bstack.errors.CodecError
            For a setting that these matrices make impossible.
        """
        return self

    def for_tables(self) -> Codec:
        """The encoder for embeddings and heads; by default, this one."""
        return self

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON values, recorded in the file."""

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
            Rows of X: how far H can be trusted.
        importance : torch.Tensor
            How much the model minds a squared error in each output (docs/method.md), float32, shape (outputs,),
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
