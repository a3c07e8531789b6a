"""The steps of writing: every call of this process that changes the disk, counted, and something done at the n-th."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import Job, fresh

import bstk

CALLS = ("write", "fsync", "ftruncate", "replace", "unlink", "mkdir", "rmdir")
SMALL = 4096  # a write of no more than this is not torn: it is one page


class Steps:
    """Counts the calls; at the call `stop`, and with `lasting` at all after it, does `act`.

    Attributes
    ----------
    count : int
        Calls so far.
    """

    def __init__(self, stop: int = 0, act: Callable[[], None] = lambda: None, lasting: bool = False):
        self.count = 0
        self._stop, self._act, self._lasting = stop, act, lasting

    def take(self) -> bool:
        """Count a call; whether it is one to stop at."""
        self.count += 1
        return self.count == self._stop or (self._lasting and self.count > self._stop)

    def act(self) -> None:
        self._act()


@contextmanager
def counted(steps: Steps) -> Iterator[Steps]:
    """Count the calls made inside: those of `os`, and files that are opened for writing."""
    originals = {name: getattr(os, name) for name in CALLS}

    def counting(name: str) -> Callable:
        original = originals[name]

        def call(*arguments, **named):
            if steps.take():
                if name == "write" and len(arguments[1]) > SMALL:
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                steps.act()
            return original(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, counting(name))
    _AUDITED.append(steps)
    _install()
    try:
        yield steps
    finally:
        _AUDITED.remove(steps)
        for name, original in originals.items():
            setattr(os, name, original)


def refusals(job: Job, folder: Path, code: int, at: Iterable[int]) -> Iterator[tuple[int, Exception]]:
    """Do the job once for each of `at`, the change that the disk refuses with the error `code`, until it makes fewer changes.

    Yields the change and the error where the job ended in one. After each the old file or the new one is whole, and the
    same job again gets through.
    """

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    for step in at:
        fresh(job, folder)
        with counted(Steps(step, refuse)) as steps:
            try:
                job.run(folder)
            except (bstk.BstkError, OSError) as error:
                yield step, error
        if steps.count < step:
            return
        job.check_stopped(folder)
        job.repeat(folder)


_AUDITED: list[Steps] = []
_installed = False


def _install() -> None:
    """Hear of files that are opened for writing. Such a hook cannot be taken away again."""
    global _installed
    if not _installed:
        sys.addaudithook(_heard)
        _installed = True


def _heard(event: str, arguments: tuple) -> None:
    if event == "open" and _AUDITED and arguments[2] and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        for steps in _AUDITED:
            if steps.take():
                steps.act()
