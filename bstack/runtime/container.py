"""From a container: the model's files, its module tree, its plain parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.errors import UnsupportedModelError, reason
from bstack.models.slices import MatrixName
from bstk.errors import DamagedError, OutputError, writing

__all__ = ["embedded_files", "generation_config", "load_tokenizer", "parse_name", "part_of", "plain_tensor", "read_config"]

DTYPES = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}


@contextmanager
def embedded_files(file: bstk.Reader) -> Iterator[Path]:
    """A folder with the files that a container carries, for the length of a `with` block.

    Raises
    ------
    bstk.DamagedError
        A file is damaged, or its name is none here: too long, or that of a folder of another file.
    bstk.ResourceError
        The disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="bstack-") as name:
        folder = Path(name)
        for inside, chunk in file.files.items():
            data = file.read(chunk)
            target = folder / inside
            try:
                with writing(str(target)):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
            except OutputError as error:
                raise DamagedError(
                    f"{file.source.name}: its file {inside!r} cannot be put into a folder here: {reason(error.__cause__)}."
                ) from None
        yield folder


def read_config(folder: Path, shown: str) -> Any:
    """The model's configuration.

    Raises
    ------
    bstack.errors.UnsupportedModelError
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{shown}: its configuration cannot be used by this transformers: {reason(error)}"
        ) from None


def generation_config(folder: Path) -> Any | None:
    """How the model's authors want it to generate; None where they do not say."""
    from transformers import GenerationConfig

    present = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder) if present else None


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer; None when the original had none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def plain_tensor(raw: bytes, chunk: bstk.Chunk) -> torch.Tensor:
    """The tensor of a chunk that is no block, in the type that it is stored in."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(DTYPES[chunk.dtype]).reshape(chunk.shape)


def parse_name(name: str) -> MatrixName:
    """A stack's name, taken apart.

    Raises
    ------
    bstk.DamagedError
    """
    try:
        return MatrixName.parse(name)
    except ValueError as error:
        raise DamagedError(f"{error}; format/SPEC.md says what names of stacks look like.") from None


def part_of(matrix: MatrixName, tensor: torch.Tensor, block: bstk.Chunk) -> torch.Tensor:
    """The part of a parameter that a stack fills, as (outputs, inputs).

    Raises
    ------
    bstk.DamagedError
        The stack's shape is not that of the part.
    """
    try:
        view = matrix.view(tensor, block.transposed)
    except (IndexError, RuntimeError):
        view = None
    if view is None or tuple(view.shape) != tuple(block.shape):
        raise DamagedError(
            f"The stack {block.name} is {' x '.join(map(str, block.shape))}, which is not what it should fill in a "
            f"parameter of {' x '.join(map(str, tensor.shape))}."
        )
    return view
