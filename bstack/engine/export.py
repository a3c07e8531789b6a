"""Write a container as a transformers folder with dense weights, one layer in memory at a time."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

import bstk
from bstack.engine.container import build_model, dense_weights, embedded_files
from bstack.engine.exact import write_originals
from bstack.engine.folder import WEIGHTS_KEY, copy_files, read_object, write_json
from bstack.engine.parts import parse_name
from bstack.errors import holds_unknown, lacks, one_line
from bstack.folders import new_folder
from bstack.models.code import check_trust, recorded_place, stage_code
from bstack.models.safetensors import DTYPES as STORED_DTYPES
from bstack.models.skeleton import find_layers, quiet_transformers
from bstack.models.weight_files import INDEX, SINGLE
from bstk.errors import DamagedError, ResourceError, UsageError, os_errors

__all__ = ["SHARD_BYTES", "Exported", "export_safetensors"]

# A shard stays in memory until it is written, beside one layer.
SHARD_BYTES = 2**31


@dataclass(frozen=True)
class Exported:
    """What `export_safetensors` wrote: numbers and bytes of all weights, all files sorted, and the cut that was used.

    `code` names Python modules that the configuration needs beside it; the folder works when they are copied there. `exact` says
    that the files of weights are those of the original, checked by their SHA-256, and its configuration keeps the type that it
    names; `dtype` is the type of most weights.
    """

    parameters: int
    weight_bytes: int
    files: list[str]
    cut: bstk.Cut
    code: list[str]
    exact: bool
    dtype: torch.dtype


def export_safetensors(
    file: bstk.Reader,
    folder: str | os.PathLike[str],
    *,
    budget: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    trust_remote_code: bool = False,
    code: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Exported:
    """Write a container's model as a transformers folder: configuration, tokenizer, dense weights in safetensors.

    Parameters
    ----------
    file : bstk.Reader
    folder : path
        Must not exist, or be empty. It appears whole or not at all.
    budget : int, optional
        Use the blocks of the largest cut of at most so many bytes; by default all.
    dtype : torch.dtype, optional
        Type of all floating-point weights. Without it a complete file that was made with ``exact`` gives the original's files of
        weights, bit for bit (of a quantised original its values in float32), and any other file bfloat16.
    shard_bytes : int
        Maximum size of a file of weights, unless one parameter is larger.
    trust_remote_code, code
        As for `bstack.load`. The code itself is not written.
    progress : callable
        Receives the stored bytes of each group of chunks.

    Raises
    ------
    bstk.UsageError
        The folder is not empty, or a weight is too large for `dtype`.
    bstk.BudgetError
        The base model is larger than `budget`.
    bstk.DamagedError
        A chunk is damaged or does not fit the model, or an embedded file is not one that a model has beside its weights.
    bstack.errors.ForeignCodeError
        The model needs Python code that is not in transformers, and may not run it.
    bstack.errors.UnsupportedModelError
        This transformers cannot build the model, or parameters of it are missing.
    bstk.ResourceError, bstk.OutputError
        The folder cannot be written.
    """
    from transformers.core_model_loading import revert_weight_conversion

    check_trust(trust_remote_code, code)
    cut = file.fit(budget=budget)
    shown = file.source.name
    with embedded_files(file) as inside, new_folder(folder) as target:
        copy_files(file, target)
        trusted = stage_code(file, inside, trust_remote_code, code)
        model = build_model(file, inside, trusted, torch.device("meta"))
        own_code = trusted and recorded_place(file) is None
        beside = sorted(module.name for module in inside.glob("*.py")) if own_code else []
        if dtype is None and file.restores and cut.chunks == len(file.chunks):
            _write_config(target, model, None)
            size = write_originals(file, target, progress)
            parameters = sum(tensor.numel() for tensor in model.parameters())
            return Exported(parameters, size, _files(target), cut, beside, True, _stored_dtype(target, shown))
        dtype = dtype or torch.bfloat16
        shards = _Shards(target, shard_bytes)
        _write_config(target, model, dtype)
        written: set[str] = set()
        for chunks in _groups(file.chunks[: cut.chunks], model):
            weights = dict(dense_weights(file, chunks, model, dtype))
            _check(weights, model, dtype, shown)
            written |= weights.keys()
            with quiet_transformers():
                # With the names and shapes of checkpoints: transformers fuses some parameters when it loads them.
                shards.add(revert_weight_conversion(model, weights))
            progress(sum(chunk.stored_length for chunk in chunks))
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        unsaved = set(model._keys_to_ignore_on_save or ())
        if missing := set(model.state_dict()) - tied - unsaved - written:
            raise lacks(shown, missing)
        shards.finish()
        return Exported(shards.parameters, shards.bytes, _files(target), cut, beside, False, dtype)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class _Shards:
    """Collects tensors and writes them into numbered files."""

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.parameters = self.bytes = 0

    def add(self, weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._max_bytes:
                self._write()
            # A copy: shards may not share memory, and a view would keep the whole tensor.
            self._pending[name] = tensor.clone(memory_format=torch.contiguous_format)
            self._pending_bytes += size
            self.parameters += tensor.numel()
            self.bytes += size

    def finish(self) -> None:
        """Write the rest, name the files, and write the index if there are several."""
        self._write()
        count = len(self._shards)
        if count == 1:
            self._temporary(0).rename(self._folder / SINGLE)
            return
        places = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self._folder / final)
            places.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_parameters": self.parameters, "total_size": self.bytes}, "weight_map": places}
        write_json(self._folder / INDEX, index)

    def _write(self) -> None:
        import safetensors.torch

        target = self._temporary(len(self._shards))
        with os_errors(str(target)):
            target.touch()
            mode = target.stat().st_mode  # the usual mode of a new file; safetensors restricts its own to the owner
            try:
                safetensors.torch.save_file(self._pending, target, metadata={"format": "pt"})
                target.chmod(mode)
            except safetensors.SafetensorError as error:  # such as a full disk
                raise ResourceError(
                    f"{target}: cannot write: {one_line(error)}.", hint="Free some space, or write to another disk."
                ) from None
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self._folder / f"{number}.part"


def _groups(chunks: Iterable[bstk.Chunk], model: Any) -> Iterator[tuple[bstk.Chunk, ...]]:
    """Group weights: those outside the layers by parameter, then the others by layer."""
    prefix, layers = find_layers(model)
    prefixes = [f"{prefix}.{i}." for i in range(len(layers))]
    groups: dict[str, list[bstk.Chunk]] = {}
    for chunk in chunks:
        exact = chunk.kind is bstk.EXACT
        if not (chunk.is_weight or exact):
            continue
        parameter = parse_name(chunk.name).parameter if chunk.is_block or exact else chunk.name
        place = next((p for p in prefixes if parameter.startswith(p)), parameter)
        groups.setdefault(place, []).append(chunk)
    outside = [place for place in groups if place not in prefixes]
    for place in [*outside, *(p for p in prefixes if p in groups)]:
        yield tuple(groups[place])


def _check(weights: dict[str, torch.Tensor], model: Any, dtype: torch.dtype, shown: str) -> None:
    expected = model.state_dict()
    for name, tensor in weights.items():
        if name not in expected:
            raise holds_unknown(shown, name)
        if tensor.shape != expected[name].shape:
            raise DamagedError(
                f"{shown}: {name} has shape {tuple(tensor.shape)}, but the model has {tuple(expected[name].shape)} there."
            )
        if dtype == torch.float16 and tensor.is_floating_point() and tensor.isinf().any():
            raise UsageError(
                f"{shown}: {name} has weights beyond 65504, which fp16 cannot hold.", hint="Export as bf16 or fp32."
            )


def _stored_dtype(folder: Path, shown: str) -> torch.dtype:
    """Return the type of most weights in a folder's files; DamagedError for a file that is not in safetensors."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dictionary)
                    part = shard.get_slice(key)
                    counts[part.get_dtype()] += math.prod(part.get_shape())
        except safetensors.SafetensorError as error:
            raise DamagedError(
                f"{shown}: its original {path.relative_to(folder)} is no safetensors file: {one_line(error)}."
            ) from None
    return STORED_DTYPES[max(STORED_DTYPES, key=lambda name: counts[name])]


def _write_config(target: Path, model: Any, dtype: torch.dtype | None) -> None:
    """Add the class of the model, whether the head is tied, and the type of the weights, unless it is None, to the configuration."""
    path = target / "config.json"
    config = read_object(path, str(path))
    config["architectures"] = [type(model).__name__]
    config.pop(WEIGHTS_KEY, None)  # the original's
    if dtype is not None:
        config.pop("torch_dtype", None)  # the old name of dtype
        config["dtype"] = str(dtype).removeprefix("torch.")
    if hasattr(
        model.config, "tie_word_embeddings"
    ):  # programs that do not know the default of the class may drop a head
        config["tie_word_embeddings"] = model.config.tie_word_embeddings
    write_json(path, config)
