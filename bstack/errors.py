"""Errors of the toolchain. Each class carries the exit code the command line ends with (docs/exit-codes.md)."""

from __future__ import annotations

import errno

from bstk.errors import BstkError, DamagedError, Interrupted, MissingPackageError, ResourceError, UsageError

__all__ = [
    "CalibrationError",
    "ClusterError",
    "ClusterLostError",
    "CodecError",
    "DamagedModelError",
    "ForeignCodeError",
    "ForeignCodeWarning",
    "KernelError",
    "MissingPackageError",
    "ModelNotFoundError",
    "TextNotFoundError",
    "UnsupportedModelError",
    "WeightError",
    "WorkDirectoryError",
    "user_message",
    "one_line",
]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def one_line(error: BaseException) -> str:
    """What another library's exception says, in one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def user_message(error: BaseException) -> tuple[str, int] | None:
    """What to tell the user of an error that ends a process.

    Parameters
    ----------
    error : exception

    Returns
    -------
    (str, int) or None
        The message and the exit code (docs/exit-codes.md); None for an exception that only a bug of bstack lets through.
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


class ModelNotFoundError(UsageError):
    """The MODEL argument names neither a folder, a GGUF file nor a reachable hub id."""


class UnsupportedModelError(BstkError):
    """The model exists and is readable, but bstack cannot compress it."""


class ForeignCodeError(UnsupportedModelError, UsageError):
    """The model needs Python code that is not in transformers, and that the user has not allowed or not named."""

    exit_code = UsageError.exit_code


class ForeignCodeWarning(UserWarning):
    """Python code that is neither bstack's nor transformers' is about to run, because the user allowed it."""


class DamagedModelError(DamagedError):
    """A checkpoint file is incomplete or inconsistent."""


class WeightError(BstkError):
    """A weight holds NaN or infinite values."""


class CalibrationError(BstkError):
    """The calibration text cannot be read, is too short, or makes the model compute NaN."""


class ClusterError(BstkError):
    """A Dask cluster cannot be used: no scheduler, no workers, or other versions there."""


class ClusterLostError(ClusterError):
    """A Dask cluster went away during the work, or its workers keep dying; the same command goes on."""

    exit_code = Interrupted.exit_code


class WorkDirectoryError(UsageError):
    """The work directory belongs to a run with other settings, or to another running process."""


class TextNotFoundError(CalibrationError, UsageError):
    """The text argument names neither a file, a folder nor a reachable hub data set."""

    exit_code = UsageError.exit_code


class CodecError(UsageError):
    """A codec setting is outside what the codec allows."""


class KernelError(UsageError):
    """An environment variable asks for kernels or threads that cannot be had here."""
