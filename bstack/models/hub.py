"""Snapshots of models on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bstack.errors import ModelNotFoundError, one_line

__all__ = ["hub_snapshot"]


def hub_snapshot(model: str, files: Sequence[str], what: str) -> Path:
    """Fetch files of a model, or find them in the hub's cache.

    Parameters
    ----------
    model : str
        A hub id, ``owner/name``, optionally with ``@revision``.
    files : sequence of str
        Patterns of the names.
    what : str
        What could be given instead, for the error.

    Returns
    -------
    Path
        A folder, named after the commit.

    Raises
    ------
    bstack.errors.ModelNotFoundError
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
    raise ModelNotFoundError(f"No model {model!r}: there is no such folder or file, and {why}. {what}")
