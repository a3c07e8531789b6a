"""Results kept between a stopped bench and the next."""

import math
import os
import time

import pytest
from bstack.measure.rows import KEPT_SECONDS, Rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bstack" / "bench"


def refuse():
    raise AssertionError("measured again")


def test_what_was_measured_is_found():
    assert Rows("a").get("x", lambda: {"value": math.inf}) == {"value": math.inf}
    again = Rows("a")
    assert again.get("x", refuse) == {"value": math.inf} and again.found == 1
    assert Rows("b").get("x", lambda: 2) == 2


def test_a_run_that_is_through_leaves_nothing(cache):
    rows = Rows("a")
    rows.get("x", lambda: 1)
    rows.finish()
    rows.finish()
    assert Rows("a").get("x", lambda: 2) == 2 and [p.name for p in cache.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", [b"", b"{\"x\": 1", b"[1]", b"\xff\xfe", b"null"])
def test_damaged_rows_are_measured_again(cache, damage):
    Rows("a").get("x", lambda: 1)
    (cache / "a.json").write_bytes(damage)
    assert Rows("a").get("x", lambda: 2) == 2


def test_a_failure_is_not_kept():
    rows = Rows("a")
    with pytest.raises(ZeroDivisionError):
        rows.get("x", lambda: 1 / 0)
    assert rows.get("x", lambda: 3) == 3


def test_old_runs_are_forgotten(cache):
    Rows("a").get("x", lambda: 1)
    old = time.time() - KEPT_SECONDS - 60
    os.utime(cache / "a.json", (old, old))
    Rows("b")
    assert not (cache / "a.json").exists()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    rows = Rows("a")
    assert rows.get("x", lambda: 1) == 1 and rows.get("x", refuse) == 1
    rows.finish()
