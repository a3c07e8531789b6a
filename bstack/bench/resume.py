"""The results of a bench run so far, kept until its report is written: the same command continues where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import bstk
from bstack.folders import cache_folder
from bstk.atomic import replacing

__all__ = ["ResumeFile"]

# A stopped run is forgotten after so long.
KEPT_SECONDS = 30 * 24 * 3600


class ResumeFile:
    """Keep results by name in a file of the user's cache; nothing is kept where that cannot be written.

    `key` digests everything that decides the results; `found` counts the results of an earlier run that were used.
    """

    def __init__(self, key: str):
        self._path = cache_folder("bench") / f"{key}.json"
        self.found = 0
        self._results: dict[str, Any] = {}
        with suppress(OSError):
            _forget_old(self._path.parent)
        # Damaged results are measured again.
        with suppress(OSError, ValueError):
            results = json.loads(self._path.read_text(encoding="utf-8"))
            self._results = results if isinstance(results, dict) else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the result of that name, from an earlier run or measured now; plain JSON values, infinity allowed."""
        if name in self._results:
            self.found += 1
            return self._results[name]
        result = measure()
        self._results[name] = result
        with suppress(OSError, bstk.BstkError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as (sink, _):
                sink.write(json.dumps(self._results).encode())
        return result

    def delete(self) -> None:
        """Forget everything: the report is written."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _forget_old(folder: Path) -> None:
    for path in folder.glob("*.json"):
        if path.stat().st_mtime < time.time() - KEPT_SECONDS:
            path.unlink(missing_ok=True)
