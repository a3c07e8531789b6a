"""The kernels for 64-bit ARM: compiled by a cross compiler, compared with the portable ones under emulation."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ON_ARM = platform.machine() in ("aarch64", "arm64")
COMPILER = shutil.which("cc" if ON_ARM else "aarch64-linux-gnu-gcc")
EMULATOR = None if ON_ARM else shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("there is no compiler for 64-bit ARM (gcc-aarch64-linux-gnu)")
    built = tmp_path_factory.mktemp("neon") / "neon"
    sources = [str(path) for path in (ROOT / "csrc").glob("*.c")]
    command = [
        COMPILER,
        "-O2",
        "-ffp-contract=off",
        "-static",
        "-I",
        ROOT / "csrc",
        ROOT / "tests" / "neon.c",
        *sources,
    ]
    done = subprocess.run([*command, "-o", built, "-lpthread", "-lm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


def test_neon_gives_the_bits_of_the_portable_kernels(program):
    if not ON_ARM and EMULATOR is None:
        pytest.skip("it compiles, and there is no emulator to run it (qemu-user-static)")
    done = subprocess.run([*filter(None, [EMULATOR]), program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "400 matrices agree\n"
