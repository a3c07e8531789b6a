"""The whole of ``bstack bench``: sizes of one file, its original, baselines, in one run on the same texts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import replace
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bstk
from bstack.bench.budgets import even_budgets
from bstack.bench.child import Measured, ask
from bstack.bench.options import Options
from bstack.bench.results import Dense, Point, Report, Source
from bstack.bench.resume import Rows
from bstack.bench.tasks import file_digests
from bstack.errors import ForeignCodeWarning
from bstack.kernels.native import instructions, processors
from bstack.memory.free import too_little
from bstack.progress import Progress

__all__ = ["run_bench"]

# Decides how fast a process is, and so whether a row of an earlier run is one of this.
THREADS = ("OMP_NUM_THREADS", "BSTACK_THREADS")


def run_bench(path: str | os.PathLike[str], options: Options, progress: Progress) -> Report:
    """Measure a file.

    Parameters
    ----------
    path : path
        A .bstk file.
    options : Options
    progress : callable
        Receives each stage and its steps.

    Raises
    ------
    bstk.BudgetError
        A size is below the smallest model; before anything is measured.
    bstk.UsageError
        The original is not the one that the file was made from.
    bstk.BstkError
        Anything else that `bstack.load` or a text may raise.
    """
    with ExitStack() as stack:
        file = stack.enter_context(bstk.open(path, warn=False))
        budgets = list(options.budgets or even_budgets(file))
        cuts = [file.fit(mb=mb) for mb in budgets]
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bstack-bench-")))
        run = _Run(file, path, options, scratch, progress)
        if options.quality:
            run.prepare()
        run.open_rows()
        done: dict[bstk.Cut, Point] = {}
        points = []
        for number, (mb, cut) in enumerate(zip(budgets, cuts, strict=True), 1):
            if cut not in done:
                done[cut] = run.point(mb, cut, f"size {number} of {len(budgets)}")
            points.append(replace(done[cut], mb=mb))
        dense = run.dense(max(cuts)) if options.speed else []
        baselines, comparisons = run.against(done) if options.against else ([], [])
        run.rows.finish()
        if run.rows.found:
            run.notes.append(
                f"Figures measured by a run of this command that was stopped, and taken from it: {run.rows.found}."
            )
        return Report(run.source(), points, dense, baselines, comparisons, run.notes)


class _Run:
    """State of one run."""

    def __init__(self, file: bstk.Reader, path: Any, options: Options, scratch: Path, progress: Progress):
        self.file, self.path, self.options, self.scratch, self.progress = file, path, options, scratch, progress
        self.notes: list[str] = []
        self.windows: Any = None
        self.length = 0
        self.windows_path: Path | None = None
        self.reference: Any = None
        self.text: Any = None
        self.skeleton: Any = None
        self.rows: Any = None
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Windows and reference."""
        import numpy as np

        from bstack.bench.text import file_tokenizer, first_windows, measuring_text, window_length

        options = self.options
        self.length = window_length(self.file, options.length)
        with self.progress("text", 1) as step:
            self.text = measuring_text(options.text)
            self._tokenizer = file_tokenizer(self.file, self.options)
            self.windows = first_windows(self.text, self._tokenizer, options.windows, self.length)
            self.windows_path = self.scratch / "windows.npy"
            np.save(self.windows_path, self.windows.numpy())
            step()
        self.reference = self._own_reference() if options.original is None else self._original_reference()

    def _own_reference(self) -> Any:
        from bstack.bench.reference import Reference

        self.notes.append(
            "The divergence (KLD) is measured against this file at its full depth, not against the original. "
            "Give --original MODEL for that."
        )
        full = self.file.fit()
        with self.progress("own reference", len(self.windows)) as step:
            self._ask(
                _exact_mb(full.budget),
                windows=self.windows_path,
                make_reference=self.scratch / "own.ref",
                progress=step,
            )
        return Reference(self.scratch / "own.ref")

    def _original_reference(self) -> Any:
        from bstack.bench.original import original_reference
        from bstack.models.open import open_checkpoint
        from bstack.models.skeleton import Skeleton

        with self.progress("original", 1) as step:
            checkpoint = open_checkpoint(self.options.original, self.options.trust_remote_code)
            self.skeleton = Skeleton(checkpoint)
            made_from = (self.file.metadata.get("model") or {}).get("source")
            if made_from is not None and made_from != checkpoint.provenance():
                message = f"{self.options.original} is not the checkpoint this file was made from: its digests differ."
                if not self.options.force:
                    raise bstk.UsageError(
                        f"{message} Name the one it was made from, or add --force to measure how far the file is from this one."
                    )
                self.notes.append(f"{message} The divergence says how far the file is from what was given.")
            vocabulary = self.skeleton.model.config.get_text_config().vocab_size
            if not 0 <= int(self.windows.max()) < vocabulary:
                raise bstk.UsageError(
                    f"{self.options.original} has a vocabulary of {vocabulary}; this file's tokenizer goes beyond it. "
                    "It is not the model the file was made from."
                )
            self._check_targets()
            step()
        with self.progress("reference", 2 * len(self.skeleton.layers)) as step:
            return original_reference(self.skeleton, self.windows, self.scratch, step)

    def _check_targets(self) -> None:
        """Before the minutes that come now: can the baselines' linears have the sizes that were named?"""
        from bstack.bench.baselines.spqr import check_targets

        stacks = [chunk for chunk in self.file.chunks if chunk.is_block and chunk.level == 0]
        layers = [
            [chunk.shape for chunk in stacks if chunk.name.startswith(f"{name}.")] for name, _ in self.skeleton.layers
        ]
        check_targets(self.options.against, [shapes for shapes in layers if shapes])

    def open_rows(self) -> None:
        """Find what a run that was stopped has measured on the same file, texts, code and versions."""
        from bstack.bench.original import reference_key

        on = None if self.windows is None else hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        about = {
            "root": self.file.root.hex(),
            "windows": on if self.skeleton is None else reference_key(self.skeleton, self.windows),
            "reference": None if self.windows is None else "original" if self.skeleton is not None else "full file",
            "full": self.file.fit().chunks,
            "versions": {package: version(package) for package in ("bstack", "torch", "transformers")},
            "kernels": instructions(),
            "threads": [processors(), *(os.environ.get(name) for name in THREADS)],
            "tasks": file_digests(self.options.tasks),
            "code": self._code(),
        }
        self.rows = Rows(hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest())

    def _code(self) -> dict[str, Any] | None:
        """Digests of the Python code that the model needs; None where it needs none."""
        from bstack.engine.container import embedded_files
        from bstack.models.code import allowed_code

        if not self.options.trust_remote_code:
            return None
        # Who runs it announces it.
        with embedded_files(self.file) as folder, warnings.catch_warnings(action="ignore", category=ForeignCodeWarning):
            code = allowed_code(self.file, folder, True, self.options.code)
        return None if code is None else code.to_json()

    def _ask(self, mb: Decimal, **what: Any) -> dict[str, Any]:
        code = self.options.code if self.options.trust_remote_code else None
        return ask(self.path, mb, code=code, trust_remote_code=self.options.trust_remote_code, **what)

    def point(self, mb: Decimal, cut: bstk.Cut, what: str, *, run: bool = True) -> Point:
        """Measure one size; `run` for load time, memory and speed, too."""
        speed = run and self.options.speed
        tasks = self.options.tasks if run else ()

        def measure() -> dict[str, Any]:
            windows = 0 if self.windows is None else len(self.windows)
            with self.progress(f"{what}: {mb} MB", self._repetitions(speed) + windows) as step:
                return self._ask(
                    mb,
                    run="stack" if run else None,
                    speed=speed,
                    windows=self.windows_path,
                    tasks=tasks,
                    reference=None if self.reference is None else Path(self.reference.path),
                    progress=step,
                )

        answer = self.rows.get(f"size:{cut.chunks}:{run}:{speed}:{','.join(tasks)}", measure)
        return Point(mb, cut.file_bytes, cut.memory_bytes, self.file.bits_per_weight(cut), Measured.from_answer(answer))

    def dense(self, cut: bstk.Cut) -> list[Dense]:
        """Measure what the packed sizes are to be compared with: float32 weights, of the file and of the original."""
        needed = 4 * sum(math.prod(chunk.shape) for chunk in self.file.chunks if chunk.is_weight and not chunk.level)
        if memory := too_little(needed):
            self.notes.append(
                f"Not compared with the speed of float32 weights: they take {needed / bstk.MB:,.0f} MB, and "
                f"{memory.free / bstk.MB:,.0f} MB are free of {memory.source}."
            )
            return []
        found = []
        ways = [("file", "dense")] + ([("original", "original")] if self.options.original is not None else [])
        for name, run in ways:

            def measure(run: str = run, name: str = name) -> dict[str, Any]:
                with self.progress(f"{name} in float32", self._repetitions(True)) as step:
                    return self._ask(
                        _exact_mb(cut.budget), run=run, speed=True, original=self.options.original, progress=step
                    )

            answer = self.rows.get(f"{run}:{cut.chunks}:{self.options.original}", measure)
            found.append(Dense(name, cut.file_bytes if run == "dense" else None, Measured.from_answer(answer).running))
        return found

    @staticmethod
    def _repetitions(speed: bool) -> int:
        from bstack.bench.speed import REPETITIONS

        return REPETITIONS + 1 if speed else 0

    def against(self, done: dict[bstk.Cut, Point]) -> tuple[list[Any], list[Any]]:
        """Measure the baselines, and this file at their sizes."""
        from bstack.bench.peers import Against

        against = Against(
            self.file,
            self.skeleton,
            self._tokenizer,
            self.windows,
            self.reference,
            self.scratch,
            self.rows,
            self.notes,
            self.progress,
        )
        found = against.measure(self.options.against, self.options.calibration)

        def point(budget: int, what: str) -> Point:
            cut = self.file.fit_bytes(budget)
            if cut not in done:
                done[cut] = self.point(_exact_mb(budget), cut, what, run=False)
            return done[cut]

        return found, against.compare(found, point)

    def source(self) -> Source:
        """What was measured, and on what."""
        from bstack.bench.text import digest

        model = self.file.metadata.get("model") or {}
        extra = self.reference.extra if self.reference is not None else {}
        return Source(
            file=os.path.basename(os.fspath(self.path)),
            root=self.file.root.hex(),
            model=model.get("name"),
            parameters=model.get("parameters"),
            text=None
            if self.text is None
            else {
                "name": self.text.name,
                "sha256": digest(self.text),
                "windows": self.options.windows,
                "sequence_length": self.length,
            },
            reference=None
            if self.reference is None
            else ("original" if self.options.original is not None else "full file"),
            original={}
            if not extra
            else {"model": self.options.original, "bytes": self.skeleton.checkpoint.size_bytes, **extra},
        )


def _exact_mb(size: int) -> Decimal:
    """A size in MB without rounding: dividing by 2**20 ends after twenty decimals."""
    return Decimal(size) / bstk.MB
