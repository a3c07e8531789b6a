"""What a bench run has measured so far, kept until it is through: the same command goes on where it was stopped."""

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

__all__ = ["Rows"]

# A run that nobody went on with for so long is forgotten.
KEPT_SECONDS = 30 * 24 * 3600


class Rows:
    """Results by name, in a file of the user's cache. Where that cannot be written, nothing is kept.

    Parameters
    ----------
    key : str
        Hexadecimal digits, of everything that decides the results: the name of the file.

    Attributes
    ----------
    found : int
        How many results of a run before this one were taken.
    """

    def __init__(self, key: str):
        self._path = cache_folder("bench") / f"{key}.json"
        self.found = 0
        self._rows: dict[str, Any] = {}
        with suppress(OSError):
            _forget_old(self._path.parent)
        # What is damaged is measured again.
        with suppress(OSError, ValueError):
            rows = json.loads(self._path.read_text(encoding="utf-8"))
            self._rows = rows if isinstance(rows, dict) else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the result of that name, from the run before or measured now; plain JSON values, infinity allowed."""
        if name in self._rows:
            self.found += 1
            return self._rows[name]
        result = measure()
        self._rows[name] = result
        with suppress(OSError, bstk.BstkError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as (sink, _):
                sink.write(json.dumps(self._rows).encode())
        return result

    def finish(self) -> None:
        """The run is through: the next one measures anew."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _forget_old(folder: Path) -> None:
    for path in folder.glob("*.json"):
        if path.stat().st_mtime < time.time() - KEPT_SECONDS:
            path.unlink(missing_ok=True)
