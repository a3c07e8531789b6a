"""Read the model's files, its modules and its parameters from a container, and rebuild it with dense weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.codecs import codec_of_kind
from bstack.engine.exact import restored_rows
from bstack.engine.parts import part_of, parts_of
from bstack.engine.text import understood
from bstack.errors import UnsupportedModelError, lacks
from bstack.models.code import reset_choices
from bstack.models.files import put_files
from bstack.models.generation import read_generation
from bstack.models.skeleton import quiet_transformers
from bstack.models.tokenizer import tokenizer_files
from bstk.errors import error_prefix, os_errors

__all__ = [
    "build_model",
    "dense_model",
    "dense_weights",
    "embedded_files",
    "load_tokenizer",
    "plain_tensor",
    "read_config",
]

_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
_INTEGERS = {"i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8}
DTYPES = {**_FLOATS, **_INTEGERS, "bool": torch.bool}


@contextmanager
def embedded_files(file: bstk.Reader) -> Iterator[Path]:
    """Write the files in a container to a folder, for the length of a `with` block."""
    with tempfile.TemporaryDirectory(prefix="bstack-") as name:
        folder = Path(name) / "model"  # one name: transformers caches code that it runs under it
        with os_errors(str(folder)):
            folder.mkdir()
        # Python modules stay inside: no code of a container ever runs.
        names = [inside for inside in file.files if not any(part.endswith(".py") for part in inside.split("/"))]
        put_files(((inside, file.file_pieces(inside)) for inside in names), folder, file.source.name)
        yield folder


def build_model(
    file: bstk.Reader, folder: Path, trusted: bool, without_weights: AbstractContextManager[Any], **settings: Any
) -> Any:
    """Build the model of a container's configuration, in the context `without_weights`, with its generation settings.

    `trusted` allows Python code in the folder to run; `settings` are those of transformers' `from_config`.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    shown = file.source.name
    config = read_config(file, folder, trusted)
    with understood(shown, f"this transformers cannot build its model ({config.model_type})"), without_weights:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted, **settings)
    if (generation := read_generation(folder, shown, config.get_text_config().vocab_size)) is not None:
        model.generation_config = GenerationConfig.from_dict(generation)
    return model


def read_config(file: bstk.Reader, folder: Path, trusted: bool) -> Any:
    """Read a container's configuration from the folder of its files."""
    from transformers import AutoConfig

    shown = file.source.name
    with understood(shown, "its configuration cannot be used by this transformers"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        reset_choices(config)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(file.chunks):
        raise UnsupportedModelError(
            f"{shown}: its configuration asks for {layers} layers, but it holds {len(file.chunks)} chunks."
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(f"{shown}: its configuration names a quantisation, but a .bstk file has its own.")
    return config


def load_tokenizer(folder: Path, shown: str, trusted: bool) -> Any | None:
    """Load the tokenizer; None if the original has none."""
    from transformers import AutoTokenizer

    if not tokenizer_files(path.name for path in folder.iterdir()):
        return None
    with understood(shown, "its tokenizer cannot be used by this transformers"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)


def plain_tensor(raw: bytes, chunk: bstk.Chunk) -> torch.Tensor:
    """Return the tensor of a plain chunk, in its stored type."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(DTYPES[chunk.dtype]).reshape(chunk.shape)


def dense_model(
    file: bstk.Reader, chunks: tuple[bstk.Chunk, ...], folder: Path, dtype: torch.dtype, trusted: bool = False
) -> Any:
    """Build the model of the given chunks, a prefix of the file's."""
    shown = file.source.name
    model = build_model(file, folder, trusted, torch.device("meta"))
    weights = dict(dense_weights(file, chunks, model, dtype))
    # from_pretrained also computes buffers that no checkpoint holds, and ties parameters.
    cls, config, generation = type(model), model.config, model.generation_config
    with quiet_transformers(), understood(shown, "its weights do not fit the model of its configuration"):
        settings = {"config": config, "state_dict": weights, "dtype": dtype, "output_loading_info": True}
        filled, info = cls.from_pretrained(None, **settings)
    if info["missing_keys"]:
        raise lacks(shown, info["missing_keys"])
    filled.generation_config = generation
    return filled.eval()


def dense_weights(
    file: bstk.Reader, chunks: tuple[bstk.Chunk, ...], model: torch.nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and tensor of each parameter, rebuilt from the given chunks; `model` gives the full shapes.

    Where an exact chunk is among them, the matrix is the original.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Before memory is allocated: the shapes come from a configuration.
    with error_prefix(file.source.name):
        parts = parts_of(chunks, shapes)
    for chunk in chunks:
        if chunk.is_weight and not chunk.is_block:
            tensor = plain_tensor(file.read(chunk), chunk)
            yield chunk.name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    exact = {chunk.name: chunk for chunk in chunks if chunk.kind is bstk.EXACT}
    for parameter, matrices in parts.items():
        tensor = torch.empty(shapes[parameter], dtype=dtype)
        for matrix, blocks in matrices:
            view = part_of(matrix, tensor, blocks[0])
            if (remainder := exact.get(blocks[0].name)) is not None:
                for start, bits in restored_rows(file, blocks, remainder):
                    signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))  # torch lacks half of the unsigned types
                    view[start : start + len(bits)].copy_(signed.view(DTYPES[remainder.dtype]))
                continue
            codec = codec_of_kind(blocks[0].kind)
            payloads = [file.read(block) for block in blocks]
            rows, columns = blocks[0].shape
            view.copy_(codec.rebuild(payloads, [b.kind for b in blocks], [b.rank for b in blocks], (rows, columns)))
        yield parameter, tensor
