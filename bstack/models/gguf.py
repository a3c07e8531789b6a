"""A GGUF file of llama.cpp, dequantised one parameter at a time."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bstack.errors import UnsupportedModelError, one_line
from bstack.models.files import file_record
from bstack.models.gguf_config import ROPE_TENSORS, Metadata, read_config
from bstack.models.gguf_tokenizer import complete
from bstack.models.original import OriginalFile, StoredTensor, View, all_of, elements, file_head, views
from bstack.models.skeleton import Checkpoint, check_complete, check_finite, owner_of
from bstack.models.tokenizer import export_tokenizer
from bstack.models.weight_files import INDEX, SINGLE
from bstk.errors import BstkError, DamagedError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GGUFCheckpoint"]

_PATCHING = threading.Lock()
# Tensors of a file of original values, which one chunk must describe.
_TENSORS_TOGETHER = 8192
TOKENIZER = "tokenizer."
# Keys with a value for each word, which take seconds to read.
_LONG = {f"{TOKENIZER}ggml.{name}" for name in ("tokens", "token_type", "scores", "merges")}


class GGUFCheckpoint(Checkpoint):
    """Read a GGUF file, or the parts of one, through the package `gguf` and transformers' tables of names."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise BstkError("Reading a GGUF file needs the package gguf: pip install 'bstack[gguf]'") from None
        from transformers import AutoConfig
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.path = path
        self.beside = path.parent
        self._dequantize = gguf.dequantize
        self._reader = _open(path)
        try:
            arguments = self._read_header()
            self.config = AutoConfig.for_model(**arguments)
        except (BstkError, MemoryError):
            raise
        except Exception as error:  # values of wrong types; configurations check themselves with several libraries
            raise UnsupportedModelError(f"{path}: its metadata cannot be used: {one_line(error)}") from None
        architecture = _value(self._reader.fields, "general.architecture")
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=arguments)

    def _read_header(self) -> dict[str, Any]:
        """Find all parts and check what they hold; return the arguments of the configuration."""
        path, fields = self.path, self._reader.fields
        if (kind := _value(fields, "general.type", "model")) != "model":
            raise UnsupportedModelError(f"{path} holds no whole model: its general.type is {kind!r}.")
        self._files = _parts(path, fields)
        self.name = re.sub(r"-00001-of-\d{5}$", "", path.stem)
        self.size_bytes = sum(file.stat().st_size for file in self._files)
        self._stored = list(self._reader.tensors)
        for part in self._files[1:]:
            self._stored += _open(part).tensors
        for tensor in self._stored:
            self._check_type(tensor)
        self.quantisation = _quantisation(self._stored)
        tensors = {tensor.name: tensor for tensor in self._stored}
        metadata = Metadata(
            str(path),
            {key: _value(fields, key) for key in fields if not key.startswith(TOKENIZER) or key.endswith("_id")},
            {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in tensors.items()},
            lambda name: self._dequantize(tensors[name].data, tensors[name].tensor_type),
        )
        return read_config(metadata)

    def _check_type(self, tensor: Any) -> None:
        try:
            self._dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{self.path}: the tensor {tensor.name} is stored as {tensor.tensor_type.name}, which the "
                "package gguf cannot turn into floats.",
                hint="Give a file of another type, such as F16 or Q8_0.",
            ) from None

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
        return {"format": "gguf", "files": [file_record(file) for file in self._files]}

    def export_tokenizer(self, folder: Path) -> None:
        if "tokenizer.ggml.tokens" in self._reader.fields:
            with self._parsed_once():
                fields = self._reader.fields
                few = {key: _value(fields, key) for key in fields if key.startswith(TOKENIZER) and key not in _LONG}
                export_tokenizer(
                    folder,
                    self.path.parent,
                    complete=lambda tokenizer: complete(tokenizer, few, str(self.path)),
                    gguf_file=self.path.name,
                )

    def bind(self, model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        try:
            with self._parsed_once():
                self._map: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{self.path}: {one_line(error)}") from None
        if self.config.model_type == "gpt_oss":
            self._map |= _gpt_oss_experts(model)
        self._tensors: dict[str, list[Any]] = defaultdict(list)
        for tensor in self._stored:
            target = self._map.get(tensor.name) or self._map.get(tensor.name.removesuffix(".weight"))
            if target is not None:
                self._tensors[target].append(tensor)
            elif tensor.name not in ROPE_TENSORS:
                raise UnsupportedModelError(
                    f"{self.path}: {type(model).__name__} has no use for the tensor {tensor.name}, which may "
                    "change the results.",
                    hint="Give the folder with config.json and the safetensors that the file was made from.",
                )
        check_complete(model, str(self.path), self._tensors)
        for name, tensors in self._tensors.items():
            expected, found = getattr(*owner_of(model, name)).numel(), sum(int(tensor.n_elements) for tensor in tensors)
            if found != expected:
                listed = " and ".join(f"{tensor.name} {tuple(reversed(tensor.shape.tolist()))}" for tensor in tensors)
                raise DamagedError(
                    f"{self.path}: {listed} has {found} values, but its metadata asks for {expected} in {name}."
                )

    def load(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        wanted = [name for name in names if name in self._tensors]
        for name in wanted:
            owner, leaf = owner_of(model, name)
            expected = getattr(owner, leaf)
            value = self._value(name, expected.shape).to(expected.dtype)
            if leaf in owner._parameters:
                owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
        check_finite(model, wanted, str(self.path))

    def originals(self, model: PreTrainedModel) -> list[OriginalFile]:
        """Describe files of all values in float32, under the names that transformers gives them in checkpoints."""
        state = model.state_dict()
        shapes = {name: tuple(state[name].shape) for name in self._tensors}
        places = list(views(model, shapes))
        split = {parameter for _, parameter, _ in places}
        places += [(name, name, all_of(shape)) for name, shape in shapes.items() if name not in split]

        @functools.lru_cache(1)  # one parameter holds all experts of a layer
        def parameter(name: str) -> np.ndarray:
            return self._value(name, shapes[name]).contiguous().numpy()

        def original(file: str, places: Sequence[tuple[str, str, View]]) -> OriginalFile:
            sizes = [4 * math.prod(view.shape) for *_, view in places]
            tensors = [
                StoredTensor(key, "f32", n, name, view) for (key, name, view), n in zip(places, sizes, strict=True)
            ]

            def read(number: int) -> np.ndarray:
                _, name, view = places[number]
                return np.ascontiguousarray(elements(parameter(name), view)).reshape(-1).view(np.uint8)

            head = file_head((key, "F32", view.shape, n) for (key, _, view), n in zip(places, sizes, strict=True))
            return OriginalFile(file, head, tensors, read)

        if len(places) <= _TENSORS_TOGETHER:
            return [original(SINGLE, places)]
        parts = [places[start : start + _TENSORS_TOGETHER] for start in range(0, len(places), _TENSORS_TOGETHER)]
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        index = {
            "metadata": {"total_size": sum(4 * math.prod(view.shape) for *_, view in places)},
            "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key, *_ in part},
        }
        files = [original(name, part) for name, part in zip(names, parts, strict=True)]
        return [*files, OriginalFile(INDEX, json.dumps(index).encode())]

    def _value(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Return a parameter in float32, in the shape that the model has."""
        value = torch.from_numpy(self._read(name))
        if [size for size in value.shape if size != 1] == [size for size in shape if size != 1]:
            value = value.reshape(tuple(shape))  # writers drop dimensions of size 1, or keep them
        if value.shape != tuple(shape):
            raise DamagedError(
                f"{self.path}: {name} has shape {tuple(value.shape)}, but its metadata asks for {tuple(shape)}."
            )
        return value

    def _read(self, name: str) -> np.ndarray:
        if self.config.model_type == "gpt_oss" and "_exps." in self._tensors[name][0].name:
            pieces = sorted(self._tensors[name], key=lambda tensor: tensor.name)  # the gates first
            arrays = [self._dequantize(tensor.data, tensor.tensor_type) for tensor in pieces]
            if name.endswith("_proj"):
                arrays = [array.swapaxes(1, 2) for array in arrays]
            return np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)
        # Expert tensors come in several pieces, which the processors of transformers gather in a dictionary.
        gathered: dict[str, Any] = {"tensors": {}}
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


def _gpt_oss_experts(model: PreTrainedModel) -> dict[str, str]:
    """Name the experts of GPT-OSS, which transformers' table does not have: gates and the rest are interleaved."""
    names = {}
    for layer in range(model.config.num_hidden_layers):
        for ending, suffix in ((".weight", ""), (".bias", "_bias")):
            for piece, whole in (("gate", "gate_up"), ("up", "gate_up"), ("down", "down")):
                names[f"blk.{layer}.ffn_{piece}_exps{ending}"] = (
                    f"model.layers.{layer}.mlp.experts.{whole}_proj{suffix}"
                )
    return names


def _open(path: Path) -> Any:
    import gguf

    with open(path, "rb") as stream:
        version = stream.read(8)[4:]
    if len(version) == 4 and version[:2] == b"\0\0":
        raise UnsupportedModelError(
            f"{path} is a big-endian GGUF file.",
            hint=f"Make a little-endian one: gguf-convert-endian {path.name} little",
        )
    if len(version) == 4 and (number := int.from_bytes(version, "little")) not in (2, 3):
        raise UnsupportedModelError(f"{path} is a GGUF file of version {number}; bstack reads versions 2 and 3.")
    try:
        return gguf.GGUFReader(path)
    except MemoryError:
        raise
    except Exception as error:  # on a bad or short file the reader raises what numpy or struct raise
        if "GGMLQuantizationType" in str(error):
            raise UnsupportedModelError(
                f"{path}: a tensor has a type that gguf {importlib.metadata.version('gguf')} does not know: "
                f"{one_line(error)}.",
                hint="Upgrade gguf, or give a file of another type, such as Q8_0.",
            ) from None
        raise DamagedError(f"{path} is not a whole GGUF file: {one_line(error)}.", hint="Fetch it again.") from None


def _value(fields: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return a value of the metadata; a float32 as the shortest number that it may stand for."""
    if key not in fields:
        return default
    value = fields[key].contents()
    if isinstance(value, float) and fields[key].types[0].name == "FLOAT32":
        return float(str(np.float32(value)))
    return value


def _parts(path: Path, fields: Mapping[str, Any]) -> list[Path]:
    """Find the other files of a model that was split; the first one has the metadata."""
    count, number = _value(fields, "split.count", 1), _value(fields, "split.no", 0)
    if count <= 1:
        return [path]
    match = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", path.name)
    if match is None:
        raise UsageError(f"{path} is one of {count} parts, but is not named like NAME-00001-of-{count:05}.gguf.")
    files = [path.with_name(f"{match[1]}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UsageError(f"{path} is one of {count} parts; {missing[0]} is not beside it.")
    if number != 0:
        raise UsageError(f"{path} is part {number + 1} of {count}.", hint=f"Give the first part, {files[0].name}.")
    return files


def _quantisation(tensors: Iterable[Any]) -> str | None:
    """Return the type that most bytes of the file have, or None if it is a float type."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    ((name, _),) = sizes.most_common(1) or [("F32", 0)]
    return None if name in ("F64", "F32", "F16", "BF16") else name
