"""The kernels built by other compilers and for other C libraries, and installation without a compiler."""

import os
import platform
import shutil
import subprocess
import sys

import c_builds
import pytest

pytestmark = pytest.mark.slow

ON_ARM = platform.machine() in ("aarch64", "arm64")
ARM_COMPILER = shutil.which("cc" if ON_ARM else "aarch64-linux-gnu-gcc")
EMULATOR = None if ON_ARM else shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def test_neon_gives_the_bits_of_the_portable_kernels(tmp_path):
    if ARM_COMPILER is None:
        pytest.skip("there is no compiler for 64-bit ARM (gcc-aarch64-linux-gnu)")
    c_builds.build(tmp_path / "agree", ARM_COMPILER, "-O2", "-static")
    if not ON_ARM and EMULATOR is None:
        pytest.skip("it compiles, and there is no emulator to run it (qemu-user-static)")
    c_builds.run([*filter(None, [EMULATOR]), tmp_path / "agree"], "neon")


def test_kernels_build_and_agree_with_musl(tmp_path):
    compiler = shutil.which("musl-gcc")
    if compiler is None:
        pytest.skip("there is no compiler for musl (musl-tools)")
    c_builds.build(tmp_path / "agree", compiler, "-O2", "-static")
    c_builds.run([tmp_path / "agree"])


def test_only_glibc_builds_a_function_for_several_cpus():
    """Other C libraries lack what the loader needs for it; this holds also where there is no compiler for one."""
    files = {path.name: path.read_text() for path in (c_builds.ROOT / "csrc").iterdir()}
    assert [name for name, text in files.items() if "target_clones" in text] == ["kernels.h"]
    before = files["kernels.h"].partition("target_clones")[0]
    assert "__GLIBC__" in before.rpartition("#if")[2]


def test_installation_warns_where_the_kernels_cannot_be_built(tmp_path):
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "csrc", "bstack", "format"):
        (tmp_path / name).symlink_to(c_builds.ROOT / name)
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        tmp_path / "temp",
        "--build-lib",
        tmp_path / "lib",
    ]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "CC": "false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING: the C kernels could not be built" in done.stderr
    assert not list((tmp_path / "lib").rglob("_native*"))
