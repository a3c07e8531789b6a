"""Linux control groups: how much memory each group that this process is in has left, and how long its tasks stall.

Limits hold for a group and all groups inside it, so every level from this process' own group up to the mount counts.
Version 1 and 2 differ in the names of files only. What is above a container's mount cannot be seen from inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Group", "groups", "levels", "number"]

MOUNTED = PurePosixPath("/sys/fs/cgroup")
# Version 1 says "no limit" as the largest multiple of the page size in 63 bits.
NO_LIMIT = 2**62
# Limits, usage, reclaimable pages. memory.high slows a group down instead of failing it, as much a reason to hold less.
VERSIONS = [
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
]


@dataclass(frozen=True)
class Group:
    """One level's figures, in bytes.

    Attributes
    ----------
    name : str
        Path from the mount, ``/`` for its top.
    file : str
        Which of the group's files sets the limit.
    limit : int
        Of the bytes that the group may hold.
    used : int
        Bytes that the group and all groups inside it hold, page cache included.
    reclaimable : int
        Part of `used` that the kernel drops before anything fails: file pages that nobody has used for long.
    """

    name: str
    file: str
    limit: int
    used: int
    reclaimable: int

    @property
    def free(self) -> int:
        """Bytes left; negative when a limit that may be exceeded (``memory.high``) is exceeded."""
        return self.limit - self.used + min(self.reclaimable, self.used)


def groups(proc: Path, cgroup: Path) -> Iterator[Group]:
    """All levels that limit this process, innermost first; levels without a limit or a readable usage are left out.

    Parameters
    ----------
    proc, cgroup : Path
        ``/proc`` and ``/sys/fs/cgroup``, or folders like them.
    """
    for folder, name in levels(proc, cgroup, "memory"):
        for limits, usage, statistic in VERSIONS:
            found = [(limit, file) for file in limits if (limit := number(folder / file)) is not None]
            if found and (used := number(folder / usage)) is not None:
                limit, file = min(found)
                yield Group(name, file, limit, used, _statistic(folder, statistic))
        if number(folder / "memory.use_hierarchy") == 0:
            break  # version 1 can count groups apart; those above know nothing of this one


def levels(proc: Path, cgroup: Path, controller: str) -> Iterator[tuple[Path, str]]:
    """Folders of this process' groups, which may be missing, and the groups' names; innermost first.

    Parameters
    ----------
    proc, cgroup : Path
        As of `groups`.
    controller : str
        Such as ``memory``: the version 1 hierarchy that has it, otherwise version 2's. Empty: always version 2's.
    """
    paths = _paths(proc)
    kind = controller if controller in paths else ""
    if kind not in paths:
        return
    top, folder = _mount(proc, cgroup, kind)
    path = PurePosixPath(paths[kind])
    # A path outside the mount: the container sees its own part of the tree only, mounted as if it were the top.
    inside = path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else PurePosixPath()
    while True:
        yield folder / inside, str(PurePosixPath("/") / inside)
        if inside == PurePosixPath():
            return
        inside = inside.parent


def number(file: Path) -> int | None:
    """The whole number that a file holds; None for ``max``, for "no limit", and for what cannot be read."""
    try:
        value = int(file.read_text())
    except (OSError, ValueError):
        return None
    return value if 0 <= value < NO_LIMIT else None


def _statistic(folder: Path, name: str) -> int:
    try:
        found = re.search(rf"^{name} (\d{{1,19}})$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return 0
    return int(found[1]) if found else 0


def _paths(proc: Path) -> dict[str, str]:
    """Controller -> path of this process' group; the empty name stands for version 2."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return {}
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return {name: path for _, names, path in fields for name in names.split(",")}


def _mount(proc: Path, cgroup: Path, controller: str) -> tuple[PurePosixPath, Path]:
    """The group that is mounted, and the folder where; the usual places if the table of mounts does not say."""
    try:
        lines = (proc / "self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        lines = []
    for line in lines:
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 3:
            continue
        matches = right[0] == "cgroup" and controller in right[2].split(",") if controller else right[0] == "cgroup2"
        place = PurePosixPath(_unescaped(left[4]))
        if matches and place.is_relative_to(MOUNTED):
            return PurePosixPath(_unescaped(left[3])), cgroup / place.relative_to(MOUNTED)
    return PurePosixPath("/"), cgroup / controller


def _unescaped(field: str) -> str:
    """The table of mounts writes blanks and backslashes as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
