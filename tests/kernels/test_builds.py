"""The kernels built by other compilers and for other C libraries, and installation without a compiler."""

import os
import platform
import shutil
import struct
import subprocess
import sys

import c_builds
import exact_samples
import numpy as np
import pytest

from bstack.kernels import exact
from bstack.kernels.matrix import OUTLIERS, SIGN, SPQR, TRELLIS, TRELLIS5, Matrix
from bstack.kernels.selftest import random_payload
from bstack.kernels.spqr import rank_of
from bstk.kinds import exact_low_bits

pytestmark = pytest.mark.slow

ON_ARM = platform.machine() in ("aarch64", "arm64")
ARM_COMPILER = shutil.which("cc" if ON_ARM else "aarch64-linux-gnu-gcc")
STACKS = [[(TRELLIS5, 2)] * 3, [(TRELLIS, 2)], [(SIGN, 2)], [(SPQR, rank_of(4, 32)), (OUTLIERS, 0), (TRELLIS5, 2)]]
EMULATOR = None if ON_ARM else shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def test_neon_gives_the_bits_of_the_portable_kernels(tmp_path):
    if ARM_COMPILER is None:
        pytest.skip("there is no compiler for 64-bit ARM (gcc-aarch64-linux-gnu)")
    c_builds.build(tmp_path / "agree", ARM_COMPILER, "-O2", "-static")
    if not ON_ARM and EMULATOR is None:
        pytest.skip("it compiles, and there is no emulator to run it (qemu-user-static)")
    c_builds.run([*filter(None, [EMULATOR]), tmp_path / "agree"], "neon")


def test_an_exact_chunk_gives_the_same_bits_on_arm(tmp_path):
    if ARM_COMPILER is None or not (ON_ARM or EMULATOR):
        pytest.skip("there is no compiler for 64-bit ARM, or no emulator (gcc-aarch64-linux-gnu, qemu-user-static)")
    c_builds.build(tmp_path / "restore", ARM_COMPILER, "-O2", "-static", main="restore.c")
    for number, kinds in enumerate(STACKS):
        blocks = [(k, r, random_payload(np.random.default_rng(number), 130, 96, k, r, 50)) for k, r in kinds]
        stack = Matrix.of(130, 96, blocks)
        bits = exact_samples.original(exact.predict(stack), "f32", number)
        payload = b"".join(exact.encode(stack, bits, "f32"))
        counts = np.frombuffer(payload, "<u4", 65)
        symbols = np.split(np.frombuffer(payload, np.int8, 130 * 96, 260 + 130), np.cumsum(counts[1:])[:-1])
        escapes = [int((some == -128).sum()) for some in symbols]
        shifts = [exact_low_bits(int(counts[0]), c) for c in range(64)]
        low = sum(k * (len(some) - e) for k, some, e in zip(shifts, symbols, escapes, strict=True))
        given = struct.pack("<3I", 130, 96, len(blocks))
        given += b"".join(struct.pack("<3I", k, r, len(raw)) + raw for k, r, raw in blocks)
        given += struct.pack("<I", len(payload)) + payload + struct.pack("<2I", low, sum(escapes))
        command = [*filter(None, [EMULATOR]), tmp_path / "restore"]
        found = subprocess.run(command, input=given, capture_output=True, timeout=300, check=True).stdout
        assert found == bits.tobytes()


def test_kernels_build_and_agree_with_musl(tmp_path):
    compiler = shutil.which("musl-gcc")
    if compiler is None:
        pytest.skip("there is no compiler for musl (musl-tools)")
    c_builds.build(tmp_path / "agree", compiler, "-O0", "-static")  # what is looked for is the library
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
