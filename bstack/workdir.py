"""The work directory of a compression: finished parts that survive an interruption.

A part is a set of packed chunks (``NAME.bin``) and their records (``NAME.json``). The records appear last and whole, so a part
is finished exactly when its records exist. The directory belongs to one run with one set of settings; a lock keeps a second
process out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bstk
from bstack.errors import one_line
from bstk import atomic
from bstk.atomic import replacing, sync_folder
from bstk.errors import DamagedError, UsageError, os_errors

__all__ = ["Part", "Record", "WorkDirectory"]

SETTINGS = "settings.json"
LOCK = "lock"


@dataclass(frozen=True)
class Record:
    """One packed chunk of a part."""

    entry: bstk.Entry
    gain: float  # of a block: the predicted fall of the divergence to the original, nats per token
    read: Callable[[], bytes]  # returns the packed bytes; raises bstk.DamagedError if they are not what was written


class Part:
    """A part under construction; `add` packs chunks, leaving the context without an error finishes it."""

    def __init__(self, folder: Path, name: str):
        self._data = folder / f"{name}.bin"
        self._records_path = folder / f"{name}.json"
        self.records: list[dict[str, Any]] = []
        with os_errors(str(self._data)):
            self._stream = open(self._data, "wb")  # noqa: SIM115 (closed by close)
        self._offset = 0

    def add(
        self, raw: bytes | Sequence[bytes], *, name: str, kind: bstk.Kind, gain: float = 0.0, **fields: Any
    ) -> None:
        """Pack one chunk, given whole or as the parts of `bstk.pack_parts`; `fields` as in `bstk.Entry`."""
        frame = bstk.pack(raw) if isinstance(raw, bytes) else bstk.pack_parts(raw)
        with os_errors(str(self._data)):
            self._stream.write(frame.stored)
        record = {"name": name, "kind": kind.code, "gain": gain, "start": self._offset, "digest": frame.digest.hex()}
        lengths = {"raw_length": frame.raw_length, "stored_length": len(frame.stored)}
        self.records.append({**record, **lengths, **fields})
        self._offset += len(frame.stored)

    def close(self, *, finished: bool) -> None:
        """Write the records of a finished part, and close its file."""
        if not finished:
            with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the part
                self._stream.close()
            return
        with os_errors(str(self._data)), self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        sync_folder(str(self._data.parent))  # no power cut may leave the records without the bytes
        _write_whole(self._records_path, json.dumps(self.records).encode())


class WorkDirectory:
    """Create the directory in an existing folder, or resume from the one that an interrupted run left.

    `settings` are what decides the output, as plain JSON values. A directory with the work of other settings, or that
    another process uses, is a UsageError.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        # Through JSON and back, so that tuples and lists compare equal.
        settings = json.loads(json.dumps(settings))
        with os_errors(str(path)):
            path.mkdir(exist_ok=True)
        self._lock()
        try:
            self._resume(settings)
        except BaseException:
            self.release()
            raise

    def _resume(self, settings: dict[str, Any]) -> None:
        file = self.path / SETTINGS
        if not file.exists():
            if stray := [p.name for p in self.path.iterdir() if p.name != LOCK and p.suffix != ".part"]:
                raise UsageError(
                    f"{self.path} is not a work directory of bstack: it holds {stray[0]} and no {SETTINGS}.",
                    hint="Name another as work_dir.",
                    option="work_dir",
                )
            _write_whole(file, json.dumps(settings, indent=1, sort_keys=True).encode())
            return
        try:
            earlier = json.loads(file.read_bytes())
        except ValueError:
            raise UsageError(f"{file} is damaged.", hint=f"Delete {self.path} to start over.") from None
        if changes := list(_differences(earlier, settings)):
            raise UsageError(
                f"{self.path} holds unfinished work with other settings: {'; '.join(changes)}.",
                hint=(
                    "Repeat the earlier settings to resume, or delete the directory (or name another as "
                    "work_dir) to start over."
                ),
                option="work_dir",
            )

    def _lock(self) -> None:
        lock = self.path / LOCK
        with os_errors(str(lock)):
            self._lock_file = open(lock, "a+b")  # noqa: SIM115 (open as long as the directory is locked)
            free = atomic.try_lock(self._lock_file.fileno())
        # Another process may have removed the directory between the two calls: what is locked must be what is there.
        if not free or not atomic.is_at(self._lock_file.fileno(), str(lock)):
            self._lock_file.close()
            raise UsageError(
                f"{self.path} is in use by another bstack compress.",
                hint="Wait for it, or name another as work_dir.",
                option="work_dir",
            )

    def release(self) -> None:
        """Let other processes use it. The lock also ends with the process."""
        self._lock_file.close()

    def has(self, name: str) -> bool:
        """Return whether the part or value is finished."""
        return (self.path / f"{name}.json").is_file()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Build a part; it is finished when the block ends without an error."""
        part = Part(self.path, name)
        try:
            yield part
        except BaseException:
            part.close(finished=False)
            raise
        part.close(finished=True)

    def records(self, name: str) -> list[Record]:
        """Return the chunks of a finished part; raise DamagedError, which names the file to delete, for other records."""
        file, data = self.path / f"{name}.json", self.path / f"{name}.bin"

        def record(start: int, gain: float, kind: int, digest: str, shape: Sequence[int] = (), **fields: Any) -> Record:
            def read() -> bytes:
                with _kept(file, data), open(data, "rb") as stream:
                    stream.seek(start)
                    stored = stream.read(entry.stored_length)
                    if hashlib.sha256(stored).digest() != entry.digest:
                        raise ValueError(f"the bytes of {entry.name} are not those that were written")
                    return stored

            entry = bstk.Entry(
                kind=bstk.kinds.BY_CODE[kind], digest=bytes.fromhex(digest), shape=tuple(shape), stored=read, **fields
            )
            return Record(entry, gain, read)

        with _kept(file, file):
            return [record(**fields) for fields in json.loads(file.read_bytes())]

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a plain JSON value, computed once and kept."""
        file = self.path / f"{name}.json"
        if not self.has(name):
            _write_whole(file, json.dumps(compute()).encode())
        with _kept(file, file):
            return json.loads(file.read_bytes())

    def tensors(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a dictionary of torch tensors, computed once and kept."""
        import safetensors.torch

        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            _write_whole(file, safetensors.torch.save({k: t.cpu().contiguous() for k, t in compute().items()}))
        with _kept(file, file):
            return safetensors.torch.load(file.read_bytes())

    def has_tensors(self, name: str) -> bool:
        """Return whether the dictionary of tensors exists."""
        return (self.path / f"{name}.safetensors").is_file()

    def forget_tensors(self, name: str) -> None:
        """Have the dictionary of tensors computed again."""
        file = self.path / f"{name}.safetensors"
        with os_errors(str(file)):
            file.unlink(missing_ok=True)

    def scratch(self) -> Path:
        """Return an empty folder for the run's own temporary files."""
        folder = self.path / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        with os_errors(str(folder)):
            folder.mkdir()
        return folder

    def remove(self) -> None:
        """Delete everything: the output is written.

        A removal that is stopped leaves a directory to resume from: the records of a part go before its chunks, the settings
        go last.
        """
        last = (SETTINGS, LOCK)
        with contextlib.suppress(OSError):
            for file in sorted(self.path.iterdir(), key=lambda path: path.suffix != ".json"):
                if file.is_dir():
                    shutil.rmtree(file, ignore_errors=True)
                elif file.name not in last:
                    file.unlink()
            (self.path / SETTINGS).unlink(missing_ok=True)
            if os.name == "nt":  # where no open file can be deleted
                self.release()
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()
        self.release()


@contextlib.contextmanager
def _kept(marker: Path, data: Path) -> Iterator[None]:
    """Say of a damaged file which `marker` to delete, so that its part is made again."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # raised by json or safetensors, by a record with other fields, or by a missing file
        raise DamagedError(
            f"{data} is damaged: {one_line(error)}.",
            hint=f"Delete {marker} and give the same command again: that part is made again.",
        ) from None


def _write_whole(path: Path, data: bytes) -> None:
    with replacing(path) as (sink, _), os_errors(str(path)):
        sink.write(data)


def _differences(earlier: Any, now: Any, where: str = "") -> Iterator[str]:
    """Return every leaf in which two settings differ."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            yield from _differences(earlier.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif earlier != now:
        yield f"{where} was {json.dumps(earlier)}, now {json.dumps(now)}"
