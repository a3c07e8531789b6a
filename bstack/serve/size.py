"""The size of a served model: a budget, what the machine has free, or less while nobody asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import bstk
from bstack.errors import one_line
from bstack.packed.autosize import following, free_budget
from bstack.packed.store import store_of
from bstk.errors import BstkError

__all__ = ["AUTO", "Size"]

AUTO = "auto"


class Size:
    """Changes the size of a model while it runs; from any thread.

    Parameters
    ----------
    model
        With packed weights.
    wanted : int, "auto" or None
        The budget in bytes, `AUTO` to follow what the machine has free, or None for all that is there.
    idle : int, optional
        Budget in bytes while nobody asks; None for the smallest.
    warn : callable
        Receives warnings, one line each.

    Raises
    ------
    bstk.BudgetError
        `idle` is below the smallest size.
    """

    def __init__(self, model: Any, wanted: int | str | None, idle: int | None, warn: Callable[[str], None]):
        self._model, self._store, self._warn = model, store_of(model), warn
        file = self._store.file
        self._base = file.base.budget
        if idle is not None:
            file.fit(budget=idle)  # refused if there is no such size
        self._idle = self._base if idle is None else idle
        self._wanted: int | str | None = self._store.budget if wanted is None else wanted
        self._lock = threading.RLock()
        self._poller = ExitStack()
        self._asleep = False
        quality = file.metadata.get("quality")
        points = [point for point in quality if isinstance(point, dict)] if isinstance(quality, list) else []
        curve = []
        for point in points:
            sizes: list[Any] = [point[name] for name in ("file_bytes", "memory_bytes") if _plain(point.get(name))]
            if sizes and _plain(point.get("kld")):
                curve.append((max(sizes) / bstk.MB, point["kld"]))
        self._fixed = {
            "min_mb": float(bstk.mb_ceil(self._base)),
            "max_mb": float(bstk.mb_ceil(file.model.budget)),
            "quality": [{"mb": round(mb, 2), "kld": kld} for mb, kld in sorted(curve)],
        }
        if wanted == AUTO:
            self.set(AUTO)

    @property
    def asleep(self) -> bool:
        """Whether the model is small because nobody asks."""
        return self._asleep

    def set(self, wanted: int | str) -> None:
        """Change the size to a budget in bytes, or to `AUTO`; errors are those of `bstack.resize`. Loading goes on afterwards."""
        with self._lock:
            file = self._store.file
            if isinstance(wanted, str):
                self._poller.close()
                # To what is free at once: the poller grows the model after a quiet time only.
                free = max(free_budget(self._store.free_memory)[0] or 0, 0) + self._store.state.weight_bytes
                self._store.resize(min(max(free, self._base), file.model.budget), wait=False)
                self._poller.enter_context(following(self._model, warn=self._warn))
            else:
                file.fit(budget=wanted)  # refused before the machine is no longer followed
                self._poller.close()
                self._store.resize(wanted, wait=False)
            self._wanted, self._asleep = wanted, False

    def sleep(self, wanted: Callable[[], bool]) -> None:
        """Become small until `wake`, if that is still `wanted`."""
        with self._lock:
            if not self._asleep and self._store.budget > self._idle and wanted():
                self._poller.close()
                self._asleep = self._warned(lambda: self._store.resize(self._idle, wait=False))

    def wake(self) -> None:
        """Grow back to what was wanted; texts run meanwhile. Without the memory for it the model stays as it is."""
        with self._lock:
            wanted = self._wanted
            if self._asleep and wanted is not None:
                self._warned(lambda: self.set(wanted))
                self._asleep = False

    def _warned(self, change: Callable[[], None]) -> bool:
        """Make a change that nobody waits for; return whether it was made."""
        try:
            change()
        except (BstkError, MemoryError, OSError) as error:
            self._warn(f"The model keeps its size: {one_line(error)}")
            return False
        return True

    def close(self) -> None:
        """Follow the machine no longer, and close the file."""
        with self._lock:
            self._poller.close()
            self._store.close()

    def state(self) -> dict[str, Any]:
        """Return the size as clients read it.

        `mb` and `target_mb` are weights in memory, now and after the growth under way. The others are budgets, as `set` takes
        them: the smallest that gives the target, and one more block, and those of the base and of the whole model.
        """
        now, file, budget = self._store.state, self._store.file, self._store.budget
        shown, whole = float(bstk.mb_ceil(budget)), file.model
        ends = (n + 1 for n in range(file.fit_bytes(budget).chunks, whole.chunks) if file.chunks[n].is_block)
        budgets = (float(bstk.mb_ceil(file.cut(end).budget)) for end in ends)
        return {
            "mb": round(now.weight_bytes / bstk.MB, 2),
            "target_mb": round(now.target_bytes / bstk.MB, 2),
            "budget_mb": shown,
            "next_mb": next((more for more in budgets if more > shown), shown),
            "auto": self._wanted == AUTO,
            "idle": self._asleep,
            "blocks": now.blocks,
            "all_blocks": now.all_blocks,
            "bits_per_weight": now.bits_per_weight,
            "error": now.error,
            **self._fixed,
        }


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
