"""How much memory a model gets: what is free at the start, what is free at any time, or what a function says."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from math import inf
from typing import Any

import bstk
from bstack.errors import one_line
from bstack.memory.free import free_memory
from bstack.packed.policy import default_margin, first_budget
from bstack.packed.poller import INTERVAL, Repeating, warn
from bstack.packed.store import BlockStore, store_of
from bstack.packed.watch import Watcher

__all__ = ["following", "free_budget"]

# Seconds until a budget that a function still asks for is tried again after a failure.
RETRY = 10.0


def free_budget() -> tuple[Decimal | None, str]:
    """Megabytes that a model may take now, and words on why; None where the system does not tell.

    May be less than the smallest model, or not positive.
    """
    memory = free_memory()
    if memory is None:
        return None, "the system does not tell how much memory is free"
    margin = default_margin(memory)
    words = f"{memory.free / bstk.MB:,.0f} MB are free ({memory.source}), {margin / bstk.MB:,.0f} MB of them stay so"
    return Decimal(first_budget(memory, margin)) / bstk.MB, words


def following(
    model: Any,
    budget: Callable[[], int | float | str | Decimal | None] | None = None,
    *,
    tell: Callable[[str], None] = warn,
) -> Repeating:
    """Resize a model while it runs, for the length of a `with` block, in a thread of its own.

    >>> with bstack.following(model):                  # doctest: +SKIP
    ...     model.generate(**inputs)                   # as large as the machine's memory allows
    >>> with bstack.following(model, lambda: my_mb):   # doctest: +SKIP
    ...     model.generate(**inputs)                   # as large as you say

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From ``bstack.load(..., mode="stack")``.
    budget : callable, optional
        Asked twice a second for a budget in MB, as `bstack.resize` takes one. By default the memory of the machine is watched
        (docs/running.md).
    tell : callable
        Receives warnings, one line each; by default a RuntimeWarning.

    Returns
    -------
    context manager

    Raises
    ------
    bstk.UsageError
        The model has dense weights, or no function is given and the system does not tell how much memory is free.
    """
    store = store_of(model)
    if budget is not None:
        return _Asking(store, budget, tell)
    file = store.file

    return Watcher(
        # Not waiting: while it grows the watcher goes on watching, and may change its mind.
        lambda size: store.resize(Decimal(size) / bstk.MB, wait=False),
        # In the measure of the budgets, which is the file's length where that is more than the blocks take.
        lambda: store.budget,
        failure=lambda: store.failure,
        smallest=file.smallest.budget,
        largest=file.fit(None).budget,
        tell=tell,
    )


class _Asking(Repeating):
    """Gives a model the size that a function says."""

    def __init__(self, store: BlockStore, budget: Callable[[], Any], tell: Callable[[str], None]):
        super().__init__(INTERVAL, tell)
        self._store, self._budget = store, budget
        self._last: Any = self  # no budget yet
        self._again = inf  # when the last budget is to be tried once more, though the answer is the same

    def look(self, now: float) -> None:
        if (failure := self._new_failure(self._store.failure)) is not None:
            self._again = now + RETRY
            self._say(one_line(failure), f"The model could not grow: {one_line(failure)}. It is tried again later.")
        wanted = self._budget()
        if wanted != self._last or now >= self._again:
            self._last, self._again = wanted, now + RETRY
            self._store.resize(wanted, wait=False)
            self._again = inf
