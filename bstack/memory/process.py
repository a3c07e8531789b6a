"""How much memory this process holds, now and at most so far."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["peak_bytes", "resident_bytes"]

PROC = Path("/proc")


def resident_bytes(proc: Path = PROC) -> int | None:
    """Bytes of memory this process holds now (its resident set); None where the system does not tell.

    Parameters
    ----------
    proc : Path
        Where Linux' process files are.
    """
    try:
        return int((proc / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    if sys.platform == "darwin":
        return _darwin_resident()
    counters = _windows_counters()
    return None if counters is None else counters.WorkingSetSize


def peak_bytes(proc: Path = PROC) -> int | None:
    """Most bytes of memory this process has held so far; None where the system does not tell.

    Parameters
    ----------
    proc : Path
        Where Linux' process files are.
    """
    try:
        # Not getrusage: on Linux its maximum includes the parent that this process was forked from.
        with open(proc / "self/status") as stream:
            return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM"))
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        counters = _windows_counters()
        return None if counters is None else counters.PeakWorkingSetSize
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _TaskInfo(ctypes.Structure):
    """``struct proc_taskinfo`` of macOS' sys/proc_info.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("virtual_size", "resident_size", "user", "system", "users", "systems")),
        ("counts", ctypes.c_int32 * 12),
    ]


def _darwin_resident() -> int | None:
    info, flavour = _TaskInfo(), 4  # PROC_PIDTASKINFO
    try:
        found = ctypes.CDLL(None).proc_pidinfo(
            os.getpid(), flavour, ctypes.c_uint64(0), ctypes.byref(info), ctypes.sizeof(info)
        )
    except (OSError, AttributeError):
        return None
    return info.resident_size if found == ctypes.sizeof(info) else None


class _Counters(ctypes.Structure):
    """``PROCESS_MEMORY_COUNTERS`` of Windows' psapi.h."""

    _fields_ = [
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("pools_and_page_files", ctypes.c_size_t * 6),
    ]


def _windows_counters() -> _Counters | None:
    if sys.platform != "win32":
        return None
    counters = _Counters(cb=ctypes.sizeof(_Counters))
    kernel = ctypes.WinDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    ok = kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return counters if ok else None
