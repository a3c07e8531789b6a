"""A GGUF file of llama.cpp, dequantised one parameter at a time."""

from __future__ import annotations

import functools
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bstack.errors import UnsupportedModelError, one_line
from bstack.models.files import file_record
from bstack.models.skeleton import Checkpoint, check_complete, check_finite, owner_of
from bstack.models.tokenizer import export_tokenizer
from bstk.errors import DamagedError, MissingPackageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GGUFCheckpoint"]

_PATCHING = threading.Lock()


class GGUFCheckpoint(Checkpoint):
    """Read a GGUF file through the optional package `gguf` and transformers' tables of names."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise MissingPackageError(
                "Reading a GGUF file needs the package gguf: pip install 'bstack[gguf]'"
            ) from None
        from transformers import AutoConfig
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, load_gguf_checkpoint

        self.path = path
        self.beside = path.parent
        self.name = path.stem
        self.size_bytes = path.stat().st_size
        try:
            self._reader = gguf.GGUFReader(path)
            self.quantisation = _quantisation(self._reader.tensors)
        except Exception as error:  # on a bad or short file the reader raises what numpy or struct raise
            raise DamagedError(f"{path} is not a whole GGUF file: {one_line(error)}. Fetch it again.") from None
        try:
            with self._parsed_once():
                self._parsed: dict[str, Any] = load_gguf_checkpoint(path)
            self.config = AutoConfig.for_model(**self._parsed["config"])
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UnsupportedModelError(f"{path}: {one_line(error)}") from None
        architecture = self._reader.fields["general.architecture"].contents()
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._parsed["config"])
        self._dequantize = gguf.dequantize

    @contextmanager
    def _parsed_once(self) -> Iterator[None]:
        """Give transformers the parsed file for the length of a `with` block, in one thread at a time.

        Each of its functions parses the file again and makes a table of names for every module, which takes seconds, and
        none takes a reader. Other threads that read other files through `gguf` meanwhile get what they ask for.
        """
        import gguf

        with _PATCHING:
            reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
            gguf.GGUFReader = lambda path, *args: self._reader if Path(path) == self.path else reader(path, *args)  # type: ignore
            gguf.get_tensor_name_map = functools.cache(table)
            try:
                yield
            finally:
                gguf.GGUFReader, gguf.get_tensor_name_map = reader, table  # type: ignore

    def provenance(self) -> dict[str, Any]:
        return {"format": "gguf", "files": [file_record(self.path)]}

    def export_tokenizer(self, folder: Path) -> None:
        if "tokenizer.ggml.tokens" in self._reader.fields:
            with self._parsed_once():
                export_tokenizer(folder, self.path.parent, gguf_file=self.path.name)

    def bind(self, model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        try:
            with self._parsed_once():
                self._map: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{self.path}: {one_line(error)}") from None
        self._tensors: dict[str, list[Any]] = defaultdict(list)
        for tensor in self._reader.tensors:
            target = self._map.get(tensor.name) or self._map.get(tensor.name.removesuffix(".weight"))
            if target is not None:
                self._tensors[target].append(tensor)
        check_complete(model, str(self.path), self._tensors)

    def load(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        wanted = [name for name in names if name in self._tensors]
        for name in wanted:
            owner, leaf = owner_of(model, name)
            expected = getattr(owner, leaf)
            value = torch.from_numpy(self._read(name)).to(expected.dtype)
            if value.shape != expected.shape:
                raise DamagedError(
                    f"{self.path}: {name} has shape {tuple(value.shape)}, but its metadata asks for {tuple(expected.shape)}."
                )
            if leaf in owner._parameters:
                owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
        check_finite(model, wanted)

    def _read(self, name: str) -> np.ndarray:
        # Expert tensors come in several pieces, which the processors of transformers gather in a dictionary.
        gathered: dict[str, Any] = {**self._parsed, "tensors": {}}
        for tensor in self._tensors[name]:
            result = self._processor.process(
                weights=self._dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self._map,
                parsed_parameters=gathered,
            )
            if result.name is not None:
                return np.array(result.weights, dtype=np.float32)  # a copy: the reader maps the file
        return gathered["tensors"][name].numpy()

    def stored_dtype(self, name: str) -> torch.dtype:
        kept = {"F32": torch.float32, "BF16": torch.bfloat16}
        return kept.get(self._tensors[name][0].tensor_type.name, torch.float16)


def _quantisation(tensors: Iterable[Any]) -> str | None:
    """Return the type that most bytes of the file have, or None if it is a float type."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    ((name, _),) = sizes.most_common(1) or [("F32", 0)]
    return None if name in ("F64", "F32", "F16", "BF16") else name
