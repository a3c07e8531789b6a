"""Choosing the C kernels: environment variables, self-test, what is said when they are missing."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

from bstack.kernels import native, selftest
from bstack.kernels.native import CHOICES, library

built = pytest.mark.skipif(library() is None, reason="the C kernels are not built, or not wanted")
SHOW = "from bstack.kernels.native import instructions, library; print(instructions(), library() and library().bstack_threads())"


def run(script, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BSTACK_")}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**clean, **environment})


@pytest.mark.parametrize("name", CHOICES)
def test_the_variable_chooses(name):
    done = run(SHOW, BSTACK_KERNELS=name)
    if name == "reference" or (library() is not None and library().bstack_offers(name.encode()) == 0):
        assert done.stdout.split()[0] == name
    else:
        assert f"BSTACK_KERNELS is '{name}'" in done.stderr


def test_without_the_variables_the_best_and_every_cpu():
    best = next(
        (n for n in reversed(CHOICES[1:]) if library() is not None and library().bstack_offers(n.encode()) == 0), None
    )
    expected = [best, str(len(os.sched_getaffinity(0)))] if best else ["reference", "None"]
    assert run(SHOW).stdout.split() == expected


@built
def test_number_of_threads():
    assert run(SHOW, BSTACK_THREADS="3").stdout.split()[1] == "3"
    with pytest.raises(ValueError, match="allowed are 1 to 256"):
        native.set_threads(0)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BSTACK_KERNELS", "sse9"),
        ("BSTACK_KERNELS", "AVX2"),
        ("BSTACK_THREADS", "0"),
        ("BSTACK_THREADS", "257"),
        ("BSTACK_THREADS", "two"),
        ("BSTACK_THREADS", "-1"),
        ("BSTACK_THREADS", "\u0663"),
    ],
)
def test_a_value_that_makes_no_sense_is_an_error(variable, value):
    script = "import sys; from bstack.cli import main; main(['--version'])"
    done = run(script, **{variable: value, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 2
    assert f"Error: {variable} is " in done.stderr and "allowed are" in done.stderr and "Traceback" not in done.stderr


def test_a_choice_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: None)
    monkeypatch.setenv("BSTACK_KERNELS", "avx2")
    with pytest.raises(native.KernelError, match="not built"):
        native.library.__wrapped__()

    class Old:
        def bstack_use(self, name):
            return 2

        def bstack_offers(self, name):
            return 0 if name == b"portable" else 2

    monkeypatch.setattr(native, "_load", Old)
    with pytest.raises(native.KernelError, match="this CPU does not have; it has reference, portable"):
        native.library.__wrapped__()


def test_missing_kernels_are_said_aloud(monkeypatch):
    monkeypatch.delenv("BSTACK_KERNELS", raising=False)
    monkeypatch.setattr(selftest, "library", lambda: None)
    with pytest.warns(RuntimeWarning, match="not built. Install a C compiler"):
        assert selftest.trusted_library.__wrapped__() is None


@built
@pytest.mark.parametrize("broken", ["multiply", "decode_rows"])
def test_kernels_that_fail_the_self_test_are_not_used(monkeypatch, broken):
    monkeypatch.setattr(selftest.reference, broken, lambda *_: np.zeros(1))
    with pytest.warns(RuntimeWarning, match="failed their self-test"):
        assert selftest.trusted_library.__wrapped__() is None


@built
@pytest.mark.parametrize("row", [0, 7, 33, 70])
@pytest.mark.parametrize("token", [0, 4])
def test_a_single_wrong_result_fails_the_self_test(row, token):
    """Also in a row or for a token that only the widest loops reach."""

    class Wrong:
        def bstack_multiply(self, matrices, count, x, tokens, y):
            native.library().bstack_multiply(matrices, count, x, tokens, y)
            results = (ctypes.c_float * (tokens * selftest.ROWS)).from_address(y[0])
            results[token * selftest.ROWS + row] += 1

    assert selftest._failure(native.library()) == ""
    assert selftest._failure(Wrong()).startswith("a product with a trellis block")


def test_the_reference_on_request_is_no_reason_to_warn():
    script = "from bstack.kernels.selftest import trusted_library\nassert trusted_library() is None"
    done = run(script, BSTACK_KERNELS="reference", PYTHONWARNINGS="error::RuntimeWarning")
    assert done.returncode == 0, done.stderr
