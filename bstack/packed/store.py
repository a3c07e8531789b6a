"""Which blocks of a file are in memory: loading them, dropping them, while the model runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import bstk
from bstack.errors import one_line
from bstack.kernels.matrix import Matrix
from bstack.packed.arena import Allocation, Arena
from bstack.packed.lock import Gate
from bstk.budget import Budget
from bstk.errors import ResourceError, UsageError

__all__ = ["BlockStore", "Resident", "store_of"]

# Threads that read and decode blocks, as many as there are usually free processors for it.
READERS = 2
# Bytes of blocks that one of them fills at a time, or one block.
RUN = 2**20

_Run = list[tuple[int, bstk.Chunk]]


@dataclass(frozen=True)
class Resident:
    """What of a model is in memory.

    Attributes
    ----------
    weight_bytes : int
        Weights in memory: blocks and everything that is kept plain.
    block_bytes : int
        Blocks alone.
    blocks, all_blocks : int
        Blocks in memory, and in the file.
    bits_per_weight : float or None
        Of the blocks, over the matrices that have some.
    target_bytes : int
        `weight_bytes` when the growth under way is through; equal to it when none is.
    error : str or None
        Why the last growth stopped before its end.
    """

    weight_bytes: int
    block_bytes: int
    blocks: int
    all_blocks: int
    bits_per_weight: float | None
    target_bytes: int
    error: str | None


class _Growth:
    """One loading of missing blocks, up to so many chunks of the file, by a thread that calls `load`."""

    def __init__(self, count: int, load: Callable[[_Growth], None]):
        self.count = count
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=load, args=(self,), name="bstack-grow", daemon=True)


class BlockStore:
    """The blocks of an open file in memory, a prefix of its chunks.

    Parameters
    ----------
    file : bstk.Reader
        Kept open, to grow from.
    places : mapping
        Stack name -> its matrix.
    gate : Gate
        Held by whoever reads the matrices' blocks.
    arena : Arena
        Where the blocks go.
    close : callable
        What `close` calls, once: it closes the file.
    fetched : number, str, Decimal or None
        The budget for which the file was fetched from a URL; None where the file has all that there is.
    """

    def __init__(
        self,
        file: bstk.Reader,
        places: Mapping[str, Matrix],
        gate: Gate,
        arena: Arena,
        *,
        close: Callable[[], None],
        fetched: Budget | None = None,
    ):
        self.file = file
        self._close, self._fetched = close, fetched
        self._places = places
        self.gate = gate
        self._slabs = arena
        self._blocks = [(number, chunk) for number, chunk in enumerate(file.chunks) if chunk.is_block]
        self._count = 0  # chunks of the file that are in memory, the plain ones taken as there
        self._turn = threading.Lock()
        self._growth: _Growth | None = None  # the last one, under way or not
        self._closed = False

    def resize(self, mb: Budget | None, *, wait: bool = True) -> None:
        """Load or drop blocks until the model is the largest that fits a budget, as `bstk.Reader.fit` defines it.

        Memory that is dropped has gone back to the system on return. Loading goes on in a thread of its own; each block
        counts from the next product on. A second call while one is loading takes its place.

        Parameters
        ----------
        mb : number, str, Decimal or None
            Megabytes of 2**20 bytes; None for everything in the file.
        wait : bool
            Return only when loading is through. If not, a failure shows in `state` and in the next call that waits.

        Raises
        ------
        bstk.UsageError, BudgetError
            The budget is nonsense, below the smallest model, or more than was fetched. Nothing has changed then.
        bstk.DamagedError, OSError, MemoryError
            A block could not be read. The model keeps what it has.
        bstk.ResourceError
            The system starts no further thread. The model keeps what it has.
        """
        with self._turn:
            if self._closed:
                raise UsageError("the model's file has been closed, so its size cannot change any more. Load it again.")
            cut = self.file.fit(mb)
            self._require_fetched(mb)
            self._end_growth()
            self._growth = None
            if cut.chunks < self._count:
                self._drop(cut.chunks)
            elif cut.chunks > self._count:
                growth = _Growth(cut.chunks, self._grow)
                try:
                    growth.thread.start()
                except RuntimeError as error:
                    raise ResourceError(
                        f"the model keeps its size: no thread starts to load blocks ({error})."
                    ) from None
                self._growth = growth  # not before: others ask it whether its thread runs, and wait for it
            growth = self._growth
        if wait and growth is not None:
            growth.thread.join()
            if growth.error is not None:
                raise growth.error

    def close(self) -> None:
        """Stop loading and close the file. What is in memory stays, and the model runs on at its size."""
        with self._turn:
            self._end_growth()
            if not self._closed:
                self._closed = True
                self._close()

    def __reduce__(self) -> Any:
        raise UsageError(
            "a model with packed weights cannot be copied or pickled: load it once more, or with mode='dense'."
        )

    @property
    def failure(self) -> BaseException | None:
        """What stopped the last growth before its end: the same object until the next resize."""
        growth = self._growth
        return None if growth is None else growth.error

    @property
    def budget(self) -> int:
        """Bytes of the least budget that gives what is in memory when the growth under way is through."""
        count = self._target()
        return max(self.file.chunks[count - 1].end, self._bytes(count))

    @property
    def state(self) -> Resident:
        """What is in memory now."""
        growth = self._growth
        loaded = [chunk for number, chunk in self._blocks if number < self._count]
        weights = sum(chunk.shape[0] * chunk.shape[1] for chunk in loaded if chunk.level == 0)
        block_bytes = sum(chunk.raw_length for chunk in loaded)
        return Resident(
            weight_bytes=self._bytes(self._count),
            block_bytes=block_bytes,
            blocks=len(loaded),
            all_blocks=len(self._blocks),
            bits_per_weight=8 * block_bytes / weights if weights else None,
            target_bytes=self._bytes(self._target()),
            error=None if growth is None or growth.error is None else one_line(growth.error),
        )

    def _require_fetched(self, mb: Budget | None) -> None:
        """Raise UsageError where more blocks fit a budget than were fetched."""
        missing = self.file.all_chunks[len(self.file.chunks) :]
        if self._fetched is None or mb is None or not missing:
            return
        budget = bstk.budget_bytes(mb)
        needed = max(missing[0].end, self.file.memory_bytes + missing[0].raw_length)
        if budget > bstk.budget_bytes(self._fetched) and budget >= needed:
            raise UsageError(
                f"{mb} MB is more than was fetched ({bstk.mb_ceil(self.file.length)} MB). Load the URL again with that "
                "budget; what is here is not fetched twice."
            )

    def _target(self) -> int:
        """Chunks in memory when the growth under way is through."""
        growth = self._growth
        return growth.count if growth is not None and growth.thread.is_alive() else self._count

    def _bytes(self, count: int) -> int:
        return sum(chunk.raw_length for chunk in self.file.chunks[:count] if chunk.is_weight)

    def _end_growth(self) -> None:
        if self._growth is not None:
            self._growth.stop.set()
            self._growth.thread.join()

    def _drop(self, count: int) -> None:
        """Keep the first chunks."""
        gone = [chunk for number, chunk in self._blocks if count <= number < self._count]
        with self.gate.first():
            for chunk in reversed(gone):
                self._places[chunk.name].count = chunk.level
        self._slabs.pop(len(gone))
        self._count = count

    def _grow(self, growth: _Growth) -> None:
        runs = _runs([(number, chunk) for number, chunk in self._blocks if self._count <= number < growth.count])
        pending: deque[tuple[_Run, list[Allocation], Future[None]]] = deque()
        kept = len(self._slabs)
        with ThreadPoolExecutor(READERS, thread_name_prefix="bstack-read") as pool:
            try:
                while not growth.stop.is_set():
                    for run in islice(runs, 2 * READERS - len(pending)):
                        rooms = [self._slabs.reserve(chunk.raw_length) for _, chunk in run]
                        pending.append((run, rooms, pool.submit(self._fill, run, rooms, growth.stop)))
                    if not pending:
                        self._count = growth.count
                        break
                    run, rooms, filled = pending.popleft()
                    filled.result()
                    if growth.stop.is_set():
                        break  # the run may not be filled
                    for (number, chunk), room in zip(run, rooms, strict=True):
                        matrix = self._places[chunk.name]
                        # No gate: a level at or past the count is nobody's, and a product takes the count once, at its start.
                        # The file has checked what blocks say of where to read.
                        matrix.put(chunk.level, chunk.kind.code, chunk.rank, room.address, checked=True)
                        matrix.count = chunk.level + 1
                        self._count = number + 1
                    kept += len(run)
            except Exception as error:  # kept for whoever waits, or asks
                growth.error = error
            for _, _, filled in pending:
                filled.cancel()
        self._slabs.pop(len(self._slabs) - kept)

    def _fill(self, run: _Run, rooms: list[Allocation], stop: threading.Event) -> None:
        for (_, chunk), room in zip(run, rooms, strict=True):
            if stop.is_set():
                return
            room.write(self.file.read(chunk))


def _runs(blocks: Sequence[tuple[int, bstk.Chunk]]) -> Iterator[_Run]:
    """Neighbours together, so that a small block does not cost a task of its own."""
    run: _Run = []
    size = 0
    for number, chunk in blocks:
        run.append((number, chunk))
        size += chunk.raw_length
        if size >= RUN:
            yield run
            run, size = [], 0
    if run:
        yield run


def store_of(model: Any) -> BlockStore:
    """The blocks of a model from ``load(..., mode="stack")``; raises bstk.UsageError for another."""
    store = getattr(model, "bstack_store", None)
    if not isinstance(store, BlockStore):
        raise UsageError("this model has dense weights, which have no size to change: bstack.load(..., mode='stack').")
    return store
