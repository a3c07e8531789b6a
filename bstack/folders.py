"""Folders outside the project that bstack keeps something in."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(name: str) -> Path:
    """The folder `name` in ``bstack`` in $XDG_CACHE_HOME, or in ~/.cache where that is not set (as its specification asks)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # "All paths must be absolute. If an implementation encounters a relative path it should ignore it."
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "bstack" / name
