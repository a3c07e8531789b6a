"""Files like those of /proc and /sys/fs/cgroup, in a folder, to be rewritten as a test goes on."""

from __future__ import annotations

import os
from pathlib import Path

MB = 2**20
UNLIMITED = 9223372036854771712


class Machine:
    """A machine of 8000 MB whose files stand under `folder`; nothing in it but what a test writes.

    Attributes
    ----------
    roots : dict
        Arguments of `free_memory`.
    """

    def __init__(self, folder: Path, free: int | None = 4000):
        self.proc, self.cgroup = folder / "proc", folder / "cgroup"
        self.proc.mkdir()
        self.cgroup.mkdir()
        self.roots = {"proc": self.proc, "cgroup": self.cgroup}
        if free is not None:
            self.available(free * MB)

    def write(self, file: Path, text: str | bytes | int) -> None:
        """Put a file in place at once: a process may be reading the one before."""
        file.parent.mkdir(parents=True, exist_ok=True)
        data = text if isinstance(text, bytes) else f"{text}\n".encode()
        temporary = file.with_name(file.name + ".new")
        temporary.write_bytes(data)
        os.replace(temporary, file)

    def available(self, size: int) -> None:
        """Free bytes of the machine; kept in kB, as the kernel does."""
        self.write(
            self.proc / "meminfo",
            f"MemTotal:        8192000 kB\nMemFree:          200000 kB\nMemAvailable:    {size // 1024} kB",
        )

    def stall(self, percent: float, file: Path | None = None) -> None:
        """The average over 10 seconds in a file of pressure, the machine's if none is given."""
        text = (
            f"some avg10={percent:.2f} avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"
        )
        self.write(file or self.proc / "pressure/memory", text)

    def belongs(self, *lines: str, mounts: tuple[str, ...] = ()) -> None:
        """What /proc/self/cgroup and /proc/self/mountinfo say."""
        self.write(self.proc / "self/cgroup", "\n".join(lines))
        self.write(self.proc / "self/mountinfo", "\n".join(mounts))

    def version2(self, path: str, used: int, inactive: int = 0, **limits: int | str) -> None:
        """A group of version 2, sizes in MB; limits by the ends of their files' names."""
        folder = self.cgroup / path
        for name, value in {"max": "max", "high": "max", **limits}.items():
            self.write(folder / f"memory.{name}", value if isinstance(value, str) else value * MB)
        self.write(folder / "memory.current", used * MB)
        self.write(
            folder / "memory.stat", f"anon 1\nfile 2\ninactive_anon 7\ninactive_file {inactive * MB}\nactive_file 5"
        )

    def version1(self, path: str, used: int, limit: int | None = None, inactive: int = 0, hierarchy: int = 1) -> None:
        """A group of version 1, sizes in MB."""
        folder = self.cgroup / path
        self.write(folder / "memory.limit_in_bytes", UNLIMITED if limit is None else limit * MB)
        self.write(folder / "memory.usage_in_bytes", used * MB)
        self.write(
            folder / "memory.stat", f"cache 3\ninactive_file 1\ntotal_cache 5\ntotal_inactive_file {inactive * MB}"
        )
        self.write(folder / "memory.use_hierarchy", hierarchy)


V2_MOUNT = "30 23 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755",
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct",
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory",
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
)
