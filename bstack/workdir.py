"""The work directory of a compression: finished parts that survive an interruption.

A part is a set of packed chunks (``NAME.bin``) and their records (``NAME.json``). The records are put in place last
and at once, so a part is there exactly when its records are. The directory belongs to one run with one set of
settings; a lock keeps a second process out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bstk
from bstack.errors import WorkDirectoryError, one_line
from bstk import atomic
from bstk.atomic import replacing, sync_folder
from bstk.errors import DamagedError, os_errors

__all__ = ["Part", "Record", "WorkDirectory"]

SETTINGS = "settings.json"
LOCK = "lock"


@dataclass(frozen=True)
class Record:
    """One packed chunk of a part: the fields of `bstk.Entry`, and where its bytes stand in the part's file.

    Attributes
    ----------
    gain : float
        For a block: the predicted fall of the divergence to the original, nats per token.
    """

    name: str
    kind: int
    raw_length: int
    stored_length: int
    digest: str
    start: int
    level: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = "none"
    rank: int = 0
    transposed: bool = False
    error: float = 0.0
    gain: float = 0.0


class Part:
    """A part under construction; `add` packs chunks, leaving the context without an error finishes it."""

    def __init__(self, folder: Path, name: str):
        self._data = folder / f"{name}.bin"
        self._records_path = folder / f"{name}.json"
        self.records: list[Record] = []
        with os_errors(str(self._data)):
            self._stream = open(self._data, "wb")
        self._offset = 0

    def add(self, raw: bytes, *, name: str, kind: bstk.Kind, **fields: Any) -> None:
        """Pack one chunk; `fields` as in `Record`."""
        frame = bstk.pack(raw)
        with os_errors(str(self._data)):
            self._stream.write(frame.stored)
        self.records.append(
            Record(
                name=name,
                kind=kind.code,
                raw_length=frame.raw_length,
                stored_length=len(frame.stored),
                digest=frame.digest.hex(),
                start=self._offset,
                **fields,
            )
        )
        self._offset += len(frame.stored)

    def close(self, *, finished: bool) -> None:
        with os_errors(str(self._data)):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        if finished:
            sync_folder(str(self._data.parent))  # no power cut may leave the records without the bytes
            _write_whole(self._records_path, json.dumps([asdict(record) for record in self.records]).encode())


class WorkDirectory:
    """Create the directory, or take up the one that an interrupted run left.

    Parameters
    ----------
    path : Path
        The directory; its parent must exist.
    settings : dict
        Everything that decides the output, as plain JSON values.

    Raises
    ------
    bstack.errors.WorkDirectoryError
        When it holds the work of a run with other settings (the message says which), or another process uses it.
    bstk.OutputError, bstk.ResourceError
        When it cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        # Through JSON and back, so that tuples and lists compare equal.
        settings = json.loads(json.dumps(settings))
        with os_errors(str(path)):
            path.mkdir(exist_ok=True)
        self._lock()
        try:
            self._take_up(settings)
        except BaseException:
            self.release()
            raise

    def _take_up(self, settings: dict[str, Any]) -> None:
        file = self.path / SETTINGS
        if not file.exists():
            if stray := [p.name for p in self.path.iterdir() if p.name != LOCK and p.suffix != ".part"]:
                raise WorkDirectoryError(
                    f"{self.path} is not a work directory of bstack: it holds {stray[0]} and no {SETTINGS}. "
                    "Choose another with --work-dir."
                )
            _write_whole(file, json.dumps(settings, indent=1, sort_keys=True).encode())
            return
        try:
            earlier = json.loads(file.read_bytes())
        except ValueError:
            raise WorkDirectoryError(f"{file} is damaged. Delete {self.path} to start over.") from None
        if changes := list(_differences(earlier, settings)):
            raise WorkDirectoryError(
                f"{self.path} holds unfinished work with other settings: {'; '.join(changes)}. "
                "Repeat the earlier settings to resume, or delete the directory (or name another with --work-dir) "
                "to start over."
            )

    def _lock(self) -> None:
        lock = self.path / LOCK
        with os_errors(str(lock)):
            self._lock_file = open(lock, "a+b")
            free = atomic.try_lock(self._lock_file.fileno())
        # Another process may have removed the directory between the two calls: what is locked must be what is there.
        if not free or not atomic.is_at(self._lock_file.fileno(), str(lock)):
            self._lock_file.close()
            raise WorkDirectoryError(
                f"{self.path} is in use by another bstack compress. Wait for it, or name another with --work-dir."
            )

    def release(self) -> None:
        """Let other processes in. The lock also ends with the process, however it ends."""
        self._lock_file.close()

    def has(self, name: str) -> bool:
        """Whether the part or value is finished."""
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

    def entries(self, name: str) -> list[tuple[Record, Callable[[], bytes]]]:
        """The chunks of a finished part, each with a function that reads its packed bytes.

        Raises
        ------
        bstk.DamagedError
            When the records or the bytes are not what was written; the message says which file to delete. The functions
            raise it, too.
        """
        file, data = self.path / f"{name}.json", self.path / f"{name}.bin"

        def reader(record: Record) -> Callable[[], bytes]:
            def read() -> bytes:
                with _kept(file, data), open(data, "rb") as stream:
                    stream.seek(record.start)
                    stored = stream.read(record.stored_length)
                    if hashlib.sha256(stored).hexdigest() != record.digest:
                        raise ValueError(f"the bytes of {record.name} are not those that were written")
                    return stored

            return read

        with _kept(file, file):
            return [
                (record, reader(record)) for record in (Record(**fields) for fields in json.loads(file.read_bytes()))
            ]

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """A plain JSON value, computed once and kept."""
        file = self.path / f"{name}.json"
        if not self.has(name):
            _write_whole(file, json.dumps(compute()).encode())
        with _kept(file, file):
            return json.loads(file.read_bytes())

    def tensors(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A dictionary of torch tensors, computed once and kept."""
        import safetensors.torch

        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            _write_whole(file, safetensors.torch.save({k: t.contiguous() for k, t in compute().items()}))
        with _kept(file, file):
            return safetensors.torch.load(file.read_bytes())

    def has_tensors(self, name: str) -> bool:
        """Whether the dictionary of tensors is there."""
        return (self.path / f"{name}.safetensors").is_file()

    def forget_tensors(self, name: str) -> None:
        """Have the dictionary of tensors computed again."""
        file = self.path / f"{name}.safetensors"
        with os_errors(str(file)):
            file.unlink(missing_ok=True)

    def scratch(self) -> Path:
        """An empty folder for the run's own temporary files."""
        folder = self.path / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        with os_errors(str(folder)):
            folder.mkdir()
        return folder

    def remove(self) -> None:
        """Delete everything: the output is written.

        In an order that leaves a directory to resume from wherever it is stopped: what says that a part is finished before the
        part, the settings last. Meanwhile the lock keeps others out.
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
    """Say of a kept file that cannot be understood what to delete; without `marker` its part is made anew."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of json, of safetensors, of a record with other fields, of a file that is gone
        raise DamagedError(
            f"{data} is damaged: {one_line(error)}. Delete {marker} and give the same command again: that part is made anew."
        ) from None


def _write_whole(path: Path, data: bytes) -> None:
    with replacing(path) as (sink, _), os_errors(str(path)):
        sink.write(data)


def _differences(earlier: Any, now: Any, where: str = "") -> Iterator[str]:
    """Name every leaf in which two settings differ."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            yield from _differences(earlier.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif earlier != now:
        yield f"{where} was {json.dumps(earlier)}, now {json.dumps(now)}"
