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
    deadline = time.monotonic() + 300
    while load.done["compared"] <= 5 or not load.done["left"] or not load.done["garbage"]:
        load.run(5, every=1.5)
        assert not load.faults, load.faults[:3]
        assert time.monotonic() < deadline
    while b"bstack_texts_running 0.0" not in load.request("GET", "/metrics")[1]:
        assert time.monotonic() < deadline
    assert [load.answer(prompt) for prompt in load.prompts] == load.wanted
    assert json.loads(load.request("GET", "/health")[1])["status"] == "ok"
    assert server.stop() == 0 and "Traceback" not in server.log, server.log
