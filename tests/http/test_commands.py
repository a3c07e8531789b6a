"""The commands on URLs: what they print, the code they end with, and that stopped ones go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
from served_files import cut_sizes

import bstk

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path):
    """Start the installed command in an empty folder: ``command("inspect", url)`` -> Popen."""
    installed = shutil.which("bstack", path=sysconfig.get_path("scripts"))
    start = [installed] if installed else [sys.executable, "-m", "bstack"]
    running = []

    def run(*args):
        process = subprocess.Popen(
            [*start, *map(str, args)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONUTF8": "1"},
            # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
            preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def bstack(command):
    """Run the command to its end -> (code, stdout, stderr)."""

    def run(*args):
        process = command(*args)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


def test_truncate_and_verify(bstack, long_head, serve, tmp_path):
    server = serve(long_head)
    mb = f"{cut_sizes(long_head)[9]:.9f}"
    code, out, err = bstack("truncate", server.url + "?key=secret", "--mb", mb, "-o", "out.bstk")
    assert (code, err) == (0, "") and "out.bstk: 0." in out and "kept" in out
    assert len(server.asked) == 3
    with bstk.open(long_head) as file:
        root = file.root.hex()
    assert bstack("inspect", "--root", server.url)[:2] == (0, root + "\n")
    assert bstack("verify", "--strict", "--root", root.upper(), "out.bstk")[0] == 0
    code, out, _ = bstack("truncate", server.url + "?key=secret", "--mb", mb, "-o", "out.bstk", "--force", "--json")
    found = json.loads(out)
    assert (found["input"], found["output"], found["dry_run"]) == (server.url, "out.bstk", False)
    assert found["file_bytes"] == (tmp_path / "out.bstk").stat().st_size


def test_dry_run_and_inspect_read_the_header_alone(bstack, long_head, serve, tmp_path):
    server = serve(long_head)
    with bstk.open(long_head) as file:
        header = file.preamble.header_length
    for args in (("inspect",), ("inspect", "--json"), ("truncate", "--mb", "0.15", "--dry-run")):
        server.asked.clear()
        code, out, err = bstack(*args, server.url)
        assert (code, err) == (0, "") and out and server.sent == header and len(server.asked) == 2
    assert server.url in bstack("inspect", server.url)[1]
    assert os.listdir(tmp_path) == []


def test_grow(bstack, model, serve, tmp_path):
    server = serve(model)
    sizes = [f"{size:.9f}" for size in cut_sizes(model)]
    assert bstack("truncate", server.url, "--mb", sizes[4], "-o", "small.bstk")[0] == 0
    code, out, err = bstack("grow", "small.bstk", "--mb", sizes[8], "--from", server.url)
    assert (code, err) == (0, "") and "small.bstk: " in out and " bytes as a file" in out and "added" in out
    found = json.loads(bstack("grow", "small.bstk", "--mb", "1000", "--from", server.url, "--json")[1])
    assert (found["schema"], found["file_bytes"], found["blocks"]) == (
        "bstack.grow/1",
        len(model),
        found["blocks_total"],
    )
    assert (tmp_path / "small.bstk").read_bytes() == model
    code, out, err = bstack("grow", "small.bstk", "--mb", "1000", "--from", server.url)
    assert (code, out) == (2, "") and "nothing to add" in err
    (tmp_path / "partial.bstk").write_bytes(model[:-9])
    assert bstack("truncate", server.url, "--mb", sizes[4], "-o", "small.bstk", "--force")[0] == 0
    code, out, err = bstack("grow", "small.bstk", "--mb", "1000", "--from", "partial.bstk", "--in-place")
    assert code == 0 and "Warning: partial.bstk: the file is partial" in err
    assert "Note: grow always changes FILE itself, so --in-place has no effect." in err


def test_failures(bstack, model, other, serve, tmp_path):
    server = serve(model)
    (tmp_path / "small.bstk").write_bytes(other)
    for args, code, words in (
        (("truncate", server.url, "--mb", 1, "--in-place"), 2, "cannot be cut in place"),
        (("truncate", server.url, "--mb", 1), 2, "-o OUT"),
        (("truncate", server.url, "--mb", "0.001", "-o", "out.bstk"), 6, "smallest budget"),
        (("truncate", server.url, "--mb", 1, "-o", "small.bstk"), 2, "--force"),
        (("truncate", server.url, "--mb", 1, "-o", "none/out.bstk"), 1, "none/out.bstk: cannot write: the folder"),
        (("truncate", server.url, "--mb", 1, "-o", ""), 2, "name of the output is empty"),
        (
            ("truncate", server.url, "--mb", 1, "-o", "https://h/x.bstk"),
            2,
            "https://h/x.bstk: an output is a file on disk",
        ),
        (("inspect", "ftp://127.0.0.1/x.bstk"), 2, "ftp:// is not read. URLs begin with https://"),
        (("inspect", "file:///none.bstk"), 2, "file:// is not read. Give the path alone, /none.bstk"),
        (("grow", "ftp://127.0.0.1/x.bstk", "--mb", 1, "--from", server.url), 2, "takes a file on disk, not a URL"),
        (("truncate", "http://127.0.0.1:1/x", "--mb", 1, "-o", "out.bstk"), 1, "cannot be reached"),
        (("grow", "small.bstk", "--mb", 1, "--from", server.url), 2, "another model"),
        (("grow", "none.bstk", "--mb", 1, "--from", server.url), 2, "does not exist"),
        (("verify", server.url), 2, "Fetch it first: bstack truncate"),
        (("verify", "small.bstk", "--root", "12"), 2, "64 hexadecimal digits"),
        (("verify", "small.bstk", "--root", "0" * 64), 5, "another model, or somebody changed it"),
        (("inspect", server.url, "--root", "--json"), 2, "--root prints the root digest alone"),
    ):
        found, out, err = bstack(*args)
        assert (found, out) == (code, "") and words in err, args
    server.statuses = [404]
    assert bstack("inspect", server.url)[0] == 2
    server.statuses = [403]
    assert bstack("inspect", server.url)[0] == 1
    assert sorted(os.listdir(tmp_path)) == ["small.bstk"] and (tmp_path / "small.bstk").read_bytes() == other


def until(condition):
    """Wait for something another process does."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_stopped_truncate_goes_on(bstack, command, long_head, serve, tmp_path, kind):
    server = serve(long_head, pause=0.05)
    arguments = ("truncate", server.url, "--mb", 1, "-o", "out.bstk")
    process = command(*arguments)
    part = tmp_path / "out.bstk.part"
    until(lambda: part.exists() and part.stat().st_size > 120_000)
    process.send_signal(kind)
    _, err = process.communicate()
    if kind == signal.SIGINT:
        assert process.returncode == 75 and "same command again to continue" in err
    kept = part.stat().st_size
    assert 120_000 < kept < len(long_head) and not (tmp_path / "out.bstk").exists()
    server.pause = 0
    server.asked.clear()
    assert bstack(*arguments)[0] == 0
    assert server.ranges_asked()[-1] == (kept, len(long_head) - 1)
    assert (tmp_path / "out.bstk").read_bytes() == long_head and not part.exists()


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_stopped_grow_goes_on(bstack, command, long_head, serve, tmp_path, kind):
    server = serve(long_head)
    assert bstack("truncate", server.url, "--mb", f"{cut_sizes(long_head)[0]:.9f}", "-o", "small.bstk")[0] == 0
    small, server.pause = tmp_path / "small.bstk", 0.05
    arguments = ("grow", "small.bstk", "--mb", 1, "--from", server.url)
    process = command(*arguments)
    until(lambda: small.stat().st_size > 130_000)
    process.send_signal(kind)
    _, err = process.communicate()
    assert process.returncode == (75 if kind == signal.SIGINT else -9) and bool(err) == (kind == signal.SIGINT)
    kept, server.pause = small.stat().st_size, 0
    code, out, err = bstack("verify", "small.bstk")
    assert code == 0 and "good (partial)" in out and "Warning" in err
    assert bstack(*arguments)[0] == 0 and small.read_bytes() == long_head
    assert server.ranges_asked()[-1] == (kept, len(long_head) - 1)
    assert os.listdir(tmp_path) == ["small.bstk"]


def test_the_second_download_to_one_output_is_refused(bstack, command, long_head, serve, tmp_path):
    server = serve(long_head, then={2: {"pause": 0.1}, 3: {"pause": 0}})  # the blocks for the first come slowly
    arguments = ("truncate", server.url, "--mb", 1, "-o", "out.bstk")
    first = command(*arguments)
    part = tmp_path / "out.bstk.part"
    until(lambda: part.exists() and part.stat().st_size > 110_000)
    code, _, err = bstack(*arguments)
    assert code == 2 and "another process is writing this file" in err
    assert first.wait() == 0 and (tmp_path / "out.bstk").read_bytes() == long_head


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_appears_during_a_download(bstack, command, long_head, serve, tmp_path, force):
    server = serve(long_head, pause=0.02)
    out, part = tmp_path / "out.bstk", tmp_path / "out.bstk.part"
    process = command("truncate", server.url, "--mb", 1, "-o", "out.bstk", *["--force"] * force)
    until(lambda: part.exists() and part.stat().st_size > 110_000)
    out.write_text("of somebody else")
    _, err = process.communicate()
    if force:
        assert process.returncode == 0 and out.read_bytes() == long_head
    else:
        assert process.returncode == 2 and "the output exists" in err and out.read_text() == "of somebody else"


def test_retries_are_lines_where_there_is_no_terminal(bstack, long_head, serve):
    server = serve(long_head, statuses=[503, 0, 0, 0], drop_after=80_000, drops=1)
    code, _, err = bstack("truncate", server.url, "--mb", 1, "-o", "out.bstk")
    assert code == 0
    shown = err.splitlines()
    assert shown[0] == f"{server.url}: the server answers 503; retry 1 of 5 in 0.5 s"
    assert len(shown) == 2 and "the connection broke off" in shown[1]
    server.statuses = [503]
    assert bstack("inspect", server.url, "-q")[2] == ""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_retries_are_shown_on_a_terminal(long_head, serve, tmp_path):
    import pty
    import termios

    server = serve(long_head, statuses=[503, 0, 0, 0], drop_after=80_000, drops=1, pause=0.002)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    process = subprocess.Popen(
        [sys.executable, "-m", "bstack", "truncate", server.url, "--mb", "1", "-o", tmp_path / "out.bstk"],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # the end of a terminal
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"the server answers 503; retry 1 of 5 in 0.5 s" in shown and b"the connection broke off" in shown
