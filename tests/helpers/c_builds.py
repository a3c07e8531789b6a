"""Builds tests/kernels/agree.c with the kernels' sources: a program that compares all instruction sets of a CPU."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(program, compiler, *flags, main="agree.c"):
    """Compile the program to a path, or fail with what the compiler said."""
    sources = [ROOT / "tests" / "kernels" / main, *sorted((ROOT / "csrc").glob("*.c"))]
    command = [compiler, "-ffp-contract=off", *flags, "-I", ROOT / "csrc", *sources, "-o", program, "-lpthread", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(program, *arguments, **options):
    """Run the program; it must find that all instruction sets agree."""
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=1200, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "400 matrices agree\n"
