"""How much memory there is for this process, what limits it, and whether processes wait for memory.

The limits of a control group and of all groups around it count, up to the mount; what is above the mount of a container cannot
be seen from inside. Versions 1 and 2 differ in the names of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

__all__ = ["Memory", "free_memory", "too_little"]

# Fraction of the free memory that weights may take; the rest is for what is computed with them.
WEIGHTS = 0.8
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
MOUNTED = PurePosixPath("/sys/fs/cgroup")
# Version 1 writes "no limit" as the largest multiple of the page size in 63 bits.
NO_LIMIT = 2**62
# Limits, usage, pages that the kernel drops before anything fails. memory.high slows a group down instead of failing it.
VERSIONS = [
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
]


class Bound(NamedTuple):
    """What one limit leaves: free bytes, bytes in all, and the limit in words that end "... free of ..."."""

    free: int
    total: int
    source: str


@dataclass(frozen=True)
class Memory:
    """What the system says at one moment."""

    # Bytes that this process can take before something fails or slows down, without swap; negative beyond a soft limit.
    free: int
    # Bytes in all under the limit that decides, and that limit in words that end "... free of ...".
    total: int
    source: str
    # Percent of the last 10 seconds in which a task of this control group (or of the machine) waited for memory.
    pressure: float | None = None


def free_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> Memory | None:
    """Return the minimum that any limit leaves: the machine, each control group around this process, its resource limits."""
    bounds = [*_machine(proc), *_group_bounds(proc, cgroup), *_resource_limits(proc)]
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
    limits, used = _read_text(proc / "self/limits"), _kilobytes(proc / "self/status")
    for name, field, source in [
        ("Max address space", "VmSize", "the limit of this process' address space (ulimit -v)"),
        ("Max data size", "VmData", "the limit of this process' data (ulimit -d)"),
    ]:
        soft = re.search(rf"^{name} +(\d{{1,20}}) ", limits, re.MULTILINE)
        if soft and field in used:
            yield Bound(int(soft[1]) - used[field], int(soft[1]), source)


def _kilobytes(file: Path) -> dict[str, int]:
    """Return lines such as ``MemFree:  12 kB``, in bytes."""
    found = re.findall(r"^(\w+):\s+(\d{1,19}) kB$", _read_text(file), re.MULTILINE)
    return {name: int(value) * 1024 for name, value in found}


def _pressure(proc: Path, cgroup: Path) -> float | None:
    """Read the innermost group that reports pressure; shrinking does not help a neighbour at its own limit."""
    folders = [folder / "memory.pressure" for folder, _ in _group_folders(proc, cgroup, "")]
    for file in [*folders, proc / "pressure/memory"]:
        if found := re.search(r"^some avg10=(\d{1,3}\.\d+) ", _read_text(file), re.MULTILINE):
            return float(found[1])
    return None


def _group_bounds(proc: Path, cgroup: Path) -> Iterator[Bound]:
    """Yield the limit of each group around this process, innermost first; `proc` and `cgroup` are the folders of Linux."""
    for folder, name in _group_folders(proc, cgroup, "memory"):
        for limits, usage, statistic in VERSIONS:
            found = [(limit, file) for file in limits if (limit := _number(folder / file)) is not None]
            if found and (used := _number(folder / usage)) is not None:
                limit, file = min(found)
                match = re.search(rf"^{statistic} (\d{{1,19}})$", _read_text(folder / "memory.stat"), re.MULTILINE)
                reclaimable = min(int(match[1]), used) if match else 0
                yield Bound(limit - used + reclaimable, limit, f"the memory limit of control group {name} ({file})")
        if _number(folder / "memory.use_hierarchy") == 0:
            break  # version 1 can count groups separately; the groups above do not count this one


def _group_folders(proc: Path, cgroup: Path, controller: str) -> Iterator[tuple[Path, str]]:
    """Yield the folders of this process' groups, which may be missing, and the groups' names; innermost first.

    `controller` names a tree of version 1, such as ``memory``; where there is none, or for "", the tree is version 2's.
    """
    fields = [line.split(":", 2) for line in _read_text(proc / "self/cgroup").splitlines() if line.count(":") >= 2]
    paths = {name: path for _, names, path in fields for name in names.split(",")}
    kind = controller if controller in paths else ""
    if kind not in paths:
        return
    top, folder = _mount(proc, cgroup, kind)
    path = PurePosixPath(paths[kind])
    # A path outside the mount: the container sees only its part of the tree, mounted as if it were the top.
    inside = path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else PurePosixPath()
    for level in (inside, *inside.parents):
        yield folder / level, str(PurePosixPath("/") / level)


def _read_text(file: Path) -> str:
    """Return what a file holds; nothing if it cannot be read."""
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


def _number(file: Path) -> int | None:
    """Return the whole number that a file holds; None for ``max`` and for what is no number."""
    try:
        value = int(_read_text(file))
    except ValueError:
        return None
    return value if 0 <= value < NO_LIMIT else None


def _mount(proc: Path, cgroup: Path, controller: str) -> tuple[PurePosixPath, Path]:
    """Return the group that is mounted, and where; the usual places if the table of mounts does not say."""
    for line in _read_text(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 3:
            continue
        matches = right[0] == "cgroup" and controller in right[2].split(",") if controller else right[0] == "cgroup2"
        mount = PurePosixPath(_unescaped(left[4]))
        if matches and mount.is_relative_to(MOUNTED):
            return PurePosixPath(_unescaped(left[3])), cgroup / mount.relative_to(MOUNTED)
    return PurePosixPath("/"), cgroup / controller


def _unescaped(field: str) -> str:
    """Decode blanks and backslashes, which the table of mounts writes as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
