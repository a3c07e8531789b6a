"""Compressing on a disk that refuses the n-th change: an error that says so, the old file, and a resumption to the same bytes."""

import errno

import jobs
import pytest
from steps import refusals

import bstk

pytestmark = pytest.mark.slow

EVERY = 23  # of the steps; all of them take minutes


@pytest.fixture(scope="module")
def job(tiny_llama, tmp_path_factory):
    return jobs.compress_job(tiny_llama, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_change_may_be_refused(job, tmp_path, code):
    expected = bstk.ResourceError if code == errno.ENOSPC else bstk.OutputError
    refused = list(refusals(job, tmp_path / "folder", code, range(1 + (code == errno.EIO), 1000, EVERY)))
    for step, error in refused:
        # The command ends with the same code for both.
        assert isinstance(error, expected) or getattr(error, "errno", None) == code, (step, error)
    assert len(refused) >= 5
