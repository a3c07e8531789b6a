"""The poller of memory: what it does with a decision, what it says, how its thread ends, and a real process that is squeezed."""

import dataclasses
import functools
import subprocess
import sys
import threading
import time

import psutil
import pytest
from simulated_machine import MB, V2_MOUNT, Machine

import bstk
from bstack.memory.free import Memory, free_memory
from bstack.packed.autosize import MemoryPoller, default_margin

pytestmark = pytest.mark.slow

SMALLEST, LARGEST = 100 * MB, 1000 * MB


class Model:
    """What a poller is given: a size, a list of the sizes asked for, and what is said."""

    def __init__(self, size: int = 500 * MB):
        self.size, self.asked, self.said, self.failing = size, [], [], None

    def resize(self, target: int) -> None:
        self.asked.append(target)
        if self.failing is not None:
            raise self.failing
        self.size = target

    def poller(self, **changes) -> MemoryPoller:
        return MemoryPoller(
            self.resize,
            lambda: self.size,
            **{"smallest": SMALLEST, "largest": LARGEST, "warn": self.said.append, **changes},
        )


def until(condition, what: str) -> None:
    """Wait for something that must come; long enough for the slowest machine."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def test_a_group_that_fills_up_and_empties_again(tmp_path):
    machine, model = Machine(tmp_path), Model()
    machine.belongs("0::/a", mounts=(V2_MOUNT,))

    def others(used: int) -> None:
        machine.version2("a", used=used + model.size // MB, max=1200)

    others(500)
    poller = model.poller(read=functools.partial(free_memory, **machine.roots))
    margin = default_margin(Memory(0, 1200 * MB, ""))
    for now in range(5):
        poller.poll(now)
    assert model.asked == []
    others(690)
    poller.poll(5)
    assert model.asked == [1200 * MB - 690 * MB - margin - 16 * MB]
    for now in range(6, 40):
        others(100)
        poller.poll(now)
    assert model.size == LARGEST and len(model.asked) == 2 and model.said == []


def test_an_alarm_of_the_group_shrinks(tmp_path):
    machine, model = Machine(tmp_path), Model()
    machine.belongs("0::/a", mounts=(V2_MOUNT,))
    machine.stall(40, machine.cgroup / "a/memory.pressure")
    model.poller(read=functools.partial(free_memory, **machine.roots)).poll(0)
    assert len(model.asked) == 1 and model.size < 440 * MB


def test_too_little_for_the_smallest_is_said_once():
    model = Model()
    memory = Memory(10 * MB, 8000 * MB, "the machine's memory")
    poller = model.poller(read=lambda: dataclasses.replace(memory, free=520 * MB - model.size), margin=450 * MB)
    for now in range(5):
        poller.poll(now)
    assert model.asked == [SMALLEST]
    (message,) = model.said
    assert "the machine's memory" in message and "100.00 MB" in message and "450 MB" in message


def test_without_a_place_to_tell_it_is_a_warning():
    poller = MemoryPoller(
        lambda target: None, lambda: SMALLEST, smallest=SMALLEST, largest=LARGEST, read=lambda: Memory(0, MB, "a test")
    )
    with pytest.warns(RuntimeWarning, match="Too little memory: 0 MB are free of a test"):
        poller.poll(0)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), bstk.DamagedError("a chunk does not match")]
)
def test_a_resize_that_fails_is_said_once_and_tried_again(error):
    model = Model()
    model.failing = error
    poller = model.poller(read=lambda: Memory(450 * MB - model.size, 8000 * MB, "a test"), margin=100 * MB)
    poller.poll(0)
    poller.poll(1)
    assert model.asked == [334 * MB] * 2
    (message,) = model.said
    assert "334.00 MB" in message and (str(error) or "MemoryError") in message
    model.failing = None
    poller.poll(2)
    poller.poll(3)
    assert model.size == 334 * MB and len(model.said) == 1


def test_growing_that_fails_waits_longer_each_time():
    model = Model()
    model.failing = MemoryError()
    poller = model.poller(read=lambda: Memory(2000 * MB, 8000 * MB, "a test"), quiet=2)
    for now in range(60):
        poller.poll(now)
    assert 2 <= len(model.asked) <= 5 and len(model.said) == 1


def test_a_growth_that_fails_later_is_said_once_and_waits_longer_each_time():
    model = Model()
    failure = None

    def resize(target):
        nonlocal failure
        model.asked.append(target)
        failure = MemoryError()  # after it has returned

    poller = MemoryPoller(
        resize,
        lambda: model.size,
        failure=lambda: failure,
        smallest=SMALLEST,
        largest=LARGEST,
        quiet=2,
        read=lambda: Memory(2000 * MB, 8000 * MB, "a test"),
        warn=model.said.append,
    )
    for now in range(60):
        poller.poll(now)
    assert 2 <= len(model.asked) <= 5
    (message,) = model.said
    assert "could not grow: MemoryError" in message


def test_a_reading_that_fails_or_says_nothing_is_survived():
    answers = iter(
        [Memory(0, 8000 * MB, "a test"), RuntimeError("no such thing"), None, Memory(0, 8000 * MB, "a test")]
    )

    def read():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    model = Model()
    poller = model.poller(read=read)
    poller.poll(0)
    poller.poll(1)
    assert model.asked == [] and "no such thing" in model.said[0]
    poller.poll(2)
    assert model.asked == [SMALLEST]


def test_a_system_that_does_not_tell_is_refused():
    with pytest.raises(bstk.UsageError, match="fixed budget, such as 500 MB"):
        Model().poller(read=lambda: None)


def test_the_thread_resizes_goes_on_after_an_error_and_ends():
    model = Model()
    model.failing = ValueError("not now")
    free = 0
    poller = model.poller(read=lambda: Memory(free, 8000 * MB, "a test"), interval=0.001)
    with poller:
        until(lambda: len(model.asked) > 2, "no second try")
        model.failing = None
        until(lambda: model.size == SMALLEST, "no shrink")
        assert any(thread.name == "bstack-poller" and thread.daemon for thread in threading.enumerate())
    assert not any(thread.name == "bstack-poller" for thread in threading.enumerate())
    asked = len(model.asked)
    model.size = LARGEST
    time.sleep(0.02)
    assert len(model.asked) == asked


def test_the_thread_goes_on_where_telling_fails(monkeypatch):
    model, failures = Model(), []
    model.failing = OSError(28, "No space left on device")
    monkeypatch.setattr(threading, "excepthook", failures.append)

    def warn(message):
        raise ValueError("I/O operation on closed file")

    with model.poller(read=lambda: Memory(0, 8000 * MB, "a test"), interval=0.001, warn=warn):
        until(lambda: len(model.asked) > 2, "no second try")
        model.failing = None
        until(lambda: model.size == SMALLEST, "no shrink")
    assert failures and all("closed file" in str(failure.exc_value) for failure in failures)
    assert len(failures) <= 3  # once for each thing that could not be said


def test_leaving_waits_for_a_resize_under_way_and_not_for_the_interval():
    model, entered, proceed = Model(), threading.Event(), threading.Event()

    def resize(target: int) -> None:
        entered.set()
        assert proceed.wait(300)
        model.size = target

    poller = MemoryPoller(
        resize,
        lambda: model.size,
        smallest=SMALLEST,
        largest=LARGEST,
        read=lambda: Memory(0, MB, "a test"),
        interval=0.001,
        warn=model.said.append,
    )
    with poller:
        assert entered.wait(300)
        threading.Timer(0.05, proceed.set).start()
    assert model.size < 500 * MB and model.said == []
    with model.poller(read=lambda: Memory(0, MB, "a test"), interval=3600):
        pass


def test_an_error_in_the_block_is_not_swallowed():
    with pytest.raises(KeyError), Model().poller(interval=0.001):
        raise KeyError("mine")


# A process that holds blocks in a mapping, each page touched, and gives the end of it back when it has to shrink. What is
# free is what the simulated files say, less what it holds.
PROCESS = """
import dataclasses, mmap, sys
from pathlib import Path
from bstack.memory.free import free_memory
from bstack.packed.autosize import MemoryPoller

MB = 2**20
roots = {"proc": Path(sys.argv[1]) / "proc", "cgroup": Path(sys.argv[1]) / "cgroup"}
area, held = mmap.mmap(-1, 256 * MB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0

def resize(target):
    global held
    target = target // MB * MB
    if target < held:
        area.madvise(mmap.MADV_DONTNEED, target, held - target)
    for page in range(held, target, mmap.PAGESIZE):
        area[page] = 1
    held = target
    print(held // MB, flush=True)

def read():
    memory = free_memory(**roots)
    return dataclasses.replace(memory, free=memory.free - held)

resize(200 * MB)
with MemoryPoller(resize, lambda: held, smallest=32 * MB, largest=256 * MB, margin=64 * MB, quiet=0.5, interval=0.05, read=read):
    sys.stdin.read()
print("ended")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MADV_DONTNEED gives memory back at once on Linux")
def test_a_process_gives_its_memory_back_and_takes_it_again(tmp_path):
    machine = Machine(tmp_path)
    machine.belongs("0::/a", mounts=(V2_MOUNT,))
    machine.version2("a", used=0, max=300)
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "200\n"
            memory = psutil.Process(process.pid).memory_info
            full = memory().rss

            machine.version2("a", used=150, max=300)  # others took 150 MB: 300 - 150 - 64 - 16 are left
            assert process.stdout.readline() == "70\n"
            assert full - memory().rss == pytest.approx(130 * MB, rel=0.05)

            machine.version2("a", used=290, max=300)
            assert process.stdout.readline() == "32\n"

            machine.version2("a", used=20, max=300)
            assert process.stdout.readline() == "200\n"
            assert memory().rss == pytest.approx(full, rel=0.05)
            assert process.communicate("", timeout=300)[0] == "ended\n"
        finally:
            process.kill()
    assert process.returncode == 0


def test_a_process_that_ends_in_the_middle_is_not_held_up():
    code = (
        "from bstack.packed.autosize import MemoryPoller; from bstack.memory.free import Memory\n"
        "MemoryPoller(print, lambda: 5, smallest=1, largest=9, read=lambda: Memory(2**40, 2**40, 'x'), interval=3600).__enter__()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# The same against a limit that the kernel itself holds: the rest of the process maps memory until less than the margin is left.
LIMITED = """
import mmap, resource, time
from bstack.memory.free import free_memory
from bstack.packed.autosize import MemoryPoller

MB = 2**20
arena = [mmap.mmap(-1, 8 * MB) for _ in range(40)]
space = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (space + 512 * MB, resource.RLIM_INFINITY))

def resize(target):
    while len(arena) * 8 * MB > target:
        arena.pop().close()

with MemoryPoller(resize, lambda: len(arena) * 8 * MB, smallest=16 * MB, largest=320 * MB, margin=128 * MB, interval=0.02) as poller:
    free = free_memory().free
    others = mmap.mmap(-1, free - 64 * MB)
    end = time.monotonic() + 300
    while free_memory().free < 128 * MB and time.monotonic() < end:
        time.sleep(0.01)
print(len(arena) < 40, free_memory().free >= 128 * MB, "address space" in free_memory().source)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space that hold are Linux'")
def test_a_process_makes_room_under_a_true_limit():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "True True True\n"), done.stderr
