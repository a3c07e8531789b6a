"""Errors of the toolchain. Each class carries the exit code the command line ends with (docs/exit-codes.md)."""

from bstk.errors import BstkError, DamagedError, MissingPackageError, UsageError

__all__ = [
    "CalibrationError",
    "CodecError",
    "DamagedModelError",
    "KernelError",
    "MissingPackageError",
    "ModelNotFoundError",
    "TextNotFoundError",
    "UnsupportedModelError",
    "WeightError",
    "WorkDirectoryError",
    "reason",
]


def reason(error: BaseException) -> str:
    """What another library's exception says, in one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ModelNotFoundError(UsageError):
    """The MODEL argument names neither a folder, a GGUF file nor a reachable hub id."""


class UnsupportedModelError(BstkError):
    """The model exists and is readable, but bstack cannot compress it."""


class DamagedModelError(DamagedError):
    """A checkpoint file is incomplete or inconsistent."""


class WeightError(BstkError):
    """A weight holds NaN or infinite values."""


class CalibrationError(BstkError):
    """The calibration text cannot be read or is too short."""


class WorkDirectoryError(UsageError):
    """The work directory belongs to a run with other settings, or to another running process."""


class TextNotFoundError(CalibrationError, UsageError):
    """The text argument names neither a file, a folder nor a reachable hub data set."""

    exit_code = UsageError.exit_code


class CodecError(UsageError):
    """A codec setting is outside what the codec allows."""


class KernelError(UsageError):
    """An environment variable asks for kernels or threads that cannot be had here."""
