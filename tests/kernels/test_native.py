"""Choosing the C kernels: environment variables, self-test, what is said when they are missing."""

import ctypes
import functools
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from bstack.cli import main
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


def test_a_choice_that_is_not_there_is_an_error(afresh, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: None)
    monkeypatch.setenv("BSTACK_KERNELS", "avx2")
    with pytest.raises(native.UsageError, match="not built"):
        afresh()

    class Old:
        def bstack_use(self, name):
            return 2

        def bstack_offers(self, name):
            return 0 if name == b"portable" else 2

    monkeypatch.setattr(native, "_load", Old)
    with pytest.raises(native.UsageError, match="this CPU does not have; it has reference, portable"):
        afresh()


@pytest.fixture
def afresh(monkeypatch):
    """The choice of kernels as at the start of a process, with nothing asked for; afterwards as it was."""
    for variable in (native.VARIABLE, native.THREADS):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(native, "_choose", functools.cache(native._choose.__wrapped__))
    return native.library.__wrapped__


def test_missing_kernels_are_reported(afresh, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: None)
    with pytest.warns(RuntimeWarning, match="not built. Install a C compiler"):
        assert afresh() is None


def version(monkeypatch):
    return CliRunner().invoke(main, ["--version"]).output


def test_the_version_says_that_kernels_are_missing(afresh, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: None)
    words = "kernels: reference, some hundred times slower than C: The C kernels are not built. Install a C compiler"
    assert words in version(monkeypatch)


BROKEN = {
    "bstack_multiply": "a product with a trellis block",
    "bstack_decode_rows": "a decoded trellis block",
    "bstack_lookup": "a row looked up in a trellis block",
    "bstack_multiply_decoded": "a product for many tokens",
    "bstack_multiply_dense": "a product for many tokens",
    "bstack_trellis_encode": "an encoded trellis5 block",
    "bstack_decoder_step": "a step of the decoder",
}


class Broken:
    """The library without one of its functions: whoever calls it finds the results as they were before."""

    def __init__(self, function):
        self._function = function

    def __getattr__(self, name):
        return (lambda *_: 0) if name == self._function else getattr(native.library(), name)


@built
@pytest.mark.parametrize("function", BROKEN)
def test_kernels_that_fail_the_self_test_are_neither_used_nor_named(afresh, monkeypatch, function):
    whole = native.library()
    monkeypatch.setattr(native, "_load", lambda: Broken(function))
    monkeypatch.setattr(native, "library", lambda: whole)
    with pytest.warns(RuntimeWarning, match=f"failed their self-test: {BROKEN[function]} differs"):
        assert afresh() is None
    assert native.instructions() == "reference"
    assert "kernels: reference," in version(monkeypatch) and "failed their self-test" in version(monkeypatch)


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

    assert selftest.failure(native.library()) == ""
    assert selftest.failure(Wrong()).startswith("a product with a trellis block")


@built
@pytest.mark.parametrize("function", ["multiply", "decode_rows", "lookup", "encode_columns"])
def test_the_self_test_asks_the_reference(monkeypatch, function):
    monkeypatch.setattr(selftest.reference, function, lambda *_: np.zeros(1))
    assert selftest.failure(native.library())


def test_the_reference_on_request_is_no_reason_to_warn():
    script = "from bstack.kernels.native import library\nassert library() is None"
    done = run(script, BSTACK_KERNELS="reference", PYTHONWARNINGS="error::RuntimeWarning")
    assert done.returncode == 0, done.stderr
