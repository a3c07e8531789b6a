import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from range_server import RangeServer
from served_files import long_head, make, model  # noqa: F401 (fixtures)

import bstk


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model, as long as `model` to the byte."""
    return make(tmp_path_factory.mktemp("model") / "other.bstk", seed="b")


@pytest.fixture
def vector(tmp_path):
    """Copy a golden file and return its path."""
    return lambda name: Path(shutil.copy(Path(__file__).parents[2] / "format" / "vectors" / name, tmp_path / name))


@pytest.fixture
def serve():
    """Start a server: ``serve(data, attribute=value)``."""
    with ExitStack() as servers:
        yield lambda data, **attributes: servers.enter_context(RangeServer(data, **attributes))


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    """No waiting between attempts, and nothing of the surroundings: proxies, netrc, tokens, caches."""
    home = tmp_path_factory.mktemp("home")
    for name, value in {"NO_PROXY": "*", "HOME": home, "XDG_CACHE_HOME": home / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    hub = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_ENDPOINT")
    for name in (*hub, "NETRC", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("bstk.http.FIRST_DELAY", 0.001)


@pytest.fixture
def cut(tmp_path):
    """Cut bytes on disk: ``cut(data, mb)`` -> path."""

    def make_cut(data, mb, name="small.bstk"):
        (tmp_path / "source.bstk").write_bytes(data)
        bstk.truncate(tmp_path / "source.bstk", tmp_path / name, mb)
        return tmp_path / name

    return make_cut
