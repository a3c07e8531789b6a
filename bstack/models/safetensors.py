"""A transformers folder with safetensors weights, one file or sharded."""

from __future__ import annotations

import json
import shutil
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bstack.errors import UnsupportedModelError, one_line
from bstack.models.code import check_code, reset_attn_impl, stage_model
from bstack.models.files import export_tokenizer, file_record
from bstack.models.skeleton import Checkpoint, check_complete, check_finite, owner_of
from bstk.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SafetensorsCheckpoint"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        self.code = check_code(folder, self.name, trust_remote_code, hub)
        self._beside = folder
        if self.code is not None:
            self._beside = stage_model(folder, self.code)
            weakref.finalize(self, shutil.rmtree, self._beside.parent, ignore_errors=True)
        self.config = _read_config(self._beside, self.code is not None, folder)
        self.files = _weight_files(folder)
        self.size_bytes = sum(file.stat().st_size for file in self.files)
        self._headers: dict[str, _Header] = {}
        for file in self.files:
            with _opened(file) as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dictionary)
                    found = shard.get_slice(key)
                    self._headers[key] = _Header(file, found.get_dtype(), tuple(found.get_shape()))
        odd = sorted({h.dtype for h in self._headers.values()} - DTYPES.keys() - {"I64", "I32", "BOOL", "U8", "I8"})
        if odd:
            raise UnsupportedModelError(
                f"{self.name} keeps weights as {', '.join(odd)}. bstack compresses F64, F32, F16 and BF16 weights: "
                "give it the checkpoint before quantisation."
            )

    def provenance(self) -> dict[str, Any]:
        return {"format": "safetensors", "files": [file_record(file) for file in self.files]}

    def export_tokenizer(self, folder: Path) -> list[str]:
        return export_tokenizer(folder, self._beside, self.code is not None, display_name=self.folder)

    def bind(self, model: PreTrainedModel) -> None:
        # transformers renames and fuses checkpoint tensors while loading, e.g. one tensor per expert into one for all. Its own
        # tables are used, so that every architecture is loaded as transformers loads it.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._transforms = get_model_conversion_mapping(model)
        renamings = [t for t in self._transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in self._transforms if isinstance(t, WeightConverter)]
        state = model.state_dict()
        self._keys: dict[str, list[str]] = defaultdict(list)
        for key, header in self._headers.items():
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if pattern is None:
                self._keys[target].append(key)
                if target in state and header.shape != tuple(state[target].shape):
                    raise self._mismatch(key, header.shape, state[target].shape)
                continue
            # A converter names only its first target: a fused tensor that is split serves several parameters.
            converter = next(c for c in converters if pattern in c.source_patterns)
            first = converter.target_patterns[0]
            for other in converter.target_patterns:
                self._keys[target.replace(first, other)].append(key)
        check_complete(model, self.name, self._keys)

    def load(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        from safetensors import SafetensorError
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        wanted = [name for name in names if name in self._keys]
        keys = sorted({key for name in wanted for key in self._keys[name]})
        try:
            with ExitStack() as stack:
                # Opened for this call only: pages of an open file stay mapped, and the whole model would pile up in memory.
                files = {self._headers[key].file for key in keys}
                shards = {file: stack.enter_context(_opened(file)) for file in sorted(files)}
                info, _ = convert_and_load_state_dict_in_model(
                    model,
                    {key: shards[self._headers[key].file].get_slice(key) for key in keys},
                    # The type of tensors that the model does not have; all others take the model's.
                    LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._transforms),  # type: ignore[arg-type]
                )
        except SafetensorError as error:
            raise DamagedError(f"{self.name}: a weight file cannot be read: {error}.") from None
        if info.mismatched_keys:
            raise self._mismatch(*sorted(info.mismatched_keys)[0])
        if info.conversion_errors:
            key, why = next(iter(info.conversion_errors.items()))
            raise UnsupportedModelError(f"{self.name}: {key} could not be converted: {why}")
        self._own_copies(model, wanted)
        check_finite(model, wanted)

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

    def stored_dtype(self, name: str) -> torch.dtype:
        dtype = DTYPES.get(self._headers[self._keys[name][0]].dtype, torch.float32)
        # load() gives float32, so float64 would store zeros in the other half
        return torch.float32 if dtype == torch.float64 else dtype


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        shard = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        size = f"It has {file.stat().st_size} bytes. " if file.is_file() else ""
        raise DamagedError(f"{file} is not a whole safetensors file: {error}. {size}Fetch it again.") from None
    with shard:
        yield shard


def _read_config(folder: Path, trusted: bool, display_name: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UsageError(f"{display_name} has no config.json, so it is not a transformers folder.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        reset_attn_impl(config)
        return config
    except MemoryError:
        raise
    except Exception as error:  # configuration classes raise anything for wrong values
        raise UnsupportedModelError(f"{display_name / 'config.json'} cannot be used: {one_line(error)}") from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedError(
                f"{folder / INDEX} is not a safetensors index: it is not JSON with a weight_map."
            ) from None
        files = [folder / shard for shard in shards]
        if absent := [file.name for file in files if not file.is_file()]:
            raise DamagedError(f"{folder} lacks {len(absent)} of {len(files)} shards, first {absent[0]}.")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if other := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)):
        raise UnsupportedModelError(
            f"{folder} has {other[0]}, a pickle. bstack never unpickles: convert it to safetensors first "
            "(load it with transformers and call save_pretrained)."
        )
    raise UsageError(f"{folder} has no {SINGLE} and no {INDEX}.")
