import hashlib
import shutil
from pathlib import Path

import bstk
import pytest
from range_server import RangeServer


def make(path, head=0, blocks=30, seed="a"):
    """Write a file with `blocks` blocks of some 3 KB beside its base, and about `head` bytes of metadata."""

    def noise(what, length):
        return b"".join(hashlib.sha256(f"{seed} {what} {i}".encode()).digest() for i in range(-(-length // 32)))[:length]

    def sign(name, level):
        raw = noise(f"{name} {level}", 64 * 32 + 2 * 2 * (64 + 256))
        frame = bstk.pack(raw)
        return bstk.Entry(
            name=name, kind=bstk.SIGN, raw_length=len(raw), stored_length=frame.stored_length, digest=frame.digest,
            stored=frame.stored, level=level, shape=(64, 256), dtype="f16", rank=2, importance=9.0 - level, error=0.5,
        )  # fmt: skip

    names = ["a", "b", "c"]
    entries = [sign(name, level) for level in range(1 + blocks // 3) for name in names]
    bstk.write(path, {"model": {"name": "toy"}, "notes": "x" * head}, entries, len(names))
    return path.read_bytes()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A file of some 100 KB whose header comes with the first request."""
    return make(tmp_path_factory.mktemp("model") / "model.bstk")


@pytest.fixture(scope="session")
def long_head(tmp_path_factory):
    """A file whose header is longer than the first request."""
    return make(tmp_path_factory.mktemp("model") / "model.bstk", head=100_000)


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
    running = []

    def start(data, **attributes):
        server = RangeServer(data, **attributes)
        running.append(server)
        return server.__enter__()

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    """No waiting between attempts, and nothing of the surroundings: proxies, netrc, tokens, caches."""
    home = tmp_path_factory.mktemp("home")
    for name, value in {"NO_PROXY": "*", "HOME": home, "XDG_CACHE_HOME": home / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("HF_TOKEN", "HF_ENDPOINT", "NETRC", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("bstk.http.FIRST_DELAY", 0.001)


def cut_sizes(data):
    """The budget in megabytes of each cut."""
    with bstk.open(data) as file:
        return [bstk.Cut(n, file.all_chunks[n - 1].end, 0).file_bytes / bstk.MB for n in range(file.base_count, len(file.chunks))]
