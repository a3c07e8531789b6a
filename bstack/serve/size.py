"""The size of a served model: a budget, what the machine has free, or less while nobody asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import bstk
from bstack.packed.autosize import following, free_budget
from bstack.packed.store import store_of

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
    """

    def __init__(self, model: Any, wanted: int | str | None, idle: int | None, warn: Callable[[str], None]):
        self._model, self._store, self._warn = model, store_of(model), warn
        file = self._store.file
        self._base = file.base.budget
        self._idle = self._base if idle is None else max(idle, self._base)
        self._wanted: int | str | None = self._store.budget if wanted is None else wanted
        self._lock = threading.RLock()
        self._poller = ExitStack()
        self._asleep = False
        quality = file.metadata.get("quality")
        points = [point for point in quality if isinstance(point, dict)] if isinstance(quality, list) else []
        sizes: list[tuple[Any, Any]] = [(p.get("memory_bytes", p.get("file_bytes")), p.get("kld")) for p in points]
        curve = sorted((size / bstk.MB, kld) for size, kld in sizes if _plain(size) and _plain(kld))
        self._fixed = {
            "min_mb": float(bstk.mb_ceil(self._base)),
            "max_mb": float(bstk.mb_ceil(file.fit(None).budget)),
            "quality": [{"mb": round(mb, 2), "kld": kld} for mb, kld in curve],
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
            if isinstance(wanted, str):
                self._poller.close()
                # To what is free at once: the poller grows the model after a quiet time only.
                self._store.resize(max(free_budget()[0] or 0, 0) + self._store.budget, wait=False)
                self._poller.enter_context(following(self._model, warn=self._warn))
            else:
                self._store.file.fit(budget=wanted)  # refused before the machine is no longer followed
                self._poller.close()
                self._store.resize(wanted, wait=False)
            self._wanted, self._asleep = wanted, False

    def sleep(self) -> None:
        """Become small until `wake`."""
        with self._lock:
            if not self._asleep and self._store.budget > self._idle:
                self._poller.close()
                self._store.resize(self._idle, wait=False)
                self._asleep = True

    def wake(self) -> None:
        """Grow back to what was wanted; texts run meanwhile."""
        with self._lock:
            if self._asleep and self._wanted is not None:
                self.set(self._wanted)

    def close(self) -> None:
        """Follow the machine no longer, and close the file."""
        with self._lock:
            self._poller.close()
            self._store.close()

    def state(self) -> dict[str, Any]:
        """Return the size as clients read it; sizes are MB of weights in memory."""
        now = self._store.state
        return {
            "mb": round(now.weight_bytes / bstk.MB, 2),
            "target_mb": round(now.target_bytes / bstk.MB, 2),
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
