"""What a measuring process says of an error that ends it."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

WORKER = """
from bstack.bench import worker
def fail(request, step): raise {}
worker.read_request = lambda text: None
worker.answer = fail
worker.main()
"""


@pytest.mark.parametrize(
    ("error", "message", "code", "option"),
    [
        ("OSError(28, 'No space left on device', 'x.ref')", "x.ref: No space left on device.", 7, None),
        ("PermissionError(13, 'Permission denied')", "Permission denied.", 1, None),
        ("MemoryError()", "not enough memory.", 7, None),
        ("worker.bstk.DamagedError('it is broken.')", "it is broken.", 5, None),
        ("worker.bstk.UsageError('no.', option='code')", "no.", 2, "code"),
        ("ValueError(3)", "ValueError: 3", None, None),
    ],
)
def test_errors_arrive_in_words_with_a_code(error, message, code, option):
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(error)], input="{}", capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"error": {"message": message, "exit_code": code, "option": option}}
    # A traceback is for what nobody foresaw.
    assert ("Traceback" in done.stderr) == (code is None)
