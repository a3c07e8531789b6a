"""``bstack compress``: where the output and the work go, and disks that are full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import in_process
import pytest
import tiny_gguf
from compressing import QUICK

import bstk

pytestmark = pytest.mark.slow


def test_output_in_a_folder_that_is_not_there(run, tiny_llama):
    code, _, err = run(tiny_llama, "-o", "no/such/out.bstk", *QUICK)
    assert code == 1 and "the folder" in err and "does not exist. Create it" in err


def test_output_that_is_a_folder(run, tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, err = run(tiny_llama, "-o", "out", *QUICK)
    assert code == 1 and "out: not a regular file. Name a file to write to." in err


def test_output_that_cannot_be_written(run, tiny_llama, tmp_path):
    target = tmp_path / "closed"
    target.mkdir(mode=0o555)
    if os.access(target, os.W_OK):  # a superuser may write everywhere but into the kernel
        target = Path("/proc/self")
        if not target.is_dir():
            pytest.skip("no folder that this user may not write to")
    code, _, err = run(tiny_llama, "-o", target / "out.bstk", *QUICK)
    assert code == 1 and f"{target}: cannot write: " in err


def test_existing_output_needs_force(run, model, tmp_path):
    (tmp_path / "out.bstk").write_text("precious")
    code, _, err = run("model", "-o", "out.bstk", *QUICK)
    assert code == 2 and "the output exists" in err and "--force" in err
    assert (tmp_path / "out.bstk").read_text() == "precious"
    # A forced run that fails leaves the old output where it was.
    assert run("nothing", "-o", "out.bstk", "--force", *QUICK)[0] == 2
    assert (tmp_path / "out.bstk").read_text() == "precious"
    assert run("model", "-o", "out.bstk", "--force", *QUICK)[0] == 0
    with bstk.open(tmp_path / "out.bstk", strict=True) as file:
        assert len(file.chunks) > file.base_count


def test_the_model_is_never_its_own_output(run, tmp_path):
    before = tiny_gguf.write(tmp_path / "model.gguf").read_bytes()
    code, _, err = run("model.gguf", "-o", "model.gguf", "--force", *QUICK)
    assert code == 2 and "is the model itself" in err
    assert (tmp_path / "model.gguf").read_bytes() == before


def test_work_directory_of_somebody_else(run, model, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("all of it")
    code, _, err = run("model", "-o", "out.bstk", "--work-dir", "work", *QUICK)
    assert code == 2 and "not a work directory of bstack" in err and "thesis.tex" in err
    assert (tmp_path / "work" / "thesis.tex").read_text() == "all of it"


# One process for all disks: importing torch takes seconds.
ON_EACH = """
import contextlib, io, json, os, sys
from bstack.cli import main
home, ended = os.getcwd(), []
for disk, *arguments in json.loads(sys.argv[1]):
    os.chdir(os.path.join(home, disk))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main(arguments, prog_name="bstack")
        except SystemExit as end:
            code = end.code
    ended.append([code, out.getvalue(), err.getvalue(), sorted(os.listdir())])
print(json.dumps(ended))
"""


def on_small_disks(folder: Path, commands: dict[str, list]) -> dict[str, tuple[int, str, str, list[str]]]:
    """Run bstack commands, each on a disk of the size it is given, seen by that process alone: size -> what it came to.

    Skip where the system does not allow it.
    """
    mount = 'cd "$0" && for size in {}; do mkdir -p $size && mount -t tmpfs -o size=$size none $size; done'
    mount = mount.format(" ".join(commands))
    try:
        allowed = subprocess.run(["unshare", "-rm", "sh", "-e", "-c", mount, folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare command to mount a small disk with")
    if allowed.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    task = json.dumps([[size, *map(str, command)] for size, command in commands.items()])
    process = [sys.executable, "-c", ON_EACH, task]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-e", "-c", mount + '; exec "$@"', folder, *process], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


# Full while the tokenizer is kept, at the sensitivities, in the layers.
SIZES = ["16k", "48k", "128k"]


@pytest.fixture(scope="module")
def full(tiny_llama, tmp_path_factory):
    """What came to an end on disks of these sizes, and on one that holds the blocks once, but not twice."""
    folder = tmp_path_factory.mktemp("disks")
    deep = ["compress", tiny_llama, "-o", "out.bstk", "-q", *QUICK, "--planes", 16]
    assert in_process.bstack(*deep, cwd=folder).returncode == 0
    last = f"{(folder / 'out.bstk').stat().st_size * 2 // 1024}k"
    shallow = ["compress", tiny_llama, "-o", "out.bstk", "-q", *QUICK, "--planes", 6]
    found = on_small_disks(folder, {**dict.fromkeys(SIZES, shallow), last: deep})
    return {**found, "last": found[last]}


@pytest.mark.parametrize("size", SIZES)
def test_full_disk(full, size):
    code, out, err, left = full[size]
    assert (code, out) == (7, ""), err
    assert "No space left" in err and "Free some space" in err and "Traceback" not in err
    assert "out.bstk" not in left


def test_full_disk_at_the_very_end(full):
    """The blocks fit once, but not twice, in the work directory and in the output."""
    code, out, err, left = full["last"]
    assert (code, out) == (7, ""), err
    assert "out.bstk: cannot write: No space left" in err
    # Kept for the run that follows, and no half of an output.
    assert left == ["out.bstk.work"]
