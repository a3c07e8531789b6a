"""A reference model's log probabilities in a file, and the user's cache of such files.

    "bstack-reference/2\\n"
    float16 [windows][length - 1][vocabulary], little-endian
    JSON: {"key", "shape", "crc32": one number a window, "extra"}
    8 bytes: length of the JSON, little-endian

Half precision: a log probability between -32 and -16 is off by at most .008, one between -2 and -1 by .0005. What is read
back is normalised again, so that a divergence stays a divergence. The JSON is Python's, which has Infinity and NaN.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bstk
from bstack.folders import cache_folder
from bstk.atomic import Sink, replacing
from bstk.errors import os_errors

__all__ = ["Reference", "ReferenceWriter", "cached", "file_bytes", "write_reference"]

MAGIC = b"bstack-reference/2\n"
MIN_HALF = -65504.0
# All cached references together. One of 16 windows of 512 tokens takes .75 GiB with a vocabulary of 49,152 and 2 GiB
# with 128,256.
LIMIT = 4 * 2**30


def file_bytes(windows: int, length: int, vocabulary: int) -> int:
    """Estimate the bytes of a reference's file."""
    return 2 * windows * (length - 1) * vocabulary + 16 * windows + 4096


class ReferenceWriter:
    """Write the windows in order; `write_reference` makes one."""

    def __init__(self, sink: Sink, shown: str, windows: int):
        self._sink, self._shown, self._windows = sink, shown, windows
        self._shape: tuple[int, ...] = ()
        self._checks: list[int] = []

    def add(self, number: int, logits: torch.Tensor) -> None:
        """Write the next window, `number`; logits of shape (length, vocabulary)."""
        if number != len(self._checks):
            raise bstk.UsageError(
                f"window {number} was given after {len(self._checks)} others.", hint="Give windows in order."
            )
        rows = logits[:-1].float().log_softmax(-1).clamp_min(MIN_HALF).half()
        self._shape = tuple(rows.shape)
        raw = rows.contiguous().numpy().astype("<f2", copy=False).tobytes()
        self._checks.append(zlib.crc32(raw))
        with os_errors(self._shown):
            self._sink.write(raw)

    def end(self, key: str, extra: dict[str, Any]) -> dict[str, Any]:
        """Return what the JSON at the end of the file says."""
        return {"key": key, "shape": [self._windows, *self._shape], "crc32": self._checks, "extra": extra}


def write_reference(
    path: str | os.PathLike[str],
    key: str,
    windows: int,
    fill: Callable[[ReferenceWriter], None],
    extra: Callable[[Reference], dict[str, Any]] | None = None,
) -> Reference:
    """Write a reference of `windows`, which `fill` adds and `extra` describes; it appears whole or not at all."""
    with replacing(path) as (sink, temporary):
        with os_errors(os.fspath(path)):
            sink.write(MAGIC)
        writer = ReferenceWriter(sink, os.fspath(path), windows)
        fill(writer)
        # The unfinished file is read with the JSON that it does not have yet.
        found = {} if extra is None else extra(Reference(temporary, end=writer.end("", {})))
        data = json.dumps(writer.end(key, found)).encode()
        with os_errors(os.fspath(path)):
            sink.write(data + len(data).to_bytes(8, "little"))
    return Reference(path, key)


class Reference:
    """Open a reference that must belong to `key`; every window's checksum is checked when it is read.

    Raises bstk.DamagedError when it is no such file, belongs to something else, or is not whole.
    """

    def __init__(self, path: str | os.PathLike[str], key: str | None = None, end: dict[str, Any] | None = None):
        self.path = os.fspath(path)
        try:
            end = end or self._read_end()
            self.extra: dict[str, Any] = end["extra"]
            self._checks = end["crc32"]
            windows, positions, vocabulary = end["shape"]
            self._rows = np.memmap(self.path, "<f2", "r", len(MAGIC), (windows, positions, vocabulary))
            found = end["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise bstk.DamagedError(f"{self.path} is not a reference of this version: {error}.") from None
        if key is not None and found != key:
            raise bstk.DamagedError(f"{self.path} belongs to another model or text.")

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
                raise ValueError("its length is wrong")
            return end

    @property
    def shape(self) -> tuple[int, int, int]:
        """Windows, positions of each, vocabulary."""
        windows, positions, vocabulary = self._rows.shape
        return windows, positions, vocabulary

    def window(self, number: int) -> torch.Tensor:
        """Return the log probabilities of one window, float32, shape (length - 1, vocabulary)."""
        return torch.from_numpy(self._checked(number).astype(np.float32)).log_softmax(-1)

    def check(self) -> None:
        """Check every window; raises bstk.DamagedError."""
        for number in range(len(self._rows)):
            self._checked(number)

    def _checked(self, number: int) -> np.ndarray:
        rows = np.array(self._rows[number])
        if zlib.crc32(rows.data) != self._checks[number]:
            raise bstk.DamagedError(
                f"{self.path}: window {number} is damaged.", hint="Delete the file, and it is made again."
            )
        return rows


def cached(key: str, size: int, scratch: Path, make: Callable[[Path], Reference]) -> Reference:
    """Open the reference of that key from the user's cache, or `make` it.

    One larger than `LIMIT`, or one for which the folder cannot be written, goes to `scratch` and is made again in the next
    run; for others the ones unused longest are deleted.
    """
    path = cache_folder("references") / f"{key}.ref"
    try:
        found = Reference(path, key)
        found.check()
        os.utime(path)
        return found
    except bstk.DamagedError:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # not there, or not readable: made below
    if size > LIMIT or not _make_room(path.parent, size):
        return make(scratch / path.name)
    return make(path)


def _make_room(folder: Path, size: int) -> bool:
    """Make the folder and delete what was unused longest; return whether that was possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return False
        kept = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.glob("*.ref")), reverse=True)
        total = size
        for _, length, path in kept:
            total += length
            if total > LIMIT:
                path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
