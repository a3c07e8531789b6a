"""Errors of the toolchain beside those of bstk. Each class carries the exit code of the command line (docs/guide.md)."""

from __future__ import annotations

import errno

from bstk.errors import BstkError, DamagedError, Interrupted, MissingPackageError, ResourceError, UsageError

__all__ = [
    "CalibrationError",
    "ClusterError",
    "ClusterLostError",
    "DamagedError",
    "ForeignCodeError",
    "ForeignCodeWarning",
    "MissingPackageError",
    "SlowerWarning",
    "UnsupportedModelError",
    "one_line",
    "user_message",
]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def one_line(error: BaseException) -> str:
    """Return the first line of another library's exception, or its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def user_message(error: BaseException) -> tuple[str, int] | None:
    """Return what a user reads about an error that ends a process, and the exit code (docs/guide.md).

    Parameters
    ----------
    error : exception

    Returns
    -------
    (str, int) or None
        None for an exception that only a bug of bstack lets through.
    """
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


class ForeignCodeError(UnsupportedModelError, UsageError):
    """The model needs Python code that is not in transformers, and that the user has not allowed or not named."""

    exit_code = UsageError.exit_code


class ForeignCodeWarning(UserWarning):
    """Python code from outside bstack and transformers is about to run, because the user allowed it."""


class SlowerWarning(RuntimeWarning):
    """Something is right but slower than it could be."""


class CalibrationError(BstkError):
    """The calibration text cannot be read, is too short, or makes the model compute NaN."""


class ClusterError(BstkError):
    """A Dask cluster cannot be used: it has no scheduler, no workers, or other versions."""


class ClusterLostError(ClusterError):
    """A Dask cluster went away during the work, or its workers keep dying; the same command goes on."""

    exit_code = Interrupted.exit_code
