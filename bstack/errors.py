"""Errors of the toolchain beside those of bstk. Each class carries the exit code of the command line (docs/guide.md)."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterable

from bstk.errors import BstkError, ResourceError, UsageError

__all__ = [
    "DeviceError",
    "ForeignCodeError",
    "ForeignCodeWarning",
    "ModelWarning",
    "SlowerWarning",
    "UnsupportedModelError",
]
__all__ += ["COMPRESS", "device_failed", "device_full", "holds_unknown", "lacks", "of_the_machine", "one_line"]
__all__ += ["out_of_memory", "printable", "require", "user_message"]

# What the extra `compress` brings: everything but reading, cutting and running files needs all of it.
COMPRESS = ("torch", "transformers", "safetensors")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def one_line(error: BaseException) -> str:
    """Return the first line of another library's exception, with the next where that is a heading; its class where it has none."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return printable(f"{first} {more[0].strip()}" if first.endswith(":") and more else first)


def printable(value: object) -> str:
    """Return `value` as text without control characters: names and metadata of files must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(value))


def user_message(error: BaseException) -> tuple[str, int] | None:
    """Return what a user reads about an error that ends a process, and the exit code; None if only a bug lets it through."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        return _on_one_line(str(error)), code
    if out_of_memory(error):
        return "not enough memory.", ResourceError.exit_code
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        message = _on_one_line(f"{place}{error.strerror or one_line(error)}.")
        return message, ResourceError.exit_code if error.errno in NO_ROOM else 1
    return None


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is full; torch says it with a RuntimeError."""
    if isinstance(error, RuntimeError) and "Cannot allocate memory" in str(error):
        return True
    return isinstance(error, MemoryError) or device_full(error)


def device_full(error: BaseException) -> bool:
    """Return whether an error says that a GPU's memory is full; torch, cuBLAS and the driver say it in words of their own."""
    words = str(error).lower()
    full = "out of memory" in words or "out_of_memory" in words or "alloc_failed" in words
    return type(error).__name__ == "OutOfMemoryError" or (full and _of_a_device(error))


def device_failed(error: BaseException) -> bool:
    """Return whether an error says that a GPU failed or was lost."""
    return _of_a_device(error) and not device_full(error)


def _of_a_device(error: BaseException) -> bool:
    """Return whether an error is a GPU's; torch and cuda-core have private classes for it."""
    return type(error).__name__ in ("AcceleratorError", "CUDAError") or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def of_the_machine(error: BaseException) -> bool:
    """Return whether an error says nothing of a model: memory is full, or a disk or a GPU does not do its work."""
    return isinstance(error, OSError) or out_of_memory(error) or device_failed(error)


def _on_one_line(message: str) -> str:
    """Escape line breaks too: those of a message are part of a name in it."""
    return printable(message).replace("\n", "\\x0a")


def require(what: str, extra: str = "compress", packages: Iterable[str] = COMPRESS) -> None:
    """Raise BstkError, before any work, if a package of an extra is missing; `what` begins the message."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise BstkError(f"{what} needs the package {package}: pip install 'bstack[{extra}]'")


class UnsupportedModelError(BstkError):
    """bstack can read the model, but not compress or run it."""


def lacks(shown: str, missing: Iterable[str]) -> UnsupportedModelError:
    """Return the error of a file without some parameters of its model; `shown` names the file."""
    names = sorted(missing)
    return UnsupportedModelError(f"{shown} lacks {names[0]} ({len(names)} parameters), which its model needs.")


def holds_unknown(shown: str, name: str) -> UnsupportedModelError:
    """Return the error of a file with a weight that its model does not have."""
    return UnsupportedModelError(f"{shown} holds {name}, which this transformers' model does not have.")


class DeviceError(ResourceError):
    """A GPU does not answer any more; the process cannot use it again."""


class ForeignCodeError(UnsupportedModelError, UsageError):
    """The model needs Python code that is not in transformers, and that the user has not allowed or not named."""

    exit_code = UsageError.exit_code


class ModelWarning(UserWarning):
    """A part of a model's files is left out, or bstack had to choose between them."""


class ForeignCodeWarning(ModelWarning):
    """Python code from outside bstack and transformers is about to run, because the user allowed it."""


class SlowerWarning(ModelWarning):
    """A model runs right, but slower than it could."""
