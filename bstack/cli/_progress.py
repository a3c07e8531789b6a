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
from bstack.cli._text import duration, megabytes, printable

__all__ = ["LINE_EVERY", "copied", "is_terminal", "stage", "transferred"]

LINE_EVERY = 60.0
"""Seconds between two lines, at least."""


class _Nothing:
    """What stands for a bar that nobody wants."""

    def update(self, count: int = 1) -> None:
        """Say nothing."""


class _Lines:
    """What stands for a bar in a log."""

    def __init__(self, total: int, what: str, shown: Callable[[int], str]):
        self._total, self._what, self._shown = total, what, shown
        self._done, self._before, self._told = 0, 0, time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count what was done; say so if the last line is long ago."""
        self._done += count
        now = time.monotonic()
        if not count or now - self._told < LINE_EVERY or self._done >= self._total:
            return
        # By what was done since the last line, and so not in the first one: what was there already went by in a hessian.
        left = ""
        if self._before:
            left = f", about {duration((now - self._told) / (self._done - self._before) * (self._total - self._done))} left"
        click.echo(f"{self._what}: {self._shown(self._done)} of {self._shown(self._total)}{left}", err=True)
        self._before, self._told = self._done, now


@contextmanager
def stage(steps: int, what: str, quiet: bool, leave: bool = False) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of so many steps; with `leave` a bar stays when it is full."""
    if quiet:
        yield _Nothing().update
    elif not is_terminal():
        yield _Lines(steps, what, lambda number: f"{number:,}").update
    else:
        from tqdm import tqdm  # only where it is drawn: it takes a tenth of a second

        with tqdm(total=steps, desc=what, dynamic_ncols=True, leave=leave) as bar:
            yield bar.update


@contextmanager
def copied(total: int, what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of bytes of each piece that was dealt with."""
    with _bytes(total, what, quiet) as bar:
        yield bar.update


@contextmanager
def transferred(reader: bstk.Reader, total: int, what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """As `copied`, for bytes that come from `reader`: a bar shows the retries of one behind a URL."""
    with _bytes(total, what, quiet) as bar:
        if isinstance(bar, (_Nothing, _Lines)):
            yield bar.update
            return
        if isinstance(reader.source, bstk.HttpSource):
            reader.source.notify = lambda text: bar.set_postfix_str(printable(text))

        def arrived(count: int) -> None:
            bar.set_postfix_str("", refresh=False)  # whatever was retried, it goes on
            bar.update(count)

        yield arrived


@contextmanager
def _bytes(total: int, what: str, quiet: bool) -> Iterator[Any]:
    """Yield a bar in bytes, or what stands for it."""
    if quiet:
        yield _Nothing()
    elif not is_terminal():
        yield _Lines(total, what, megabytes)
    else:
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
            yield bar


def is_terminal() -> bool:
    """Whether a bar can be drawn; not on a terminal that has no size, as some of containers have."""
    if not sys.stderr.isatty():
        return False
    try:
        return all(os.get_terminal_size(sys.stderr.fileno()))
    except OSError:
        return True
