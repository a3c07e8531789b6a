"""CUDA graphs: what a step launches, recorded once and then launched as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from bstack.errors import SlowerWarning, one_line

__all__ = ["record", "warn_not_recorded"]


def record(forward: Callable[[], Any], device: torch.device, *, warm: bool = True) -> tuple[Any, Any]:
    """Record what `forward` launches as a CUDA graph; return it and its result, which each replay overwrites.

    With `warm`, `forward` runs once before, so that libraries have what they need.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        if warm:
            with torch.cuda.stream(stream):
                forward()
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may load blocks meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = forward()
    return graph, result


def warn_not_recorded(error: Exception, device: torch.device) -> str:
    """Warn that steps cannot be recorded, and return why; raises if the device is lost."""
    torch.cuda.synchronize(device)
    why = one_line(error)
    warnings.warn(
        f"Steps are launched kernel by kernel, slowly: they cannot be recorded ({why}).", SlowerWarning, stacklevel=3
    )
    return why
