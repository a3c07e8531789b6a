"""Results kept between a stopped bench and the next."""

import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import bstk
from bstack.bench.options import Options
from bstack.bench.results import Measured
from bstack.bench.resume import KEPT_SECONDS, ResumeFile
from bstack.eval.estimates import Estimate

VECTORS = Path(__file__).parents[2] / "format" / "vectors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bstack" / "bench"


FIELDS = ("level", "shape", "dtype", "rank", "transposed")


def _entry(name, kind, raw, **fields):
    frame = bstk.pack(raw)
    return bstk.Entry(
        name=name,
        kind=kind,
        raw_length=len(raw),
        stored_length=frame.stored_length,
        digest=frame.digest,
        stored=frame.stored,
        **fields,
    )


def refuse():
    raise AssertionError("measured again")


def test_what_was_measured_is_found():
    assert ResumeFile("a").get("x", lambda: {"value": math.inf}) == {"value": math.inf}
    again = ResumeFile("a")
    assert again.get("x", refuse) == {"value": math.inf} and again.found == 1
    assert ResumeFile("b").get("x", lambda: 2) == 2


def test_a_run_that_is_through_leaves_nothing(cache):
    resume = ResumeFile("a")
    resume.get("x", lambda: 1)
    resume.delete()
    resume.delete()
    assert ResumeFile("a").get("x", lambda: 2) == 2 and [p.name for p in cache.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", [b"", b'{"x": 1', b"[1]", b"\xff\xfe", b"null"])
def test_damaged_resume_are_measured_again(cache, damage):
    ResumeFile("a").get("x", lambda: 1)
    (cache / "a.json").write_bytes(damage)
    assert ResumeFile("a").get("x", lambda: 2) == 2


def test_a_failure_is_not_kept():
    resume = ResumeFile("a")
    with pytest.raises(ZeroDivisionError):
        resume.get("x", lambda: 1 / 0)
    assert resume.get("x", lambda: 3) == 3


def test_old_runs_are_forgotten(cache):
    ResumeFile("a").get("x", lambda: 1)
    old = time.time() - KEPT_SECONDS - 60
    os.utime(cache / "a.json", (old, old))
    ResumeFile("b")
    assert not (cache / "a.json").exists()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    resume = ResumeFile("a")
    assert resume.get("x", lambda: 1) == 1 and resume.get("x", refuse) == 1
    resume.delete()


@pytest.mark.parametrize("change", ["nothing", "task", "processors", "code"])
def test_a_stopped_run_is_another_when_what_decides_its_figures_changed(tmp_path, monkeypatch, change):
    import bstack.bench.run as bench

    @contextmanager
    def progress(stage, steps):
        yield lambda: None

    task, asked = tmp_path / "own.yaml", []

    def ask(request, progress):
        if len(asked) == 1:  # the second size of the first run
            asked.append("stopped")
            raise KeyboardInterrupt
        asked.append(request.cut.budget)
        return Measured(tasks={"own acc": Estimate(0.5)})

    def run():
        options = Options(quality=False, speed=False, tasks=[str(task)], trust_remote_code=True, code=str(tmp_path))
        return bench.run_bench(tmp_path / "own.bstk", options, progress)

    with bstk.open(VECTORS / "whole.bstk") as file:
        others = [_entry(c.name, c.kind, file.read(c), **{f: getattr(c, f) for f in FIELDS}) for c in file.chunks[1:]]
        config = _entry("config.json", bstk.FILE, b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
        bstk.write(tmp_path / "own.bstk", {}, [config, *others], file.base_count)
    (tmp_path / "own.py").write_text("class Config: pass")
    monkeypatch.setattr(bench, "ask", ask)
    task.write_text("task: own\nnum_fewshot: 0\n")
    with pytest.raises(KeyboardInterrupt):
        run()
    if change == "task":
        task.write_text("task: own\nnum_fewshot: 5\n")
    elif change == "code":
        (tmp_path / "own.py").write_text("class Config: other = 1")
    elif change == "processors":
        monkeypatch.setattr(bench, "processors", lambda: 99, raising=False)
    run()
    assert (asked[0] in asked[2:]) == (change != "nothing")
