"""bstack: compress a language model once, cut it to any megabyte.

>>> import bstack
>>> bstack.compress("path/to/model", "model.bstk")              # doctest: +SKIP
>>> model, tokenizer = bstack.load("model.bstk", mb=3000)        # doctest: +SKIP

Importing this package is light; torch and transformers are imported when a function needs them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Settings", "compress", "following", "load", "resident", "resize"]

_HOMES = {
    "Settings": "bstack.settings",
    "compress": "bstack.compression.api",
    "following": "bstack.packed.autosize",
    "load": "bstack.engine.load",
    "resident": "bstack.packed.store",
    "resize": "bstack.packed.store",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        if name == "load":
            from bstack.errors import require

            require("bstack.load")
        # Kept: the next access finds it without this function.
        globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    from bstack.engine.registry import register

    register()


_register()
