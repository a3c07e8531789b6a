import json

import pytest


@pytest.mark.parametrize(
    ("name", "state", "chunks"), [("whole", "whole", 8), ("sealed", "sealed", 6), ("smallest", "sealed", 5)]
)
def test_good(bstack, vector, name, state, chunks):
    path = vector(f"{name}.bstk")
    done = bstack("verify", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"good ({state}): all {chunks} chunks" in done.stdout and "root e5c7c759bf12d750" in done.stdout
    found = json.loads(bstack("verify", "--json", path).stdout)
    assert (found["schema"], found["ok"], found["chunks"], found["state"]) == ("bstack.verify/1", True, chunks, state)


def test_partial(bstack, vector):
    path = vector("partial-with-tail.bstk")
    done = bstack("verify", path)
    assert done.returncode == 0 and "good (partial)" in done.stdout and "Warning" in done.stderr
    done = bstack("verify", "--strict", path)
    assert (done.returncode, done.stdout) == (3, "")


def test_names_the_first_damaged_chunk(bstack, vector):
    path = vector("chunk-flip.bstk")
    done = bstack("verify", path)
    assert (done.returncode, done.stdout) == (5, "")
    assert "sign 'layers.0.up' level 2 at offset 19" in done.stderr and "SHA-256 does not match" in done.stderr
    done = bstack("verify", "--json", path)
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 5 and not found["ok"]
    assert (found["chunk"]["name"], found["chunk"]["level"]) == ("layers.0.up", 2)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("bad-html", 4),
        ("bad-incompatible-flag-63", 4),
        ("bad-wrong-crc", 5),
        ("bad-frame-and-a-byte", 5),
        ("bad-sealed-elsewhere", 5),
    ],
)
def test_bad_files(bstack, vector, name, code):
    done = bstack("verify", vector(f"{name}.bstk"))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
