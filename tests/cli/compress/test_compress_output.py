"""``bstack compress``: where the output and the work go, and disks that are full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def small_disk(size: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run bstack with `folder` on a disk of its own, seen by that process alone; skip where the system does not allow it."""
    folder.mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size={size} none "$0" && cd "$0"'
    try:
        allowed = subprocess.run(["unshare", "-rm", "sh", "-c", mount, folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare command to mount a small disk with")
    if allowed.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    script = mount + '; "$@"; code=$?; ls -A >&2; exit $code'
    command = [sys.executable, "-m", "bstack", *map(str, arguments)]
    return subprocess.run(["unshare", "-rm", "sh", "-c", script, folder, *command], capture_output=True, text=True)


# Full while the tokenizer is kept, at the sensitivities, in the layers.
@pytest.mark.parametrize("size", ["16k", "48k", "128k"])
def test_full_disk(size, tiny_llama, tmp_path):
    done = small_disk(size, tmp_path, "compress", tiny_llama, "-o", "out.bstk", "-q", *QUICK, "--planes", 6)
    assert (done.returncode, done.stdout) == (7, ""), done.stderr
    assert "No space left" in done.stderr and "Free some space" in done.stderr and "Traceback" not in done.stderr


def test_full_disk_at_the_very_end(run, tiny_llama, tmp_path):
    """The blocks fit once, but not twice, in the work directory and in the output."""
    arguments = [tiny_llama, "-o", "out.bstk", "-q", *QUICK, "--planes", 16]
    assert run(*arguments)[0] == 0
    size = f"{(tmp_path / 'out.bstk').stat().st_size * 2 // 1024}k"
    done = small_disk(size, tmp_path / "disk", "compress", *arguments)
    assert (done.returncode, done.stdout) == (7, ""), done.stderr
    assert "out.bstk: cannot write: No space left" in done.stderr
    # Kept for the run that follows, and no half of an output.
    assert done.stderr.endswith("\nout.bstk.work\n")
