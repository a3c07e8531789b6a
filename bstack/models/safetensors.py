"""A transformers folder with safetensors weights, one file or sharded."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
import weakref
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from bstack.errors import ModelWarning, UnsupportedModelError, one_line
from bstack.models.code import check_code, reset_choices, stage_model
from bstack.models.files import NOT_FETCHED, POINTER, file_record, is_pointer
from bstack.models.original import DTYPES as ORIGINAL_DTYPES
from bstack.models.original import OriginalFile, StoredTensor, View, views
from bstack.models.skeleton import Checkpoint, check_complete, check_finite, listed, owner_of, untie
from bstack.models.tokenizer import export_tokenizer
from bstack.models.weight_files import INDEX, SINGLE, no_model, weight_files
from bstk.errors import DamagedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SafetensorsCheckpoint"]

# What weights may be stored as. All other types of safetensors are those of indices and masks, or of quantised weights.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MASK = re.compile(r"(attn|attention)\.(bias|masked_bias|causal_mask)$")
_ROTARY = re.compile(r"rotary.*\.(inv_freq|cos_cached|sin_cached)$")
# Parts of quantised weights: scales and zero points of several libraries, which may be floats.
_QUANTISED = re.compile(r"(scales?|scale_inv|absmax|zero_?points?|q?zeros|qweight|quant_map|SCB)$|quant_state")
# Values of one comparison of two tensors.
_TOGETHER = 2**24


class _Header(NamedTuple):
    """Where a tensor is, from its shard's header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsCheckpoint(Checkpoint):
    """Read a folder as `save_pretrained` writes it; `hub` is where it comes from, ``owner/name@commit``."""

    def __init__(
        self, folder: Path, name: str | None = None, *, trust_remote_code: bool = False, hub: str | None = None
    ):
        self.folder = folder
        self.name = name or folder.resolve().name
        paths = (path for path in [*folder.iterdir(), *folder.glob("*/*")] if path.is_file())
        names = {path.relative_to(folder).as_posix() for path in paths}
        if "config.json" not in names:
            raise no_model(folder, names, str(folder), "has no config.json")
        self.code = check_code(folder, self.name, trust_remote_code, hub)
        self.beside = folder
        if self.code is not None:
            self.beside = stage_model(folder, self.code)
            weakref.finalize(self, shutil.rmtree, self.beside.parent, ignore_errors=True)
        self.config = _read_config(self.beside, self.code is not None, folder)
        files, self._index = weight_files(folder, names, str(folder))
        self.files = [folder / name for name in files]
        if self._index is None and INDEX in names:
            warnings.warn(
                f"{self.name} has {files[0]} and {INDEX}. As transformers does, bstack takes {files[0]} and leaves the shards out.",
                ModelWarning,
                stacklevel=2,
            )
        self.size_bytes = sum(file.stat().st_size for file in self.files)
        self._headers: dict[str, _Header] = {}
        for file in self.files:
            with _opened(file) as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dictionary)
                    if key in self._headers:
                        raise DamagedError(
                            f"{self.name}: {key} is in {self._headers[key].file.name} and in {file.name}."
                        )
                    found = shard.get_slice(key)
                    self._headers[key] = _Header(file, found.get_dtype(), tuple(found.get_shape()))

    def provenance(self) -> dict[str, Any]:
        return {"format": "safetensors", "files": [file_record(file) for file in self.files]}

    def export_tokenizer(self, folder: Path) -> None:
        export_tokenizer(folder, self.beside, self.code is not None, display_name=self.folder)

    def bind(self, model: PreTrainedModel) -> None:
        self._keys = self._matched(model)
        self._tie(model)
        check_complete(model, self.name, self._keys)

    def _matched(self, model: PreTrainedModel) -> dict[str, list[str]]:
        """Return the tensors that make up each parameter; refuse those that belong nowhere, but for what transformers ignores."""
        # transformers renames and fuses checkpoint tensors while loading, e.g. one tensor per expert into one for all. Its own
        # tables are used, so that every architecture is loaded as transformers loads it.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._transforms = get_model_conversion_mapping(model)
        renamings = [t for t in self._transforms if isinstance(t, WeightRenaming)]
        converters = {p: t for t in self._transforms if isinstance(t, WeightConverter) for p in t.source_patterns}
        state, prefix = model.state_dict(), model.base_model_prefix
        found: dict[str, list[str]] = defaultdict(list)
        self._converted: set[str] = set()
        pieces: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        unused: dict[str, str] = {}
        for key, header in self._headers.items():
            target, pattern = rename_source_key(key, renamings, list(converters.values()), prefix, state)
            if target not in state and key in state:  # a new name in which an old one is found, too
                target, pattern = rename_source_key(key, [], [], prefix, state)
            if target not in state:
                unused[target] = key
                continue
            if state[target].is_floating_point():  # before the shape, which quantised weights do not have
                self._check_dtype(key)
            if pattern is not None:
                # A converter names only its first target: a fused tensor that is split serves several parameters.
                first, *_ = targets = converters[pattern].target_patterns
                pieces[target][pattern].append(key)
                for name in (target.replace(first, other) for other in targets):
                    if name in state:
                        found[name].append(key)
                        self._converted.add(name)
            elif target in found:
                raise UnsupportedModelError(
                    f"{self.name}: {found[target][0]} and {key} are both {target}.", hint="Remove one."
                )
            elif header.shape != tuple(state[target].shape):
                raise self._mismatch(key, header.shape, state[target].shape)
            else:
                found[target].append(key)
        self._check_unused(model, unused, found.keys())
        for name, by_pattern in pieces.items():
            self._check_pieces(name, len(state[name]), converters[next(iter(by_pattern))], by_pattern)
        return dict(found)

    def _check_pieces(self, name: str, count: int, converter: Any, keys: dict[str, list[str]]) -> None:
        """Refuse a parameter of which a piece is missing, and more or fewer experts than the `count` that it has."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        if not isinstance(converter.operations[0], Concatenate | MergeModulelist):
            return  # made for one model, of which pieces may be left out, such as scales
        missing = [pattern.replace("\\", "") for pattern in converter.source_patterns if pattern not in keys]
        surplus: list[str] = []
        if isinstance(converter.operations[0], MergeModulelist):  # the number of an expert is the last one in its name
            for of_pattern in keys.values():
                parts = [re.fullmatch(r"(.*\.)(\d+)(\..*)", key) for key in of_pattern]
                numbers = {int(part[2]): part for part in parts if part}
                before, _, after = next(iter(numbers.values())).groups()
                missing += [f"{before}{i}{after}" for i in range(count) if i not in numbers]
                surplus += [part[0] for i, part in numbers.items() if i >= count]
        if missing or surplus:
            raise UnsupportedModelError(
                f"{self.name}: the checkpoint {'lacks' if missing else 'holds'} {listed(missing or surplus)}"
                + (f", a part of {name}. " if missing else f", but {name} has {count} parts. ")
                + "Is its config.json the one that belongs to these weights?",
                hint="If so, fetch the weights again.",
            )

    def _check_unused(self, model: PreTrainedModel, unused: dict[str, str], found: Container[str]) -> None:
        """Refuse tensors that the model has no place for, but for those that transformers knows to be unneeded."""
        loading = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unused) - self._tables(unused))
        model._adjust_missing_and_unexpected_keys(loading)  # it has the two fields that are used
        kind = type(model).__name__
        if wrong := [unused[target] for target in loading.unexpected_keys]:
            for key in sorted(wrong):
                self._check_dtype(key)
            if scales := [key for key in wrong if _QUANTISED.search(key)]:
                raise UnsupportedModelError(
                    f"{self.name}: the checkpoint holds {listed(scales)}, as quantised weights do, but config.json says "
                    "nothing of a quantisation.",
                    hint="Give the checkpoint before quantisation.",
                )
            check_complete(model, self.name, found, wrong)
            raise UnsupportedModelError(
                f"{self.name}: the checkpoint holds {listed(wrong)}, for which {kind} has no place. Is its config.json the one "
                "that belongs to these weights?",
                hint="If the model without them is the one you want, load it with transformers and call save_pretrained.",
            )
        if unused:
            warnings.warn(
                f"{self.name}: transformers does not use {listed(unused.values())} for {kind}, so it is no part of the model.",
                ModelWarning,
                stacklevel=5,
            )

    def _tables(self, unused: dict[str, str]) -> set[str]:
        """Return the masks and rotary tables of old checkpoints, which models compute themselves today."""
        square = {
            t for t, key in unused.items() if (s := self._headers[key].shape) == () or (s[:2] == (1, 1) and len(s) == 4)
        }
        return {t for t in unused if _ROTARY.search(t) or (_MASK.search(t) and t in square)}

    def _check_dtype(self, key: str) -> None:
        if (dtype := self._headers[key].dtype) not in DTYPES:
            raise UnsupportedModelError(
                f"{self.name}: {key} is stored as {dtype}, but weights are {', '.join(DTYPES)}, and "
                "config.json says nothing of a quantisation.",
                hint="Give the checkpoint before quantisation.",
            )

    def _tie(self, model: PreTrainedModel) -> None:
        """Tie and untie parameters as transformers does: tied are those of which one alone is stored, or all with equal values."""
        tied = dict(model.all_tied_weights_keys)
        groups: dict[str, list[str]] = defaultdict(list)
        for target, source in tied.items():
            groups[source].append(target)
        self._filled: dict[str, list[str]] = {}
        self._copies: dict[str, list[str]] = {}  # of a tied parameter, under its other names
        for source, targets in groups.items():
            if source not in self._keys and (stored := next((t for t in targets if t in self._keys), None)) is not None:
                self._filled[source] = self._keys[stored]
        self._keys |= self._filled
        if all(t not in self._keys or self._equal(self._keys[t], self._keys[s]) for t, s in tied.items()):
            for target, source in tied.items():
                self._copies.setdefault(source, []).extend(self._keys.pop(target, ()))
            return
        untie(model)
        self.untied = True
        for target, source in tied.items():
            if target not in self._keys and source in self._keys:
                self._filled[target] = self._keys[target] = self._keys[source]

    def _equal(self, keys: list[str], others: list[str]) -> bool:
        """Compare two parameters; those that must be converted first count as unequal, which is right, but takes more room."""
        if keys == others:
            return True
        (a, *more), (b, *others_more) = keys, others
        if more or others_more or self._headers[a].shape != self._headers[b].shape:
            return False
        rows = max(1, _TOGETHER // max(1, math.prod(self._headers[a].shape[1:])))
        with _opened(self._headers[a].file) as file, _opened(self._headers[b].file) as other_file:
            one, other = file.get_slice(a), other_file.get_slice(b)
            starts = range(0, self._headers[a].shape[0], rows)
            return all(torch.equal(one[i : i + rows].float(), other[i : i + rows].float()) for i in starts)

    def load(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        from safetensors import SafetensorError
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        wanted = [name for name in names if name in self._keys]
        keys = {key: key for name in wanted if name not in self._filled for key in self._keys[name]}
        keys |= {name: self._keys[name][0] for name in wanted if name in self._filled}
        try:
            with ExitStack() as stack:
                # Opened for this call only: pages of an open file stay mapped, and the whole model would pile up in memory.
                files = {self._headers[key].file for key in keys.values()}
                shards = {file: stack.enter_context(_opened(file)) for file in sorted(files)}
                info, _ = convert_and_load_state_dict_in_model(
                    model,
                    {name: shards[self._headers[key].file].get_slice(key) for name, key in sorted(keys.items())},
                    # The type of tensors that the model does not have; all others take the model's.
                    LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._transforms),
                )
        except SafetensorError as error:
            raise DamagedError(f"{self.name}: a weight file cannot be read: {error}.") from None
        if info.mismatched_keys:
            raise self._mismatch(*sorted(info.mismatched_keys)[0])
        if info.conversion_errors:
            key, why = next(iter(info.conversion_errors.items()))
            why = why.strip().splitlines()[-1]  # of a traceback
            raise UnsupportedModelError(f"{self.name}: {key} could not be converted: {why}")
        self._own_copies(model, wanted)
        check_finite(model, wanted, self.name)

    def _own_copies(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        """Copy weights that needed no conversion: they are mapped from the file, and a caller's changes would come back."""
        for name in names:
            owner, leaf = owner_of(model, name)
            parameter = owner._parameters.get(leaf)
            if parameter is not None and self.stored_dtype(name) == parameter.dtype:
                owner._parameters[leaf] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)

    def _mismatch(self, key: str, found: Iterable[int], expected: Iterable[int]) -> DamagedError:
        return DamagedError(
            f"{self.name}: {key} has shape {tuple(found)}, but config.json asks for {tuple(expected)}. "
            "Is it the one that belongs to these weights?"
        )

    def originals(self, model: PreTrainedModel) -> list[OriginalFile]:
        # Where a tensor is a whole parameter, and where a conversion of transformers chose elements of one.
        places: dict[str, tuple[str, View | None]] = {}
        for name, keys in self._keys.items():
            if name not in self._converted:
                places |= dict.fromkeys((*keys, *self._copies.get(name, ())), (name, None))
        state = model.state_dict()
        shapes = {name: tuple(state[name].shape) for name in self._converted if name in self._keys}
        places |= {key: (name, view) for key, name, view in views(model, shapes) if key in self._keys[name]}
        if whole := [key for name in shapes for key in self._keys[name] if key not in places]:
            warnings.warn(
                f"{self.name}: transformers makes weights of {listed(whole)} in a way that an exact file does not undo, or of more "
                "than 2,147,483,647 values, so it holds them as they are beside their blocks and gets much larger.",
                ModelWarning,
                stacklevel=4,
            )
        # Under the usual names, since other ones are known to this config.json alone, and an export leaves them out of it.
        if self._index is None:
            return [_original(self.files[0], SINGLE, places)]
        files = [_original(file, file.relative_to(self.folder).as_posix(), places) for file in self.files]
        return [*files, OriginalFile(INDEX, (self.folder / self._index).read_bytes())]

    def stored_dtype(self, name: str) -> torch.dtype:
        dtype = DTYPES.get(self._headers[self._keys[name][0]].dtype, torch.float32)
        # load() gives float32, so float64 would store zeros in the other half
        return torch.float32 if dtype == torch.float64 else dtype


def _original(file: Path, name: str, places: Mapping[str, tuple[str, View | None]]) -> OriginalFile:
    """Describe a file of weights, which the library safetensors has read before."""
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    head = data[:start].tobytes()
    header = json.loads(head[8:])
    header.pop("__metadata__", None)
    header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    ends = [start + entry["data_offsets"][1] for entry in header.values()]
    tensors = []
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        parameter, view = places.get(key, (None, None))
        if view is not None and list(view.shape) != entry["shape"]:
            parameter = view = None
        tensors.append(StoredTensor(key, ORIGINAL_DTYPES.get(entry["dtype"], ""), end - begin, parameter, view))
    return OriginalFile(name, head, tensors, lambda number: data[ends[number] - tensors[number].length : ends[number]])


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        shard = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        if file.is_file() and is_pointer(file):
            raise DamagedError(f"{file} is {POINTER}.", hint=NOT_FETCHED) from None
        size = f"It has {file.stat().st_size} bytes. " if file.is_file() else ""
        raise DamagedError(f"{file} is not a whole safetensors file: {error}. {size}Fetch it again.") from None
    with shard:
        yield shard


def _read_config(folder: Path, trusted: bool, display_name: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        reset_choices(config)
        if hasattr(config, "transformers_weights"):  # a name of a file that neither containers nor exports have
            del config.transformers_weights
        return config
    except MemoryError:
        raise
    except Exception as error:  # configuration classes raise anything for wrong values
        raise UnsupportedModelError(f"{display_name / 'config.json'} cannot be used: {one_line(error)}") from None
