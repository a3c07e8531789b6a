"""The disk refuses the n-th change, or the n-th read fails or comes short, for every n."""

import dataclasses
import errno
import os

import jobs
import pytest
from steps import Steps, counted, refusals

import bstk

pytestmark = pytest.mark.slow

CODES = {errno.ENOSPC: (bstk.ResourceError,), errno.EIO: (bstk.OutputError,)}
GROWTHS = ["grow", "grow whole"]
JOBS = ["truncate", "truncate in place", *GROWTHS]


@pytest.fixture
def job(good, request):
    return next(job for job in jobs.container_jobs(good) if job.name == request.param)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("job", JOBS, indirect=True)
def test_every_change_may_be_refused(job, tmp_path, code):
    refused = list(refusals(job, tmp_path / "folder", code, range(1, 200)))
    for step, error in refused:
        assert isinstance(error, CODES[code]) and jobs.OUT in str(error), step
    assert len(refused) >= 3


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("state", ["partial", "partial within a block"])
@pytest.mark.parametrize("job", GROWTHS, indirect=True)
def test_a_refused_growth_of_a_partial_file_leaves_a_valid_file(job, state, good, tmp_path, code):
    """With at least as much of the model as before; `refusals` checks it and does the job again."""
    old = good[: len(job.old) + 7 * (state == "partial within a block")]

    def prepare(folder):
        (folder / "source.bstk").write_bytes(good)
        (folder / jobs.OUT).write_bytes(old)

    job = dataclasses.replace(job, old=old, prepare=prepare)
    refused = list(refusals(job, tmp_path / "folder", code, range(1, 200)))
    assert all(isinstance(error, CODES[code]) for _, error in refused) and len(refused) >= 3


@pytest.mark.parametrize("job", ["grow"], indirect=True)
@pytest.mark.parametrize("first", range(2, 8))
def test_a_disk_that_goes_away_leaves_a_valid_file(job, tmp_path, first):
    """From the n-th change on it refuses all."""
    folder = jobs.fresh(job, tmp_path / "folder")

    def refuse():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with counted(Steps(first, refuse, lasting=True)) as steps, pytest.raises(bstk.OutputError):
        job.run(folder)
    assert steps.count >= first
    job.check_stopped(folder)
    if (folder / jobs.OUT).read_bytes() != job.wanted:
        job.repeat(folder)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError, RuntimeError("of a caller")])
@pytest.mark.parametrize("job", GROWTHS, indirect=True)
def test_a_growth_that_is_stopped_leaves_a_valid_file(job, tmp_path, problem):
    folder = jobs.fresh(job, tmp_path / "folder")

    def stop(count):
        raise problem

    with pytest.raises(type(problem) if isinstance(problem, Exception) else problem):
        jobs.grow(folder, len(job.wanted) / bstk.MB, progress=stop)
    job.check_stopped(folder)
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
@pytest.mark.parametrize("name", ["verify", "truncate", "grow"])
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
                    bstk.grow(folder / jobs.OUT, size, reader)
                else:
                    bstk.truncate(reader, folder / jobs.OUT, size)
        except (bstk.DamagedError, bstk.NotBstkError, OSError):
            failed += 1
        assert source.reads >= step or failed == step - 1
        job.check_stopped(folder)
        job.repeat(folder)
        if source.reads < step:
            break
    assert failed == step - 1 >= 3
