"""Load and drop blocks of a file in memory, while the model runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

import bstk
from bstack.errors import one_line
from bstack.kernels.matrix import Matrix
from bstack.memory.free import Memory, free_memory
from bstack.packed.arena import Allocation, Arena
from bstack.packed.lock import PriorityLock
from bstk.errors import ResourceError, UsageError
from bstk.index import bits_per_weight

__all__ = ["BlockStore", "Resident", "resident", "resize", "store_of"]

# Threads that read and decompress blocks.
READERS = 2
# Seconds between two looks at whether a block that is being fetched has arrived.
POLL = 0.05
# Bytes of blocks that one of them reads at a time, at least one block.
RUN = 2**20

_Run = list[tuple[int, bstk.Chunk]]


@dataclass(frozen=True)
class Resident:
    """The part of a model that is in memory.

    Attributes
    ----------
    weight_bytes, block_bytes : int
        All weights in memory, and of them blocks.
    blocks, all_blocks : int
        Blocks in memory, and in the file.
    bits_per_weight : float or None
        Of the blocks, over the matrices that have some.
    target_bytes : int
        `weight_bytes` after the growth under way; equal to it when there is none.
    error : str or None
        What stopped the last growth.
    """

    weight_bytes: int
    block_bytes: int
    blocks: int
    all_blocks: int
    bits_per_weight: float | None
    target_bytes: int
    error: str | None


class _Growth:
    """A thread that loads missing blocks with `load`, until `count` chunks of the file are in memory."""

    def __init__(self, count: int, load: Callable[[_Growth], None]):
        self.count = count
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=load, args=(self,), name="bstack-grow", daemon=True)


class BlockStore:
    """The blocks of an open file that are in memory: a prefix of its chunks.

    `matrices` gives the matrix of each stack, `lock` is held while their blocks are read, and `close` closes the file, once.
    `fetched` is the budget in bytes for which the file was fetched from a URL; None for another file.
    """

    def __init__(
        self,
        file: bstk.Reader,
        matrices: Mapping[str, Matrix],
        lock: PriorityLock,
        arena: Arena,
        *,
        close: Callable[[], None],
        fetched: int | None = None,
        free_memory: Callable[[], Memory | None] = free_memory,
    ):
        self.file = file
        #: Tells what memory there is where the blocks lie.
        self.free_memory = free_memory
        # Of a file that is still being fetched, whether its first bytes are there.
        self._arrived: Callable[[int], bool] = getattr(file.source, "arrived", lambda end: True)
        self._close, self._fetched = close, fetched
        self._matrices = matrices
        self._lock = lock
        self._arena = arena
        self._blocks = [(number, chunk) for number, chunk in enumerate(file.chunks) if chunk.is_block]
        self._count = 0  # chunks in memory; the plain ones count as loaded
        #: Raised before and after each change of what is in memory: odd while one is under way.
        self.changes = 0
        self._resizing = threading.Lock()
        self._growth: _Growth | None = None  # the last one, also when it has ended
        self._closed = False

    def resize(self, budget: int | None, *, wait: bool = True) -> None:
        """Load or drop blocks until the model is the largest that fits a budget, as `bstk.Reader.fit` defines it (None: all).

        Dropped memory has gone back to the system on return. Loading runs in a thread of its own; each block counts from the
        next product on. A second call ends the loading of the first.

        Raises UsageError or BudgetError, with nothing changed, if the budget is below the base model or more than was fetched;
        DamagedError, OSError, MemoryError or ResourceError if blocks cannot be loaded: the model keeps what it has. Without
        `wait`, `state` has the error instead.
        """
        with self._resizing:
            if self._closed:
                raise UsageError(
                    "the model's file is closed, so its size cannot change any more.", hint="Load it again."
                )
            cut = self.file.fit(budget=budget)
            self._require_fetched(budget)
            self._end_growth()
            self._growth = None
            count = min(cut.chunks, self.file.model.chunks)
            if count < self._count:
                self._drop(count)
            elif count > self._count:
                growth = _Growth(count, self._grow)
                try:
                    growth.thread.start()
                except RuntimeError as error:
                    raise ResourceError(
                        f"the model keeps its size: no thread can be started to load blocks ({error}).",
                        hint="End other programs.",
                    ) from None
                self._growth = growth  # after the start: other threads join it
            current = self._growth
        if wait and current is not None:
            current.thread.join()
            if current.error is not None:
                raise current.error

    def close(self) -> None:
        """Stop loading and close the file. The model runs on at its size."""
        with self._resizing:
            self._end_growth()
            if not self._closed:
                self._closed = True
                self._close()

    def __reduce__(self) -> Any:
        raise UsageError(
            "a model with packed weights cannot be copied or pickled.", hint="Load it once more, or with mode='dense'."
        )

    @property
    def failure(self) -> BaseException | None:
        """The error that stopped the last growth, the same object until the next resize; or None."""
        growth = self._growth
        return None if growth is None else growth.error

    @property
    def budget(self) -> int:
        """The minimum budget in bytes that gives what is in memory after the growth under way."""
        count = self._target()
        return max(self.file.chunks[count - 1].end, self._bytes(count))

    @property
    def state(self) -> Resident:
        """The part of the model that is in memory now."""
        growth = self._growth
        loaded = [chunk for number, chunk in self._blocks if number < self._count]
        return Resident(
            weight_bytes=self._bytes(self._count),
            block_bytes=sum(chunk.raw_length for chunk in loaded),
            blocks=len(loaded),
            all_blocks=len(self._blocks),
            bits_per_weight=bits_per_weight(loaded),
            target_bytes=self._bytes(self._target()),
            error=None if growth is None or growth.error is None else one_line(growth.error),
        )

    def _require_fetched(self, budget: int | None) -> None:
        """Raise UsageError if more blocks fit a budget than were fetched."""
        missing = [chunk for chunk in self.file.all_chunks[len(self.file.chunks) :] if chunk.is_block]
        if self._fetched is None or budget is None or not missing:
            return
        needed = max(missing[0].end, self.file.memory_bytes + missing[0].raw_length)
        if budget > self._fetched and budget >= needed:
            raise UsageError(
                f"{bstk.mb_text(budget)} MB is more than was fetched ({bstk.mb_ceil(self.file.length)} MB).",
                hint="Start again with that budget; what is here is not fetched twice.",
            )

    def _target(self) -> int:
        """Return the number of chunks in memory after the growth under way."""
        growth = self._growth
        return growth.count if growth is not None and growth.thread.is_alive() else self._count

    def _bytes(self, count: int) -> int:
        return sum(chunk.raw_length for chunk in self.file.chunks[:count] if chunk.is_weight)

    def _end_growth(self) -> None:
        if self._growth is not None:
            self._growth.stop.set()
            self._growth.thread.join()

    def _drop(self, count: int) -> None:
        """Drop all blocks but those of the first `count` chunks."""
        gone = [chunk for number, chunk in self._blocks if count <= number < self._count]
        with self._lock.acquire_urgent():
            self.changes += 1
            for chunk in reversed(gone):
                self._matrices[chunk.name].count = chunk.level
            self._count = count
            self.changes += 1
        self._arena.pop(len(gone))

    def _grow(self, growth: _Growth) -> None:
        runs = _runs([(number, chunk) for number, chunk in self._blocks if self._count <= number < growth.count])
        pending: deque[tuple[_Run, list[Allocation], Future[None]]] = deque()
        kept = len(self._arena)  # blocks that count, or did before
        with ThreadPoolExecutor(READERS, thread_name_prefix="bstack-read") as pool:
            try:
                while not growth.stop.is_set():
                    for run in islice(runs, 2 * READERS - len(pending)):
                        allocations = [self._arena.reserve(chunk.raw_length) for _, chunk in run]
                        pending.append((run, allocations, pool.submit(self._fill, run, allocations, growth.stop)))
                    if not pending:
                        self._count = growth.count
                        break
                    run, allocations, filled = pending.popleft()
                    filled.result()
                    if growth.stop.is_set():
                        break  # the run may not be filled
                    for (number, chunk), allocation in zip(run, allocations, strict=True):
                        matrix = self._matrices[chunk.name]
                        # Without the lock: no product reads a level at or past the count, which it takes once, at its start.
                        # The reader has checked the offsets in the block.
                        matrix.put(chunk.level, chunk.kind.code, chunk.rank, allocation.address, checked=True)
                        self.changes += 1
                        matrix.count = chunk.level + 1
                        self._count = number + 1
                        self.changes += 1
                        kept += 1
            except Exception as error:  # for `failure`, and for a caller that waits
                growth.error = error
                growth.stop.set()  # other runs may wait for what does not come
            for _, _, filled in pending:
                filled.cancel()
        self._arena.pop(len(self._arena) - kept)

    def _fill(self, run: _Run, allocations: list[Allocation], stop: threading.Event) -> None:
        for (_, chunk), allocation in zip(run, allocations, strict=True):
            while not stop.is_set() and not self._arrived(chunk.end):
                stop.wait(POLL)
            if stop.is_set():
                return
            allocation.write(self.file.read(chunk))


def _runs(blocks: Sequence[tuple[int, bstk.Chunk]]) -> Iterator[_Run]:
    """Group neighbours, so that a small block does not cost a task of its own."""
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
    """Return the blocks of a model from ``load(..., mode="packed")``; raise bstk.UsageError for another."""
    store = getattr(model, "bstack_store", None)
    if not isinstance(store, BlockStore):
        raise UsageError(
            "this model has dense weights, whose size cannot change.",
            hint="Load it with bstack.load(..., mode='packed').",
        )
    return store


def resize(model: Any, mb: int | float | str | Decimal | None = None, *, wait: bool = True) -> Resident:
    """Change how much of a model is in memory, also while it runs, from any thread.

    Dropped blocks have gone back to the system on return. Missing ones are read from the file in a thread of their own,
    and each counts from the next product on. Text and caches of keys and values that exist stay as they are
    (docs/guide.md says what that means).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From ``bstack.load(..., mode="packed")``, or one of the native engine.
    mb : number or str, optional
        The new budget in MB, as for `bstack.load`; None for everything in the file.
    wait : bool
        Return after loading, or when another call has ended it.

    Returns
    -------
    Resident
        The part of the model that is in memory on return.

    Raises
    ------
    bstk.UsageError
        The budget is no positive number or more than was fetched, or the model has dense weights.
    bstk.BudgetError
        The base model is larger than `mb`. Nothing has changed.
    bstk.DamagedError, OSError, MemoryError
        A block could not be read. The model keeps the blocks it has and runs on.
    bstk.ResourceError
        No thread can be started to load blocks. The model keeps the blocks it has.
    """
    store = store_of(model)
    store.resize(None if mb is None else bstk.budget_bytes(mb), wait=wait)
    return store.state


def resident(model: Any) -> Resident:
    """Return the part of a model that is in memory; bstk.UsageError for one with dense weights."""
    return store_of(model).state
