"""Files to serve, two of them as fixtures for the conftest.py of each folder that serves them."""

import hashlib

import pytest

import bstk


def make(path, head=0, blocks=30, seed="a"):
    """Write a file with `blocks` blocks of some 3 KB beside its base, and about `head` bytes of metadata."""

    def noise(what, length):
        return b"".join(hashlib.sha256(f"{seed} {what} {i}".encode()).digest() for i in range(-(-length // 32)))[
            :length
        ]

    def sign(name, level):
        raw = noise(f"{name} {level}", 64 * 32 + 2 * 2 * (64 + 256))
        frame = bstk.pack(raw)
        return bstk.Entry(
            name=name,
            kind=bstk.SIGN,
            raw_length=len(raw),
            stored_length=frame.stored_length,
            digest=frame.digest,
            stored=frame.stored,
            level=level,
            shape=(64, 256),
            dtype="f16",
            rank=2,
            importance=9.0 - level,
            error=0.5,
        )

    names = ["a", "b", "c"]
    entries = [sign(name, level) for level in range(1 + blocks // 3) for name in names]
    bstk.write(path, {"model": {"name": "toy"}, "notes": "x" * head}, entries, len(names))
    return path.read_bytes()


def cut_sizes(data):
    """The budget in megabytes of each cut of a file, in bytes `data`, but the complete one."""
    with bstk.open(data) as file:
        return [chunk.end / bstk.MB for chunk in file.chunks[file.base_count - 1 : -1]]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A file of some 100 KB whose header comes with the first request."""
    return make(tmp_path_factory.mktemp("model") / "model.bstk")


@pytest.fixture(scope="session")
def long_head(tmp_path_factory):
    """A file whose header is longer than the first request."""
    return make(tmp_path_factory.mktemp("model") / "model.bstk", head=100_000)
