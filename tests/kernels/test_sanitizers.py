"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on blocks in memory of exactly their size."""

import os
import shutil
import subprocess

import c_builds
import pytest

pytestmark = pytest.mark.slow

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_no_access_out_of_bounds_and_nothing_undefined(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is neither GCC nor Clang")
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }")
    trial = [compiler, *SANITIZERS, tmp_path / "empty.c", "-o", tmp_path / "empty"]
    if subprocess.run(trial, capture_output=True).returncode or subprocess.run([tmp_path / "empty"]).returncode:
        pytest.skip(f"{compiler} has no sanitizers")
    c_builds.build(tmp_path / "agree", compiler, "-O0", "-g", *SANITIZERS)  # optimised, it compiles for a minute
    # Leaks are not looked for: the decoder of the test lives as long as the program.
    c_builds.run([tmp_path / "agree"], env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
