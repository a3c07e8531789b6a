"""Linux control groups: how much memory each group around this process has left.

The limits of a group and of all groups around it count, up to the mount; what is above the mount of a container cannot be seen
from inside. Versions 1 and 2 differ in the names of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

__all__ = ["Bound", "group_bounds", "group_folders", "read_text"]

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


def group_bounds(proc: Path, cgroup: Path) -> Iterator[Bound]:
    """Yield the limit of each group around this process, innermost first; `proc` and `cgroup` are the folders of Linux."""
    for folder, name in group_folders(proc, cgroup, "memory"):
        for limits, usage, statistic in VERSIONS:
            found = [(limit, file) for file in limits if (limit := _number(folder / file)) is not None]
            if found and (used := _number(folder / usage)) is not None:
                limit, file = min(found)
                match = re.search(rf"^{statistic} (\d{{1,19}})$", read_text(folder / "memory.stat"), re.MULTILINE)
                reclaimable = min(int(match[1]), used) if match else 0
                yield Bound(limit - used + reclaimable, limit, f"the memory limit of control group {name} ({file})")
        if _number(folder / "memory.use_hierarchy") == 0:
            break  # version 1 can count groups separately; the groups above do not count this one


def group_folders(proc: Path, cgroup: Path, controller: str) -> Iterator[tuple[Path, str]]:
    """Yield the folders of this process' groups, which may be missing, and the groups' names; innermost first.

    `controller` names a tree of version 1, such as ``memory``; where there is none, or for "", the tree is version 2's.
    """
    fields = [line.split(":", 2) for line in read_text(proc / "self/cgroup").splitlines() if line.count(":") >= 2]
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


def read_text(file: Path) -> str:
    """Return what a file holds; nothing if it cannot be read."""
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


def _number(file: Path) -> int | None:
    """Return the whole number that a file holds; None for ``max`` and for what is no number."""
    try:
        value = int(read_text(file))
    except ValueError:
        return None
    return value if 0 <= value < NO_LIMIT else None


def _mount(proc: Path, cgroup: Path, controller: str) -> tuple[PurePosixPath, Path]:
    """Return the group that is mounted, and where; the usual places if the table of mounts does not say."""
    for line in read_text(proc / "self/mountinfo").splitlines():
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
