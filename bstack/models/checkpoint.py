"""The interface of checkpoints of all formats: describe the source, load chosen parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bstack.models.code import Code

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Checkpoint"]


class Checkpoint(ABC):
    """An original model on disk, read a few parameters at a time.

    Attributes
    ----------
    name : str
        What a user calls the model: the folder's name, the hub id, the file's name.
    config : transformers.PretrainedConfig
        The model's configuration.
    size_bytes : int
        Bytes of the weight files.
    quantisation : str or None
        How most of its weights are quantised, such as ``Q4_1``; None where they are floats.
    code : bstack.models.code.Code or None
        Python code that the model needs and the user allows to run.
    """

    name: str
    config: Any
    size_bytes: int
    quantisation: str | None = None
    code: Code | None = None

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Describe the source in plain JSON values: format, file names, sizes and digests."""

    @abstractmethod
    def export_tokenizer(self, folder: Path) -> list[str]:
        """Write the files of the tokenizer and of the generation settings into `folder`; return their names.

        An empty list means that the checkpoint has no tokenizer.
        """

    @abstractmethod
    def bind(self, model: PreTrainedModel) -> None:
        """Match the checkpoint's tensors with the parameters of `model` (on the meta device).

        Raises
        ------
        bstack.errors.UnsupportedModelError
            When a parameter of the model is missing from the checkpoint; the message names it.
        """

    @abstractmethod
    def load(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """Fill the named parameters and buffers of the bound `model`, each in the floating type that it has there.

        The caller may write to that memory: the next load does not see it.

        Raises
        ------
        bstack.errors.UnsupportedModelError
            When a tensor holds NaN or infinity; the message names it.
        """

    @abstractmethod
    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the checkpoint stores a parameter; a container stores plain copies in the same."""
