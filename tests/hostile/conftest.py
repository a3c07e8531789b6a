from contextlib import ExitStack

import pytest

# The named bad files, and the server of the tests of URLs.
import samples
from range_server import RangeServer


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> bytes:
    """The bytes of a small good file."""
    return samples.write(tmp_path_factory.mktemp("good") / "good.bstk")


@pytest.fixture
def serve(monkeypatch):
    """Start a server: ``serve(data, attribute=value)``."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("bstk.http.FIRST_DELAY", 0.001)
    with ExitStack() as servers:
        yield lambda data, **attributes: servers.enter_context(RangeServer(data, **attributes))
