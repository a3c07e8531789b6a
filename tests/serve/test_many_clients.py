"""32 clients at once for some seconds; tests/serve/many_clients.py as a script runs them for minutes."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from many_clients import Load

pytestmark = pytest.mark.slow


def test_many_clients(start):
    server = start("--queue", "40", "--cache-mb", "16")
    load = Load(server.url)
    load.run(8, every=1.5)
    assert not load.faults, load.faults[:3]
    assert load.done["compared"] > 5 and load.done["left"] and load.done["garbage"]
    deadline = time.monotonic() + 30
    while b"bstack_texts_running 0.0" not in load.request("GET", "/metrics")[1]:
        assert time.monotonic() < deadline
    assert [load.answer(prompt) for prompt in load.prompts] == load.wanted
    assert json.loads(load.request("GET", "/health")[1])["status"] == "ok"
    assert server.stop() == 0 and "Traceback" not in server.log, server.log
