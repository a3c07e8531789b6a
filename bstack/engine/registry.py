"""Register the quantizer (`bstack.engine.quantizer`) with transformers, without importing transformers.

transformers finds quantizers in its registry alone, which has no entry points. Importing it takes seconds, and most programs that
import bstack never need it; but most that do import bstack first. So registration waits for the registry's own import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register"]

REGISTRY, OURS = "transformers.quantizers.auto", "bstack.engine.quantizer"


def register() -> None:
    """Register the quantizer now if transformers' registry is imported, else as soon as it is."""
    if REGISTRY in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds no module itself. When the registry is looked for, has what others find import ours, too, and goes away."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(OURS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
