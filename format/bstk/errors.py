"""Errors of reading and writing ``.bstk`` files: one class for each case that callers branch on.

``exit_code`` is what the ``bstack`` command ends with; ``docs/guide.md`` explains the codes to users.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class BstkError(Exception):
    """Base of all errors of this package. ``str(error)`` is the prefix, the message and the hint.

    Attributes
    ----------
    hint : str or None
        What to do about it.
    option : str or None
        The Python parameter that allows what was refused, such as "overwrite".
    prefix : str
        Where it happened, such as ``"model.bstk: "``; see `error_prefix`.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, hint: str | None = None, option: str | None = None):
        super().__init__(message)
        self.hint = hint
        self.option = option
        self.prefix = ""

    def __str__(self) -> str:
        return self.prefix + super().__str__() + (f" {self.hint}" if self.hint else "")


class OutputError(BstkError):
    """The result cannot be written where it was asked for."""


class UsageError(BstkError):
    """The call is invalid, such as a budget that is not a positive number, or an output that exists."""

    exit_code = 2


class RemoteError(BstkError):
    """A file on a server cannot be read.

    `missing`: the server has no such file, or the URL is invalid. `resumable`: the connection broke off too often; what has
    arrived is kept, and the same call continues.
    """

    def __init__(self, message: str = "", *, hint: str | None = None, missing: bool = False, resumable: bool = False):
        super().__init__(message, hint=hint)
        self.missing = missing
        self.resumable = resumable
        if missing or resumable:
            self.exit_code = UsageError.exit_code if missing else Interrupted.exit_code


class RemoteChangedError(RemoteError):
    """The file on the server was replaced while it was read."""


class PartialError(BstkError):
    """The file is a valid but shorter part of an unsealed file, and a whole one was asked for."""

    exit_code = 3


class NotBstkError(BstkError):
    """These bytes are not a ``.bstk`` file."""

    exit_code = 4


class UnsupportedVersionError(BstkError):
    """A newer writer made the file, with features that this reader does not know."""

    exit_code = 4


class DamagedError(BstkError):
    """A check failed: a digest, a checksum, a length, a rule of the format. `chunk` is the damaged one, if there is one."""

    exit_code = 5

    def __init__(self, message: str = "", *, hint: str | None = None, chunk: Any = None):
        super().__init__(message, hint=hint)
        self.chunk = chunk


class TruncatedError(DamagedError):
    """The file ends before its base model does."""


class BudgetError(BstkError):
    """The budget is below the base model; `smallest_bytes` is the smallest budget that works, in bytes."""

    exit_code = 6

    def __init__(self, message: str = "", smallest_bytes: int = 0, *, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.smallest_bytes = smallest_bytes


class ResourceError(BstkError):
    """There is not enough memory or disk space."""

    exit_code = 7


class Interrupted(BstkError):
    """The user stopped the work, or a Dask cluster or a GPU went away; the same command resumes."""

    exit_code = 75


class PartialWarning(UserWarning):
    """The opened file is a shorter part of an unsealed file: a valid model, smaller than the one that was made."""


@contextmanager
def error_prefix(name: str) -> Iterator[None]:
    """Put ``name: `` before the message of any BstkError raised inside."""
    try:
        yield
    except BstkError as error:
        error.prefix = f"{name}: {error.prefix}"
        raise


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into ResourceError (no space) or OutputError (anything else)."""
    try:
        yield
    except OSError as error:
        message = f"{path}: cannot write: {error.strerror or error}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(message, hint="Free some space, or write to another disk.") from error
        raise OutputError(message) from error
