"""How much memory there is: control groups of both versions, limits, other systems, files that make no sense."""

import subprocess
import sys

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_machine import MB, V1_MOUNTS, V2_MOUNT, Machine

from bstack.memory.free import free_memory

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files of Linux")


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def found(machine) -> tuple[int, int, str]:
    """MB free, MB in all, what limits."""
    memory = free_memory(**machine.roots)
    return memory.free // MB, memory.total // MB, memory.source


def test_without_groups_and_limits_the_machine_decides(machine):
    assert found(machine) == (4000, 8000, "the machine's memory")
    assert free_memory(**machine.roots).pressure is None


def test_an_old_kernel_counts_only_what_is_wholly_free(machine):
    machine.write(machine.proc / "meminfo", "MemTotal: 8192000 kB\nMemFree: 204800 kB\nCached: 1024000 kB")
    assert found(machine) == (200, 8000, "the machine's memory")


def test_version_2_counts_the_file_pages_that_nobody_uses(machine):
    machine.belongs("0::/user.slice/me", mounts=(V2_MOUNT,))
    machine.version2("user.slice/me", used=900, inactive=300, max=1000)
    assert found(machine) == (400, 1000, "the memory limit of control group /user.slice/me (memory.max)")


@pytest.mark.parametrize(
    "high, expected",
    [(950, (50, 950, "memory.high")), (700, (-200, 700, "memory.high")), (2000, (100, 1000, "memory.max"))],
)
def test_memory_high_is_a_limit_and_may_be_exceeded(machine, high, expected):
    machine.belongs("0::/a", mounts=(V2_MOUNT,))
    machine.version2("a", used=900, max=1000, high=high)
    free, total, file = expected
    assert found(machine) == (free, total, f"the memory limit of control group /a ({file})")


@pytest.mark.parametrize("tight", ["", "a", "a/b", "a/b/c"])
def test_every_level_of_version_2_counts(machine, tight):
    machine.belongs("0::/a/b/c", mounts=(V2_MOUNT,))
    for path in ("", "a", "a/b", "a/b/c"):
        machine.version2(path, used=500, max=600 if path == tight else 3000)
    assert found(machine) == (100, 600, f"the memory limit of control group /{tight} (memory.max)")


def test_no_group_of_another_process_counts(machine):
    machine.belongs("0::/a/b", mounts=(V2_MOUNT,))
    machine.version2("a/b/inside", used=5, max=10)
    machine.version2("a/beside", used=5, max=10)
    assert found(machine)[0] == 4000


@pytest.mark.parametrize("tight", ["", "docker", "docker/x"])
def test_every_level_of_version_1_counts(machine, tight):
    machine.belongs("5:cpu,cpuacct:/elsewhere", "4:memory:/docker/x", "0::/", mounts=V1_MOUNTS)
    for path in ("", "docker", "docker/x"):
        machine.version1(f"memory/{path}", used=700, limit=800 if path == tight else None, inactive=50)
    expected = (150, 800, f"the memory limit of control group /{tight} (memory.limit_in_bytes)")
    assert found(machine) == expected


def test_version_1_without_a_limit(machine):
    machine.belongs("4:memory:/x", mounts=V1_MOUNTS)
    machine.version1("memory/x", used=700)
    assert found(machine)[2] == "the machine's memory"


def test_version_1_may_count_groups_apart(machine):
    machine.belongs("4:memory:/a/b", mounts=V1_MOUNTS)
    machine.version1("memory/a", used=99, limit=100)
    machine.version1("memory/a/b", used=5, limit=1000, hierarchy=0)
    assert found(machine)[:2] == (995, 1000)


def test_a_container_with_a_group_namespace_of_its_own(machine):
    machine.belongs("0::/", mounts=(V2_MOUNT,))
    machine.version2("", used=100, max=512)
    assert found(machine) == (412, 512, "the memory limit of control group / (memory.max)")


@pytest.mark.parametrize("path", ["/docker/0123", "/docker/0123/inner"])
def test_a_container_that_sees_only_its_own_part_of_version_1(machine, path):
    mount = "35 31 0:32 /docker/0123 /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory"
    machine.belongs(f"4:memory:{path}", mounts=(mount,))
    machine.version1("memory", used=100, limit=512)
    machine.version1("memory/inner", used=90, limit=1000)
    assert found(machine)[:2] == (412, 512)


@pytest.mark.parametrize("path, top", [("/../other", "/"), ("/../other", "/mine"), ("/not/mounted/here", "/mine")])
def test_a_group_outside_the_mount_is_judged_by_the_mounts_top(machine, path, top):
    machine.belongs(f"0::{path}", mounts=(f"30 23 0:27 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw",))
    machine.version2("", used=100, max=512)
    machine.version2("../other", used=0, max=1)
    assert found(machine)[:2] == (412, 512)


def test_groups_joined_under_another_name_and_blanks_in_paths(machine):
    mount = r"35 31 0:32 /my\040box /sys/fs/cgroup/memory\040and\040more rw - cgroup cgroup rw,memory,hugetlb"
    machine.belongs("4:hugetlb,memory:/my box/in", mounts=(mount,))
    machine.version1("memory and more/in", used=100, limit=300)
    assert found(machine) == (200, 300, "the memory limit of control group /in (memory.limit_in_bytes)")


@pytest.mark.parametrize("line, folder", [("0::/a", "a"), ("4:memory:/a", "memory/a")])
def test_without_a_table_of_mounts_the_usual_places_are_taken(machine, line, folder):
    machine.belongs(line)
    (machine.proc / "self/mountinfo").unlink()
    (machine.version2 if line.startswith("0") else machine.version1)(
        folder, used=10, **({"max": 30} if line.startswith("0") else {"limit": 30})
    )
    assert found(machine)[:2] == (20, 30)


def test_more_inactive_pages_than_usage_is_no_gain(machine):
    machine.belongs("0::/a", mounts=(V2_MOUNT,))
    machine.version2("a", used=10, inactive=500, max=100)  # the two files are read one after the other
    assert found(machine)[:2] == (100, 100)


@pytest.mark.parametrize(
    "space, data, expected",
    [
        (3000, "unlimited", (1000, 3000, "the limit of this process' address space (ulimit -v)")),
        (3000, 600, (200, 600, "the limit of this process' data (ulimit -d)")),
        ("unlimited", "unlimited", (4000, 8000, "the machine's memory")),
    ],
)
def test_resource_limits(machine, space, data, expected):
    def row(name, soft):
        soft = soft if isinstance(soft, str) else soft * MB
        return f"{name:<25} {soft!s:<20} unlimited            bytes"

    lines = ["Limit  Soft Limit  Hard Limit  Units", row("Max data size", data), row("Max address space", space)]
    machine.write(machine.proc / "self/limits", "\n".join(lines))
    machine.write(machine.proc / "self/status", f"Name:\tx\nVmSize:\t {2000 * 1024} kB\nVmData:\t {400 * 1024} kB")
    assert found(machine) == expected


@on_linux
def test_a_true_limit_of_the_kernel_is_met_where_it_was_told():
    code = """
import mmap, resource
from bstack.memory.free import free_memory
resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
free, source = free_memory().free, free_memory().source
held = mmap.mmap(-1, int(free * 0.9))
try:
    mmap.mmap(-1, int(free * 0.2))
except OSError:
    print(source)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "the limit of this process' address space (ulimit -v)\n"


def test_pressure_is_the_groups_before_the_machines(machine):
    machine.stall(12.5)
    assert free_memory(**machine.roots).pressure == 12.5
    machine.belongs("0::/a/b", mounts=(V2_MOUNT,))
    machine.stall(3.25, machine.cgroup / "a/memory.pressure")
    assert free_memory(**machine.roots).pressure == 3.25
    machine.stall(0, machine.cgroup / "a/b/memory.pressure")
    assert free_memory(**machine.roots).pressure == 0


def test_pressure_beside_version_1_stands_in_the_second_tree(machine):
    machine.belongs("4:memory:/x", "0::/y", mounts=V1_MOUNTS)
    machine.stall(7, machine.cgroup / "unified/y/memory.pressure")
    assert free_memory(**machine.roots).pressure == 7


@pytest.mark.parametrize("text", ["", "full avg10=9.00 avg60=0", "some avg10=x avg60=0", b"\xff\xfe", "some"])
def test_pressure_that_cannot_be_understood_is_not_told(machine, text):
    machine.write(machine.proc / "pressure/memory", text)
    assert free_memory(**machine.roots).pressure is None


FILES = ["meminfo", "self/cgroup", "self/mountinfo", "self/limits", "self/status", "pressure/memory"]
GROUP_FILES = ["max", "high", "current", "stat", "pressure", "use_hierarchy", "limit_in_bytes", "usage_in_bytes"]
LINES = [
    V2_MOUNT,
    "0::/a",
    "4:memory:/a",
    "some avg10=9.00 ",
    "inactive_file 12",
    "Max data size 12 12 bytes",
    "9" * 5000,
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbage_never_fails_and_never_gives_more(machine, data):
    garbage = st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(LINES), max_size=4).map("\n".join))
    machine.belongs("0::/a", mounts=(V2_MOUNT,))
    machine.available(4000 * MB)
    machine.version2("a", used=100, max=512)
    for file in data.draw(st.lists(st.sampled_from([machine.proc / name for name in FILES[1:]]), max_size=3)):
        machine.write(file, data.draw(garbage))
    for name in data.draw(st.lists(st.sampled_from(GROUP_FILES), max_size=3)):
        machine.write(machine.cgroup / "a" / f"memory.{name}", data.draw(garbage))
    assert free_memory(**machine.roots).free <= 4000 * MB


def test_folders_in_place_of_files_count_as_not_there(machine):
    machine.belongs("0::/a", mounts=(V2_MOUNT,))
    (machine.cgroup / "a/memory.max").mkdir(parents=True)
    assert found(machine)[0] == 4000


def test_without_files_of_linux_psutil_answers(tmp_path):
    memory = free_memory(tmp_path / "none", tmp_path / "none")
    assert 0 < memory.free <= memory.total == psutil.virtual_memory().total
    assert memory.source == "the machine's memory" and memory.pressure is None


@on_linux
def test_this_machine():
    memory = free_memory()
    assert memory.free <= memory.total and memory.source
    assert memory.pressure is None or 0 <= memory.pressure <= 100


def test_a_system_that_tells_nothing(tmp_path, monkeypatch):
    def fail():
        raise NotImplementedError

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    assert free_memory(tmp_path / "none", tmp_path / "none") is None
