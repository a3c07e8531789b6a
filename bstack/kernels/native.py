"""Loads the C kernels with ctypes and tests them.

``BSTACK_KERNELS`` chooses the instruction set: ``reference`` (no C at all), ``portable``, ``neon``, ``avx2``,
``avx512bw``, ``avxvnni``, ``avx512``, ``amx``; by default the best that the CPU has. ``BSTACK_THREADS`` sets the number of
threads; by default one for each CPU that the process may use. Results do not depend on either, but for the rounding of what
``bstack.kernels.feedback`` multiplies: bytes with AMX, else floats.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from functools import cache

from bstack.kernels import selftest
from bstk.errors import UsageError

__all__ = [
    "CHOICES",
    "THREADS",
    "VARIABLE",
    "describe",
    "instructions",
    "library",
    "processors",
    "set_threads",
    "threads",
]

VARIABLE = "BSTACK_KERNELS"
THREADS = "BSTACK_THREADS"
REFERENCE = "reference"
CHOICES = (REFERENCE, "portable", "neon", "avx2", "avx512bw", "avxvnni", "avx512", "amx")
MAX_THREADS = 256
INTERFACE = 7


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, set to the wanted instruction set and threads; None where the reference runs in its place.

    Raises
    ------
    bstk.UsageError
        ``BSTACK_KERNELS`` or ``BSTACK_THREADS`` is no value that works here.

    Warns
    -----
    RuntimeWarning
        The kernels are not built, or a result of theirs is not the reference's.
    """
    native, problem = _choose()
    if problem:
        warnings.warn(
            f"{problem} Until then the reference runs, some hundred times slower.", RuntimeWarning, stacklevel=3
        )
    return native


@cache
def _choose() -> tuple[ctypes.CDLL | None, str]:
    """Return the library as `library` does, and what is wrong with the kernels, if anything is."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in CHOICES:
        raise UsageError(
            f"{VARIABLE} is {wanted!r}; allowed are {', '.join(CHOICES)}.", hint="Unset it for the best there is."
        )
    count = threads()
    if wanted == REFERENCE:
        return None, ""
    native = _load()
    if native is None:
        if wanted:
            raise UsageError(
                f"{VARIABLE} is {wanted!r}, but the C kernels are not built.",
                hint=f"Install a C compiler and reinstall bstack, or unset {VARIABLE}.",
            )
        return None, "The C kernels are not built. Install a C compiler and reinstall bstack."
    if wanted and native.bstack_use(wanted.encode()):
        offered = ", ".join(name for name in CHOICES if name == REFERENCE or native.bstack_offers(name.encode()) == 0)
        raise UsageError(f"{VARIABLE} is {wanted!r}, which this CPU does not have; it has {offered}.")
    native.bstack_set_threads(count)
    if failed := selftest.failure(native):
        return None, (
            f"The C kernels ({native.bstack_instructions().decode()}) failed their self-test: {failed} differs from the "
            f"reference. Reinstall bstack, or try {VARIABLE}=portable; please report it with your CPU and compiler."
        )
    return native, ""


def instructions() -> str:
    """Return the name of the kernels in use, one of `CHOICES`; raise UsageError as `library`."""
    native, _ = _choose()
    return REFERENCE if native is None else native.bstack_instructions().decode()


def describe() -> str:
    """Return the name of the kernels in use, with what is wrong where they are missing; raise UsageError as `library`."""
    _, problem = _choose()
    return f"{instructions()}, some hundred times slower than C: {problem}" if problem else instructions()


def set_threads(threads: int) -> None:
    """Let the C kernels use this many threads, the caller's included, from the next call on.

    Raises
    ------
    ValueError
        For a number outside 1 to 256.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads is {threads}; allowed are 1 to {MAX_THREADS}.")
    if (native := library()) is not None:
        native.bstack_set_threads(threads)


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("bstack.kernels._native")
    if spec is None or spec.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    # A working copy may hold a library from an earlier build, whose functions take other arguments.
    if getattr(loaded, "bstack_kernels_version", lambda: 0)() != INTERFACE:
        return None
    loaded.bstack_instructions.restype = ctypes.c_char_p
    loaded.bstack_quantise.restype = ctypes.c_float
    loaded.bstack_feedback_bytes.restype = ctypes.c_size_t
    return loaded


def threads() -> int:
    """Return the number of threads of the kernels: what BSTACK_THREADS says, or every CPU."""
    given = os.environ.get(THREADS, "")
    if not given:
        return min(processors(), MAX_THREADS)
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= MAX_THREADS):
        raise UsageError(f"{THREADS} is {given!r}; allowed are 1 to {MAX_THREADS}.", hint="Unset it to use every CPU.")
    return int(given)
