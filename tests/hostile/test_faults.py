"""The disk refuses the n-th change, or the n-th read fails or comes short, for every n."""

import dataclasses
import errno
import os

import jobs
import pytest
from steps import Steps, counted, refusals

import bstk

CODES = {errno.ENOSPC: (bstk.ResourceError,), errno.EIO: (bstk.OutputError,)}
GROWTHS = ["grow", "grow whole", "grow in place", "grow whole in place"]
JOBS = ["truncate", "truncate in place", *GROWTHS]


@pytest.fixture
def job(good, request):
    return next(job for job in jobs.container_jobs(good) if job.name == request.param)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("job", JOBS, indirect=True)
def test_every_change_may_be_refused(job, tmp_path, code):
    refused = list(refusals(job, tmp_path / "folder", code, range(1, 200)))
    for step, error in refused:
        assert isinstance(error, CODES[code]) and jobs.OUT in error.args[0], step
    assert len(refused) >= 3


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("state", ["sealed", "partial", "partial within a block"])
@pytest.mark.parametrize("job", GROWTHS, indirect=True)
def test_a_refused_growth_leaves_the_old_file(job, state, good, tmp_path, code):
    """Byte for byte; so that a full disk is not met by a file that took all of it."""
    old = job.old
    if state != "sealed":
        old = good[: len(old) + 7 * (state == "partial within a block")]

    def prepare(folder):
        (folder / "source.bstk").write_bytes(good)
        (folder / jobs.OUT).write_bytes(old)

    job = dataclasses.replace(job, old=old, prepare=prepare)
    steps = 0
    for steps, _ in refusals(job, tmp_path / "folder", code, range(1, 200)):
        assert (tmp_path / "folder" / jobs.OUT).read_bytes() == old, steps
    assert steps >= 4


@pytest.mark.parametrize("job", ["grow in place"], indirect=True)
@pytest.mark.parametrize("first", range(2, 8))
def test_a_disk_that_goes_away_leaves_a_valid_file_and_says_what_it_is(job, tmp_path, first):
    """From the n-th change on it refuses all, the rolling back too."""
    folder = jobs.fresh(job, tmp_path / "folder")

    def refuse():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with counted(Steps(first, refuse, lasting=True)) as steps, pytest.raises(bstk.OutputError) as caught:
        job.run(folder)
    assert steps.count >= first
    job.check_stopped(folder)
    found = (folder / jobs.OUT).read_bytes()
    if found != job.old:
        assert "could not be brought back to what it was: Input/output error" in caught.value.args[0]
        assert f"It is {'sealed' if any(found[48:56]) else 'partial'} now" in caught.value.args[0]
    if found != job.wanted:
        job.repeat(folder)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError, RuntimeError("of a caller")])
@pytest.mark.parametrize("job", GROWTHS, indirect=True)
def test_a_growth_from_disk_that_is_stopped_leaves_the_old_file(job, tmp_path, problem):
    folder = jobs.fresh(job, tmp_path / "folder")

    def stop(count):
        raise problem

    with pytest.raises(type(problem) if isinstance(problem, Exception) else problem):
        jobs.grow(folder, len(job.wanted) / bstk.MB, progress=stop, in_place=job.in_place)
    assert (folder / jobs.OUT).read_bytes() == job.old
    job.repeat(folder)


class FaultySource:
    """A source whose n-th read does what `fault` does with the bytes."""

    def __init__(self, data, fail_at, fault):
        self.name, self.length = "faulty", len(data)
        self._data, self._fail_at, self._fault = data, fail_at, fault
        self.reads = 0

    def read(self, offset, length):
        self.reads += 1
        data = self._data[offset : offset + length]
        return self._fault(data) if self.reads == self._fail_at else data

    def close(self):
        pass


def failing(data):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


FAULTS = {"fails": failing, "comes short": lambda data: data[:-1], "comes empty": lambda data: b""}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["verify", "truncate", "grow", "grow in place"])
def test_every_read_may_fail(good, tmp_path, fault, name):
    job = next(job for job in jobs.container_jobs(good) if job.name == ("truncate" if name == "verify" else name))
    with bstk.open(job.wanted) as wanted:
        size = wanted.length / bstk.MB
    failed = 0
    for step in range(1, 100):
        folder = jobs.fresh(job, tmp_path / "folder")
        source = FaultySource(good, step, FAULTS[fault])
        try:
            with bstk.open(source) as reader:
                if name == "verify":
                    reader.verify()
                elif "grow" in name:
                    bstk.grow(folder / jobs.OUT, size, reader, in_place=job.in_place)
                else:
                    bstk.truncate(reader, folder / jobs.OUT, size)
        except (bstk.DamagedError, bstk.NotBstkError, OSError):
            failed += 1
        assert source.reads >= step or failed == step - 1
        if "grow" in name:
            assert (folder / jobs.OUT).read_bytes() in (job.old, job.wanted)
        job.check_stopped(folder)
        job.repeat(folder)
        if source.reads < step:
            break
    assert failed == step - 1 >= 3
