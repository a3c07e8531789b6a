"""What can go wrong with a ``.bstk`` file, one class for each thing a caller may want to tell apart.

``exit_code`` is what the ``bstack`` command ends with when the error reaches the top; the table for users stands in
``docs/exit-codes.md``, and a test holds the two together.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class BstkError(Exception):
    """Base of all errors of this package; ``args[0]`` is the message."""

    exit_code = 1


class OutputError(BstkError):
    """The result cannot be written where it was asked for."""


class UsageError(BstkError):
    """The call makes no sense: a budget that is no size, a chunk that contradicts itself, an output equal to the input."""

    exit_code = 2


class BusyError(UsageError):
    """Another process is writing the same file."""


class OtherModelError(UsageError):
    """Two files that should belong to one model have different root digests."""


class MissingPackageError(BstkError):
    """An optional package is needed for this and not installed."""


class RemoteError(BstkError):
    """A file on a server cannot be read; the classes below say why."""


class UnreachableError(RemoteError):
    """The server cannot be found, does not answer, or is out of order."""


class CertificateError(RemoteError):
    """The TLS connection failed: usually a certificate that is not trusted."""


class RemoteAccessError(RemoteError):
    """The server asks for permission (401, 403, 407)."""


class RemoteNotFoundError(RemoteError, UsageError):
    """The server has no such file (404, 410), or the URL is none."""

    exit_code = UsageError.exit_code


class RemoteAnswerError(RemoteError):
    """The server's answer cannot be used: it compresses, contradicts itself, or does not say what is needed."""


class RemoteChangedError(RemoteError):
    """The file on the server was replaced while it was read."""


class PartialError(BstkError):
    """The file is a valid but shorter part of an unsealed file, and a whole one was asked for."""

    exit_code = 3


class NotBstkError(BstkError):
    """These bytes are not a ``.bstk`` file."""

    exit_code = 4


class UnsupportedVersionError(BstkError):
    """A ``.bstk`` file made by a newer writer, with something in it that this reader does not know."""

    exit_code = 4


class DamagedError(BstkError):
    """A check failed: a digest, a checksum, a length, or a rule of the format.

    Attributes
    ----------
    chunk : bstk.Chunk or None
        The chunk the damage lies in, if it lies in one.
    """

    exit_code = 5
    chunk = None


class TruncatedError(DamagedError):
    """The file ends before its smallest model does."""


class RootMismatchError(DamagedError):
    """The root digest is not the expected one: another model, or one that somebody changed."""


class BudgetError(BstkError):
    """The budget is below the smallest model.

    Attributes
    ----------
    smallest_bytes : int
        The smallest budget that works, in bytes.
    """

    exit_code = 6

    def __init__(self, message: str, smallest_bytes: int = 0):
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class ResourceError(BstkError):
    """Not enough memory or disk."""

    exit_code = 7


class Interrupted(BstkError):
    """Stopped by the user; the same command resumes."""

    exit_code = 75


class TransferError(RemoteError):
    """The connection broke off too often; what has arrived is kept, and the same command resumes."""

    exit_code = Interrupted.exit_code


class PartialWarning(UserWarning):
    """The opened file is a shorter part of an unsealed file: a valid model, smaller than the one that was made."""


@contextmanager
def error_prefix(name: str) -> Iterator[None]:
    """Put ``name: `` before the message of any BstkError raised inside, so that each message says which file it is about."""
    try:
        yield
    except BstkError as error:
        error.args = (f"{name}: {error.args[0]}", *error.args[1:])
        raise


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into ResourceError (no room) or OutputError (anything else)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{path}: cannot write: {reason}. Free some space, or write to another disk."
            ) from error
        raise OutputError(f"{path}: cannot write: {reason}.") from error
