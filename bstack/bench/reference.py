"""A reference model's log probabilities in a file: written window by window, read back one window at a time.

    "bstack-reference/1\\n"
    float16 [windows][length - 1][vocabulary], little-endian
    JSON: {"key", "shape", "crc32": one number a window, "extra"}
    8 bytes: length of the JSON, little-endian

Half precision: a log probability between -32 and -16 is off by at most .008, one between -2 and -1 by .0005. What is read back is
normalised again, so that a distance stays a distance; docs/bench.md has what the rounding does to it (nothing visible).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import bstk
from bstk.atomic import Sink, replacing
from bstk.errors import os_errors

__all__ = ["Reference", "ReferenceWriter", "file_bytes", "write_reference"]

MAGIC = b"bstack-reference/1\n"
LOWEST = -65504.0


def file_bytes(windows: int, length: int, vocabulary: int) -> int:
    """Bytes of a reference's file, nearly."""
    return 2 * windows * (length - 1) * vocabulary + 16 * windows + 4096


class ReferenceWriter:
    """Receives the windows in order; `write_reference` makes one."""

    def __init__(self, sink: Sink, shown: str, windows: int):
        self._sink, self._shown, self._windows = sink, shown, windows
        self._shape: tuple[int, ...] = ()
        self._checks: list[int] = []

    def add(self, number: int, logits: torch.Tensor) -> None:
        """Write window `number`, which follows the one before; logits of shape (length, vocabulary)."""
        if number != len(self._checks):
            raise bstk.UsageError(f"window {number} was given after {len(self._checks)} others; they go in order.")
        rows = logits[:-1].float().log_softmax(-1).clamp_min(LOWEST).half()
        self._shape = tuple(rows.shape)
        raw = rows.contiguous().numpy().astype("<f2", copy=False).tobytes()
        self._checks.append(zlib.crc32(raw))
        with os_errors(self._shown):
            self._sink.write(raw)

    def finish(self, key: str, extra: dict[str, Any]) -> None:
        """Write the end."""
        data = json.dumps(self._end(key, extra)).encode()
        with os_errors(self._shown):
            self._sink.write(data + len(data).to_bytes(8, "little"))

    def readable(self, temporary: str) -> Reference:
        """What has been written, to compare with before it is finished."""
        return Reference.unfinished(temporary, self._end("", {}))

    def _end(self, key: str, extra: dict[str, Any]) -> dict[str, Any]:
        return {"key": key, "shape": [self._windows, *self._shape], "crc32": self._checks, "extra": extra}


def write_reference(
    path: str | os.PathLike[str],
    key: str,
    windows: int,
    fill: Callable[[ReferenceWriter], None],
    extra: Callable[[Reference], dict[str, Any]] | None = None,
) -> Reference:
    """Write a reference, whole or not at all.

    Parameters
    ----------
    path : path
        Where it appears when it is complete.
    key : str
        What it belongs to.
    windows : int
    fill : callable
        Adds every window to the writer.
    extra : callable
        Called after it with the reference as it stands, not yet in its place; plain JSON values to keep with it.

    Raises
    ------
    bstk.ResourceError
        The disk is full.
    """
    with replacing(path) as (sink, temporary):
        with os_errors(os.fspath(path)):
            sink.write(MAGIC)
        writer = ReferenceWriter(sink, os.fspath(path), windows)
        fill(writer)
        writer.finish(key, {} if extra is None else extra(writer.readable(temporary)))
    return Reference(path, key)


class Reference:
    """An open reference; every window's checksum is checked when it is read.

    Parameters
    ----------
    path : path
    key : str or None
        What it must belong to.

    Raises
    ------
    bstk.DamagedError
        It is not such a file, belongs to something else, or is not whole.
    OSError
        It cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], key: str | None = None):
        self.path = os.fspath(path)
        try:
            end = self._read_end()
            self._open(end)
            found = end["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise bstk.DamagedError(f"{self.path} is no reference of this version: {error}.") from None
        if key is not None and found != key:
            raise bstk.DamagedError(f"{self.path} belongs to another model or text.")

    @classmethod
    def unfinished(cls, path: str, end: dict[str, Any]) -> Reference:
        """One whose windows are all there, and its end not yet."""
        reference = cls.__new__(cls)
        reference.path = path
        reference._open(end)
        return reference

    def _open(self, end: dict[str, Any]) -> None:
        self.extra: dict[str, Any] = end["extra"]
        self._checks = end["crc32"]
        windows, positions, vocabulary = end["shape"]
        self._rows = np.memmap(self.path, "<f2", "r", len(MAGIC), (windows, positions, vocabulary))

    def _read_end(self) -> dict[str, Any]:
        with open(self.path, "rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise ValueError("it starts with something else")
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(size - 8, 0))
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8 - len(MAGIC):
                raise ValueError("it is cut off")
            stream.seek(size - 8 - length)
            end = json.loads(stream.read(length))
            if size != len(MAGIC) + 2 * int(np.prod([int(n) for n in end["shape"]])) + length + 8:
                raise ValueError("its length does not fit")
            return end

    @property
    def shape(self) -> tuple[int, int, int]:
        """Windows, positions of each, vocabulary."""
        return self._rows.shape

    def window(self, number: int) -> torch.Tensor:
        """Log probabilities of one window, float32, shape (length - 1, vocabulary).

        Raises
        ------
        bstk.DamagedError
            The window does not match its checksum.
        """
        return torch.from_numpy(self._checked(number).astype(np.float32)).log_softmax(-1)

    def check(self) -> None:
        """Check every window; raises bstk.DamagedError."""
        for number in range(len(self._rows)):
            self._checked(number)

    def _checked(self, number: int) -> np.ndarray:
        rows = np.array(self._rows[number])
        if zlib.crc32(rows.data) != self._checks[number]:
            raise bstk.DamagedError(f"{self.path}: window {number} is damaged. Delete the file; it will be made again.")
        return rows
