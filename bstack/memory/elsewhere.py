"""Free memory of the machine outside Linux. Limits of single processes or jobs are not looked at there."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess

__all__ = ["machine_elsewhere", "parse_vm_stat"]


def machine_elsewhere(platform: str) -> tuple[int, int, str] | None:
    """Free bytes, all bytes and where the figures are from; None where the system does not tell.

    Parameters
    ----------
    platform : str
        As ``sys.platform``.
    """
    if platform == "win32":
        return _windows()
    total = _pages("SC_PHYS_PAGES")
    if platform == "darwin" and total is not None:
        try:
            text = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        free = parse_vm_stat(text)
        return None if free is None else (free, total, "the machine's memory (vm_stat)")
    free = _pages("SC_AVPHYS_PAGES")
    if free is None or total is None:
        return None
    return free, total, "the machine's memory (free pages alone, the cache not counted)"


def parse_vm_stat(text: str) -> int | None:
    """Bytes that macOS can give away without writing to disk, from what ``vm_stat`` prints; None if that is something else."""
    size = re.search(r"page size of (\d{1,9}) bytes", text)
    pages = {name: int(count) for name, count in re.findall(r"^([\w -]+): +(\d{1,15})\.$", text, re.MULTILINE)}
    if not size or "Pages free" not in pages:
        return None
    # Of the inactive pages only those of files: others must be compressed or swapped first.
    cached = min(pages.get("Pages inactive", 0), pages.get("File-backed pages", 0))
    given_away = sum(pages.get(f"Pages {name}", 0) for name in ("free", "speculative", "purgeable"))
    return int(size[1]) * (given_away + cached)


def _pages(name: str) -> int | None:
    try:
        pages = os.sysconf(name)
    except (AttributeError, ValueError, OSError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None


class _MemoryStatus(ctypes.Structure):
    """``MEMORYSTATUSEX`` of Windows' sysinfoapi.h."""

    _fields_ = [
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        *(
            (name, ctypes.c_uint64)
            for name in (
                "ullTotalPhys",
                "ullAvailPhys",
                "ullTotalPageFile",
                "ullAvailPageFile",
                "ullTotalVirtual",
                "ullAvailVirtual",
                "ullAvailExtendedVirtual",
            )
        ),
    ]


def _windows() -> tuple[int, int, str] | None:
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    if not ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.ullAvailPhys, status.ullTotalPhys, "the machine's memory"
