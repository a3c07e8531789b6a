"""Progress: a bar on a terminal, a line a minute in a log, nothing with -q."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bstack.cli import _progress

# The command, with a line at every opportunity instead of one a minute.
_TALKATIVE = "import sys; from bstack.cli import _progress, main; _progress.LINE_EVERY = 0; sys.exit(main())"


@pytest.fixture
def clock(monkeypatch):
    """The time that is shown to progress: ``clock.now``."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_line_a_minute_tells_what_is_done_and_left(capsys, clock):
    with _progress.stage(32, "Compressing layers", quiet=False) as step:
        for _ in range(4):  # what an earlier run had done
            step()
        for _ in range(28):
            clock.now += 45
            step()
            step(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Compressing layers: 6 of 32"  # of which nobody knows how many were done before
    assert lines[1] == "Compressing layers: 8 of 32, about 18 min 00 s left"  # two steps in 90 s
    assert len(lines) == 13 and lines[-1].startswith("Compressing layers: 30 of 32")


def test_bytes_are_told_in_megabytes(capsys, clock):
    with _progress.copied(3000 * 2**20, "fetch", quiet=False) as advance:
        advance(500 * 2**20)
        for _ in range(2):
            clock.now += 60
            advance(2**20)
    assert capsys.readouterr().err == (
        "fetch: 501.00 MB of 3,000.00 MB\nfetch: 502.00 MB of 3,000.00 MB, about 41 h 38 min left\n"
    )


@pytest.mark.parametrize("quiet", [True, False])
def test_short_work_and_quiet_work_say_nothing(capsys, clock, quiet):
    with _progress.stage(2, "x", quiet) as step, _progress.copied(2, "x", quiet) as advance:
        step()
        advance(1)
        clock.now += 600 if quiet else 59
        step()
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_the_command_in_a_log(vector, tmp_path):
    path = vector("whole.bstk")
    for quiet in (False, True):
        arguments = ["verify", path, *(["-q"] if quiet else [])]
        done = subprocess.run(
            [sys.executable, "-c", _TALKATIVE, *arguments], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0
        assert bool(re.search(r"^verify: [\d,.]+ bytes of [\d,.]+ bytes(, about \d+ s left)?$", done.stderr, re.M)) == (
            not quiet
        )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_the_command_on_a_terminal(vector):
    import fcntl
    import os
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # without a width nothing is drawn
    command = [sys.executable, "-c", _TALKATIVE, "verify", vector("whole.bstk")]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, timeout=300)
    os.write(theirs, b".")  # so that there is something to read
    shown = os.read(ours, 2**16).decode()
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0 and "verify: " in shown and "left" not in shown and "%|" in shown
