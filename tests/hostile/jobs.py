"""Jobs that write, and what must be true of their folder when they were stopped anywhere, and after the same job again."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bstk

OLD = b"what was there before"
OUT = "out.bstk"


@dataclass(frozen=True)
class Job:
    """One job on a folder.

    Attributes
    ----------
    prepare : callable
        Puts the files it needs into an empty folder.
    run : callable
        Does it; afterwards ``out.bstk`` has the bytes `wanted`.
    old : bytes or None
        What ``out.bstk`` held before. In between it holds these or `wanted`; with `in_place` any valid cut between both.
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], object]
    old: bytes
    wanted: bytes
    in_place: bool = False

    def check_stopped(self, folder: Path) -> None:
        """Raise unless the output is the old file whole, or the new one."""
        found = (folder / OUT).read_bytes()
        if found in (self.old, self.wanted):
            return
        require(self.in_place, f"{self.name}: a mixture of the old file and the new one")
        longest = max(self.old, self.wanted, key=len)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bstk.PartialWarning)
            with bstk.open(found) as reader, bstk.open(longest) as whole:
                reader.verify()
                require(reader.root == whole.root, f"{self.name}: another model")
                require(found[256:] == longest[256 : len(found)], f"{self.name}: other bytes than those of the model")
                least = min(len(self.old), len(self.wanted))
                require(len(found) >= least, f"{self.name}: less of the model than before and after")

    def repeat(self, folder: Path) -> None:
        """Do it again after it was stopped; raise unless the result is there and nothing else is left."""
        try:
            self.run(folder)
        except bstk.UsageError:  # of cutting and growing: nothing is left to do
            require((folder / OUT).read_bytes() == self.wanted, f"{self.name}: refused, and not done")
        require((folder / OUT).read_bytes() == self.wanted, f"{self.name}: another result than without a stop")
        left = {path.name for path in folder.iterdir()} - {OUT, "source.bstk", "model"}
        require(not left, f"{self.name}: left behind: {sorted(left)}")


def container_jobs(source: bytes) -> list[Job]:
    """Jobs of the package bstk, on cuts of the complete file `source`."""
    with bstk.open(source) as reader:
        ends = [chunk.end for chunk in reader.chunks[reader.base_count - 1 :]]
    small, middle = _cut(source, ends[0]), _cut(source, ends[len(ends) // 2])
    size = ends[len(ends) // 2] / bstk.MB

    def prepare(out: bytes) -> Callable[[Path], None]:
        def put(folder: Path) -> None:
            (folder / "source.bstk").write_bytes(source)
            (folder / OUT).write_bytes(out)

        return put

    return [
        Job("truncate", prepare(OLD), lambda f: bstk.truncate(f / "source.bstk", f / OUT, size), OLD, middle),
        Job("truncate in place", prepare(source), lambda f: bstk.truncate(f / OUT, None, size), source, middle, True),
        Job("grow", prepare(small), lambda f: grow(f, size), small, middle, True),
        Job("grow whole", prepare(small), lambda f: grow(f, 1000), small, source, True),
    ]


def grow(folder: Path, mb: float, **options: object) -> bstk.Cut:
    return bstk.grow(folder / OUT, mb, folder / "source.bstk", **options)


def compress_job(model: Path, work: Path) -> Job:
    """Compressing a tiny model, over a file that is there already."""
    import bstack

    settings = bstack.Settings(codec="sign", planes=2, rank=2, samples=2, sequence_length=16)

    def run(folder: Path) -> None:
        bstack.compress(model, folder / OUT, settings=settings, overwrite=True)

    run(work)
    return Job("compress", lambda folder: (folder / OUT).write_bytes(OLD), run, OLD, (work / OUT).read_bytes())


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise AssertionError(problem)


def _cut(source: bytes, length: int) -> bytes:
    with bstk.open(source) as reader:
        return reader.preamble.sealed(length).to_bytes() + source[256:length]


def fresh(job: Job, folder: Path) -> Path:
    """Return an empty folder, prepared for the job."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.prepare(folder)
    return folder
