"""Errors of the toolchain beside those of bstk. Each class carries the exit code of the command line (docs/guide.md)."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from bstk.errors import BstkError, ResourceError, UsageError

__all__ = ["ForeignCodeError", "ForeignCodeWarning", "UnsupportedModelError", "holds_unknown", "lacks"]
__all__ += ["one_line", "user_message"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def one_line(error: BaseException) -> str:
    """Return the first line of another library's exception, or its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def user_message(error: BaseException) -> tuple[str, int] | None:
    """Return what a user reads about an error that ends a process, and the exit code; None if only a bug lets it through."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        return str(error), code
    if isinstance(error, MemoryError):
        return "not enough memory.", ResourceError.exit_code
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or one_line(error)}.", ResourceError.exit_code if error.errno in NO_ROOM else 1
    return None


class UnsupportedModelError(BstkError):
    """bstack can read the model, but not compress or run it."""


def lacks(shown: str, missing: Iterable[str]) -> UnsupportedModelError:
    """Return the error of a file without some parameters of its model; `shown` names the file."""
    names = sorted(missing)
    return UnsupportedModelError(f"{shown} lacks {names[0]} ({len(names)} parameters), which its model needs.")


def holds_unknown(shown: str, name: str) -> UnsupportedModelError:
    """Return the error of a file with a weight that its model does not have."""
    return UnsupportedModelError(f"{shown} holds {name}, which this transformers' model does not have.")


class ForeignCodeError(UnsupportedModelError, UsageError):
    """The model needs Python code that is not in transformers, and that the user has not allowed or not named."""

    exit_code = UsageError.exit_code


class ForeignCodeWarning(UserWarning):
    """Python code from outside bstack and transformers is about to run, because the user allowed it."""
