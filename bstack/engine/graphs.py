"""CUDA graphs: what a step launches, recorded once and then launched as one."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from bstack.errors import SlowerWarning
from bstack.packed.lock import RECORDING

__all__ = ["record", "run_and_look_for_waits", "warn_not_recorded"]


def record(forward: Callable[[], Any], device: torch.device, *, warm: bool = True) -> tuple[Any, Any]:
    """Record what `forward` launches as a CUDA graph; return it and its result, which each replay overwrites.

    With `warm`, `forward` runs once before, so that libraries have what they need.
    """
    with torch.cuda.device(device), RECORDING:  # torch records one graph at a time
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        if warm:
            with torch.cuda.stream(stream):
                forward()
            torch.cuda.current_stream().wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        before = random.clone_state()
        try:
            # Where a recording fails, torch goes on in its stream. Other threads may load blocks meanwhile.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                result = forward()
        except BaseException:
            random.graphsafe_set_state(before)
            _end_pool(pool)
            raise
    return graph, result


def _end_pool(pool: Any) -> None:
    """Take the memory of a recording that failed from torch's allocator, which otherwise gives none back any more.

    Some versions of torch do it themselves; the others have no public function for it.
    """
    end, release = (getattr(torch._C, f"_cuda_{name}", None) for name in ("endAllocateToPool", "releasePool"))
    if end is not None and release is not None:
        with suppress(RuntimeError):
            end(torch.cuda.current_device(), pool)
            release(torch.cuda.current_device(), pool)


def run_and_look_for_waits(forward: Callable[[], Any], device: torch.device) -> tuple[Any, bool]:
    """Return what `forward` returns, and whether it waited for a GPU, so that it cannot be recorded."""
    if device.type != "cuda":
        return forward(), False
    waits, thread = [], threading.get_ident()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if threading.get_ident() == thread and "synchronizing CUDA operation" in str(message):
            waits.append(message)

    before = torch.cuda.get_sync_debug_mode()
    with RECORDING, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")  # an error would leave the step half done, and meet other threads
        try:
            return forward(), bool(waits)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def warn_not_recorded(why: str, device: torch.device) -> str:
    """Warn that steps cannot be recorded, and return why; raises if the device is lost."""
    torch.cuda.synchronize(device)
    warnings.warn(
        f"Steps are launched kernel by kernel, slowly: they cannot be recorded ({why}).", SlowerWarning, stacklevel=3
    )
    return why
