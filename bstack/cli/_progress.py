"""Progress of long work on stderr: a bar on a terminal, at most a line a minute elsewhere, nothing with -q."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

import bstk
from bstack.cli._text import duration, megabytes
from bstack.errors import printable

__all__ = ["LINE_EVERY", "copied", "is_terminal", "stage", "transferred"]

# Minimum of seconds between two lines.
LINE_EVERY = 60.0
_BYTES: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}


class _Lines:
    """Replaces a bar in a log: writes a line at most every `LINE_EVERY` seconds."""

    def __init__(self, total: int, what: str, text: Callable[[int], str]):
        self._total, self._what, self._text = total, what, text
        self._done, self._before, self._logged = 0, 0, time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count what was done, and write a line if the last one is long ago."""
        self._done += count
        now = time.monotonic()
        if not count or now - self._logged < LINE_EVERY or self._done >= self._total:
            return
        # The speed is that since the last line. The first line has none: resumed work counts old steps at once.
        left = ""
        if self._before:
            left = f", about {duration((now - self._logged) / (self._done - self._before) * (self._total - self._done))} left"
        click.echo(f"{self._what}: {self._text(self._done)} of {self._text(self._total)}{left}", err=True)
        self._before, self._logged = self._done, now


@contextmanager
def stage(steps: int, what: str, quiet: bool, leave: bool = False) -> Iterator[Callable[..., None]]:
    """Yield a function to call after each of so many steps; with `leave` a full bar stays on the terminal."""
    with _bar(steps, what, quiet, "{:,}".format, dynamic_ncols=True, leave=leave) as (update, _):
        yield update


@contextmanager
def copied(total: int, what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of bytes of each finished piece."""
    with _bar(total, what, quiet, megabytes, **_BYTES) as (update, _):
        yield update


@contextmanager
def transferred(reader: bstk.Reader, total: int, what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Do as `copied` for bytes that come from `reader`; a bar shows its retries if it reads a URL."""
    with _bar(total, what, quiet, megabytes, **_BYTES) as (update, bar):
        if bar is None:
            yield update
            return
        if isinstance(reader.source, bstk.HttpSource):
            reader.source.notify = lambda text: bar.set_postfix_str(printable(text))

        def arrived(count: int) -> None:
            bar.set_postfix_str("", refresh=False)  # the retry has worked
            update(count)

        yield arrived


@contextmanager
def _bar(total: int, what: str, quiet: bool, text: Callable[[int], str], **look: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a function that counts, and the tqdm bar or None."""
    if quiet:
        yield (lambda count=1: None), None
    elif not is_terminal():
        yield _Lines(total, what, text).update, None
    else:
        from tqdm import tqdm  # here, because importing it takes a tenth of a second

        with tqdm(total=total, desc=what, **look) as bar:
            yield bar.update, bar


def is_terminal() -> bool:
    """Return whether a bar can be drawn: stderr is a terminal that has a size, which terminals of containers may lack."""
    if not sys.stderr.isatty():
        return False
    try:
        return all(os.get_terminal_size(sys.stderr.fileno()))
    except OSError:
        return True
