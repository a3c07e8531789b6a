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
    ("error", "message", "code"),
    [
        ("OSError(28, 'No space left on device', 'x.ref')", "x.ref: No space left on device.", 7),
        ("PermissionError(13, 'Permission denied')", "Permission denied.", 1),
        ("MemoryError()", "not enough memory.", 7),
        ("worker.bstk.DamagedError('it is broken.')", "it is broken.", 5),
        ("ValueError(3)", "ValueError: 3", None),
    ],
)
def test_errors_arrive_in_words_with_a_code(error, message, code):
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(error)], input="{}", capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"error": {"message": message, "exit_code": code}}
    # A traceback is for what nobody foresaw.
    assert ("Traceback" in done.stderr) == (code is None)
