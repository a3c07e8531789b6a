"""The disk refuses the n-th change, or the n-th read fails or comes short, for every n."""

import errno
import os

import bstk
import jobs
import pytest
from steps import refusals

CODES = {errno.ENOSPC: (bstk.ResourceError,), errno.EIO: (bstk.OutputError,)}
JOBS = ["truncate", "truncate in place", "grow", "grow whole"]


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
    job = next(job for job in jobs.container_jobs(good) if job.name == ("grow" if name == "grow" else "truncate"))
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
                elif name == "grow":
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
