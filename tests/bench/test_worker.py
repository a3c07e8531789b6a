"""What a measuring process says of an error that ends it."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# One process for all errors: starting one takes seconds.
WORKER = """
import os, sys
from bstack.bench import worker
def fail(request, step): raise eval(error)
worker.read_request = lambda text: None
worker.answer = fail
out = os.dup(1)
for error in sys.argv[1:]:
    os.dup2(out, 1)
    worker.main()
    print("NEXT", file=sys.stderr, flush=True)
"""
ERRORS = [
    ("OSError(28, 'No space left on device', 'x.ref')", "x.ref: No space left on device.", 7, None),
    ("PermissionError(13, 'Permission denied')", "Permission denied.", 1, None),
    ("MemoryError()", "not enough memory.", 7, None),
    ("worker.bstk.DamagedError('it is broken.')", "it is broken.", 5, None),
    ("worker.bstk.UsageError('no.', option='code')", "no.", 2, "code"),
    ("ValueError(3)", "ValueError: 3", None, None),
]


@pytest.fixture(scope="module")
def said():
    """Error -> the process's answers, and its standard error."""
    command = [sys.executable, "-c", WORKER, *(error for error, *_ in ERRORS)]
    done = subprocess.run(command, input="{}", capture_output=True, text=True, check=True)
    answers, logs = done.stdout.splitlines(), done.stderr.split("NEXT\n")
    assert len(answers) == len(logs) - 1 == len(ERRORS) and not logs[-1]
    return {error: each for (error, *_), *each in zip(ERRORS, answers, logs, strict=False)}


@pytest.mark.parametrize(("error", "message", "code", "option"), ERRORS)
def test_errors_arrive_in_words_with_a_code(said, error, message, code, option):
    answer, log = said[error]
    assert json.loads(answer) == {"error": {"message": message, "exit_code": code, "option": option}}
    # A traceback is for what nobody foresaw.
    assert ("Traceback" in log) == (code is None)
