"""The C kernels, loaded with ctypes; None where they are not built.

``BSTACK_KERNELS`` chooses the instruction set: ``reference`` (no C at all), ``portable``, ``neon``, ``avx2``,
``avx512``; by default the best that the CPU has. ``BSTACK_THREADS`` sets the number of threads; by default one for each
CPU that the process may use. Results do not depend on either.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache

from bstack.errors import KernelError

__all__ = ["CHOICES", "THREADS", "VARIABLE", "instructions", "library", "pointer", "processors", "set_threads"]

VARIABLE = "BSTACK_KERNELS"
THREADS = "BSTACK_THREADS"
REFERENCE = "reference"
CHOICES = (REFERENCE, "portable", "neon", "avx2", "avx512")
MOST_THREADS = 256
INTERFACE = 3


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, set to the wanted instruction set and threads; None when it is not built or not wanted.

    Raises
    ------
    bstack.errors.KernelError
        When ``BSTACK_KERNELS`` or ``BSTACK_THREADS`` is no value that works here.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in CHOICES:
        raise KernelError(
            f"{VARIABLE} is {wanted!r}; allowed are {', '.join(CHOICES)}. Unset it for the best there is."
        )
    threads = _threads()
    loaded = None if wanted == REFERENCE else _load()
    if loaded is None:
        if wanted not in ("", REFERENCE):
            raise KernelError(
                f"{VARIABLE} is {wanted!r}, but the C kernels are not built. Install a C compiler and reinstall bstack, "
                f"or unset {VARIABLE}."
            )
        return None
    if wanted and loaded.bstack_use(wanted.encode()):
        offered = ", ".join(name for name in CHOICES if name == REFERENCE or loaded.bstack_offers(name.encode()) == 0)
        raise KernelError(f"{VARIABLE} is {wanted!r}, which this CPU does not have; it has {offered}.")
    loaded.bstack_set_threads(threads)
    return loaded


def instructions() -> str:
    """Name of the kernels in use, one of `CHOICES`.

    Raises
    ------
    bstack.errors.KernelError
        As `library`.
    """
    native = library()
    return REFERENCE if native is None else native.bstack_instructions().decode()


def set_threads(threads: int) -> None:
    """Let the C kernels use this many threads, the caller's included, from the next call on.

    Raises
    ------
    ValueError
        For a number outside 1 to 256.
    """
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads is {threads}; allowed are 1 to {MOST_THREADS}.")
    if (native := library()) is not None:
        native.bstack_set_threads(threads)


def pointer(array) -> ctypes.c_void_p:
    """Address of a C-contiguous numpy array, which the caller keeps alive."""
    return ctypes.c_void_p(array.ctypes.data)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("bstack.kernels._native")
    if spec is None or spec.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    # A library from an earlier build may stand in a working copy: its functions may take other arguments.
    if getattr(loaded, "bstack_kernels_version", lambda: 0)() != INTERFACE:
        return None
    loaded.bstack_instructions.restype = ctypes.c_char_p
    loaded.bstack_quantise.restype = ctypes.c_float
    return loaded


def _threads() -> int:
    given = os.environ.get(THREADS, "")
    if not given:
        return min(processors(), MOST_THREADS)
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= MOST_THREADS):
        raise KernelError(f"{THREADS} is {given!r}; allowed are 1 to {MOST_THREADS}. Unset it to use every CPU.")
    return int(given)
