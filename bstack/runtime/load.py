"""A transformers model with dense weights, rebuilt from the blocks that a budget admits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.codecs import codec_of_kind
from bstack.errors import UnsupportedModelError, reason
from bstack.models.skeleton import quiet_transformers
from bstack.models.slices import MatrixName
from bstack.runtime.cache import cached
from bstk import urls
from bstk.budget import Budget
from bstk.errors import DamagedError

__all__ = ["dense_weights", "load"]

_DTYPES = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}


def load(
    path: str | os.PathLike[str],
    *,
    mb: int | float | str | Decimal | None = None,
    dtype: torch.dtype = torch.float32,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Load a .bstk file as a transformers model.

    The weights are rebuilt densely, so the model takes the memory of the original; `mb` decides the quality.

    Parameters
    ----------
    path : path or URL
        The container. Of a URL only what `mb` needs is fetched, and kept in ``bstack/models`` in $XDG_CACHE_HOME or
        ~/.cache: a later call fetches only what is missing there.
    mb : number or str, optional
        Use the blocks of the largest prefix that fits this many MB (2**20 bytes), in the file and as blocks in memory.
        By default all that are there.
    dtype : torch.dtype
        Of the dense weights.
    strict : bool
        Refuse a partial file.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode, with `generate`.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        None when the original had none.

    Raises
    ------
    bstk.BudgetError
        When the smallest model is larger than `mb`.
    bstk.RemoteError
        When the URL cannot be read.
    bstk.BstkError
        For a file that is not whole, not readable or damaged.
    """
    shown = urls.shown(path) if urls.is_url(path) else str(path)
    with _opened(path, mb, strict) as (file, chunks), tempfile.TemporaryDirectory(prefix="bstack-") as folder:
        for name, chunk in file.files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read(chunk))
        model = _empty_model(Path(folder), shown)
        return _fill(model, dict(dense_weights(file, chunks, model, dtype)), dtype, shown), _tokenizer(Path(folder))


@contextmanager
def _opened(
    path: str | os.PathLike[str], mb: Budget | None, strict: bool
) -> Iterator[tuple[bstk.Reader, tuple[bstk.Chunk, ...]]]:
    """A file, and its chunks within the budget."""
    if urls.is_url(path):
        with cached(path, mb, strict) as found:
            yield found
        return
    with bstk.open(path, strict=strict) as file:
        yield file, file.chunks[: file.fit(mb=mb).chunks]


def dense_weights(
    file: bstk.Reader, chunks: tuple[bstk.Chunk, ...], model: torch.nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Rebuild the parameters of a model from some of a file's chunks.

    Parameters
    ----------
    file : bstk.Reader
    chunks : tuple of bstk.Chunk
        A prefix of the file's chunks.
    model : torch.nn.Module
        Gives the full shapes; may be on the meta device.
    dtype : torch.dtype
        Of what was floating.

    Yields
    ------
    name : str
        State-dict name.
    tensor : torch.Tensor
    """
    stacks: dict[str, list[bstk.Chunk]] = {}
    for chunk in chunks:
        if chunk.is_block:
            stacks.setdefault(chunk.name, []).append(chunk)
        elif chunk.is_weight:
            yield chunk.name, _tensor(file.read(chunk), chunk, dtype)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parts: dict[str, list[tuple[MatrixName, list[bstk.Chunk]]]] = {}
    for name, blocks in stacks.items():
        matrix = _parse(name)
        parts.setdefault(matrix.parameter, []).append((matrix, blocks))
    for parameter, matrices in parts.items():
        if parameter not in shapes:
            raise UnsupportedModelError(f"The file holds {parameter}, which this transformers' model does not have.")
        tensor = torch.empty(shapes[parameter], dtype=dtype)
        filled = 0
        for matrix, blocks in matrices:
            view = _view(matrix, tensor, blocks[0])
            codec = codec_of_kind(blocks[0].kind)
            payloads = [file.read(block) for block in blocks]
            view.copy_(codec.rebuild(payloads, [b.kind for b in blocks], [b.rank for b in blocks], blocks[0].shape))
            filled += view.numel()
        if filled != tensor.numel():
            raise DamagedError(f"The stacks of {parameter} have {filled} weights, but it needs {tensor.numel()}.")
        yield parameter, tensor


def _parse(name: str) -> MatrixName:
    try:
        return MatrixName.parse(name)
    except ValueError as error:
        raise DamagedError(f"{error}; format/SPEC.md says what names of stacks look like.") from None


def _view(matrix: MatrixName, tensor: torch.Tensor, block: bstk.Chunk) -> torch.Tensor:
    """The part of a parameter that a stack fills, if their shapes agree."""
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


def _tensor(raw: bytes, chunk: bstk.Chunk, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(_DTYPES[chunk.dtype]).reshape(chunk.shape)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _config(folder: Path, shown: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{shown}: its configuration cannot be used by this transformers: {reason(error)}"
        ) from None


def _empty_model(folder: Path, shown: str) -> Any:
    from transformers import AutoModelForCausalLM

    config = _config(folder, shown)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(
            f"{shown}: this transformers cannot build its model ({config.model_type}): "
            f"{reason(error)}"
        ) from None
    generation = folder / "generation_config.json"
    if generation.is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _fill(model: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype, shown: str) -> Any:
    # from_pretrained also computes the buffers that no checkpoint holds and ties what is tied.
    cls, config, generation = type(model), model.config, model.generation_config
    with quiet_transformers():
        filled, info = cls.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UnsupportedModelError(f"{shown} lacks {missing[0]} ({len(missing)} parameters), which its model needs.")
    filled.generation_config = generation
    return filled.eval()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
