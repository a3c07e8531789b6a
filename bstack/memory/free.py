"""How much memory there is for this process, what limits it, and whether processes wait for memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from bstack.memory.cgroups import Bound, group_bounds, group_folders, read_text

__all__ = ["Memory", "free_memory", "too_little"]

# Fraction of the free memory that weights may take; the rest is for what is computed with them.
WEIGHTS = 0.8
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """What the system says at one moment.

    Attributes
    ----------
    free : int
        Bytes that this process can take before something fails or is slowed down; swap does not count. Negative when a
        limit that may be exceeded is exceeded.
    total : int
        Bytes in all under the limit that decides.
    source : str
        That limit, in words that end the sentence "... free of ...".
    pressure : float or None
        Percent of the last 10 seconds in which some task of this process' control group (of the machine, where groups
        do not tell) waited for memory; None where the system does not tell.
    """

    free: int
    total: int
    source: str
    pressure: float | None = None


def free_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> Memory | None:
    """Return the minimum that any limit leaves: the machine, each control group around this process, its resource limits."""
    bounds = [*_machine(proc), *group_bounds(proc, cgroup), *_resource_limits(proc)]
    if not bounds:
        return None
    return Memory(*min(bounds, key=lambda bound: bound.free), pressure=_pressure(proc, cgroup))


def too_little(weights: int) -> Memory | None:
    """Return the memory there is if that many bytes of weights should not be loaded into it now, otherwise None."""
    memory = free_memory()
    return memory if memory is not None and weights > WEIGHTS * memory.free else None


def _machine(proc: Path) -> Iterator[Bound]:
    fields = _kilobytes(proc / "meminfo")
    # Linux before 3.14 does not say how much of the cache could be freed; what is wholly free is safe.
    free = fields.get("MemAvailable", fields.get("MemFree"))
    if free is not None:
        yield Bound(free, fields.get("MemTotal", free), "the machine's memory")
        return
    try:
        memory = psutil.virtual_memory()
    except (OSError, NotImplementedError):
        return
    yield Bound(memory.available, memory.total, "the machine's memory")


def _resource_limits(proc: Path) -> Iterator[Bound]:
    """Yield RLIMIT_AS and RLIMIT_DATA; the kernel counts mapped addresses against them, touched or not."""
    limits, used = read_text(proc / "self/limits"), _kilobytes(proc / "self/status")
    for name, field, source in [
        ("Max address space", "VmSize", "the limit of this process' address space (ulimit -v)"),
        ("Max data size", "VmData", "the limit of this process' data (ulimit -d)"),
    ]:
        soft = re.search(rf"^{name} +(\d{{1,20}}) ", limits, re.MULTILINE)
        if soft and field in used:
            yield Bound(int(soft[1]) - used[field], int(soft[1]), source)


def _kilobytes(file: Path) -> dict[str, int]:
    """Return lines such as ``MemFree:  12 kB``, in bytes."""
    found = re.findall(r"^(\w+):\s+(\d{1,19}) kB$", read_text(file), re.MULTILINE)
    return {name: int(value) * 1024 for name, value in found}


def _pressure(proc: Path, cgroup: Path) -> float | None:
    """Read the innermost group that tells, before the machine: a neighbour that stalls at its own limit gains nothing from us."""
    folders = [folder / "memory.pressure" for folder, _ in group_folders(proc, cgroup, "")]
    for file in [*folders, proc / "pressure/memory"]:
        if found := re.search(r"^some avg10=(\d{1,3}\.\d+) ", read_text(file), re.MULTILINE):
            return float(found[1])
    return None
