"""How much memory there is for this process, what limits it, and whether processes wait for memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bstack.memory.cgroups import groups, levels
from bstack.memory.elsewhere import machine_elsewhere

__all__ = ["Memory", "free_memory", "too_little"]

# Of the free memory, what weights may take; the rest is for what is computed with them.
WEIGHTS = 0.8
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """What the system says at one hessian.

    Attributes
    ----------
    free : int
        Bytes that this process can take before something fails or is slowed down; swap does not count. Negative when a
        limit that may be exceeded is exceeded.
    total : int
        Bytes there are in all under the limit that decides.
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


class _Bound(NamedTuple):
    free: int
    total: int
    source: str


def free_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> Memory | None:
    """The least that any limit leaves: the machine, each control group around this process, its resource limits.

    Parameters
    ----------
    proc, cgroup : Path
        Where Linux' process files and control groups are.

    Returns
    -------
    Memory or None
        None where the system does not tell. A file that cannot be understood counts as not there.
    """
    bounds = [*_machine(proc), *_groups(proc, cgroup), *_resource_limits(proc)]
    if not bounds:
        return None
    return Memory(*min(bounds, key=lambda bound: bound.free), pressure=_pressure(proc, cgroup))


def too_little(weights: int) -> Memory | None:
    """The memory there is, if that many bytes of weights should not be loaded into it now.

    None where they may, and where the system does not tell: there the allocation itself has to.
    """
    memory = free_memory()
    return memory if memory is not None and weights > WEIGHTS * memory.free else None


def _machine(proc: Path) -> Iterator[_Bound]:
    fields = _kilobytes(proc / "meminfo")
    # Before Linux 3.14 nobody says how much of the cache could be freed; what is wholly free is safe.
    free = fields.get("MemAvailable", fields.get("MemFree"))
    if free is not None:
        yield _Bound(free, fields.get("MemTotal", free), "the machine's memory")
    elif (found := machine_elsewhere(sys.platform)) is not None:
        yield _Bound(*found)


def _groups(proc: Path, cgroup: Path) -> Iterator[_Bound]:
    for group in groups(proc, cgroup):
        yield _Bound(group.free, group.limit, f"the memory limit of control group {group.name} ({group.file})")


def _resource_limits(proc: Path) -> Iterator[_Bound]:
    """RLIMIT_AS and RLIMIT_DATA: what the kernel counts against them is address space, touched or not."""
    try:
        limits = (proc / "self/limits").read_text()
    except (OSError, ValueError):
        return
    used = _kilobytes(proc / "self/status")
    for name, field, source in [
        ("Max address space", "VmSize", "the limit of this process' address space (ulimit -v)"),
        ("Max data size", "VmData", "the limit of this process' data (ulimit -d)"),
    ]:
        soft = re.search(rf"^{name} +(\d{{1,20}}) ", limits, re.MULTILINE)
        if soft and field in used:
            yield _Bound(int(soft[1]) - used[field], int(soft[1]), source)


def _kilobytes(file: Path) -> dict[str, int]:
    """Lines such as ``MemFree:  12 kB``, in bytes."""
    try:
        text = file.read_text()
    except (OSError, ValueError):
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d{1,19}) kB$", text, re.MULTILINE)}


def _pressure(proc: Path, cgroup: Path) -> float | None:
    """Of the innermost group that tells, before the machine's: a neighbour stalling at its own limit is not helped by us."""
    for folder, _ in levels(proc, cgroup, ""):
        if (found := _some_average(folder / "memory.pressure")) is not None:
            return found
    return _some_average(proc / "pressure/memory")


def _some_average(file: Path) -> float | None:
    try:
        found = re.search(r"^some avg10=(\d{1,3}\.\d+) ", file.read_text(), re.MULTILINE)
    except (OSError, ValueError):  # also where the kernel was built with the files but started without the counting
        return None
    return float(found[1]) if found else None
