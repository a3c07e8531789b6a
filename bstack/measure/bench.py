"""The whole of ``bstack bench``: sizes of one file, its original, baselines, in one run on the same texts."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import bstk
from bstack.errors import CalibrationError
from bstack.measure.baselines.choice import Choice
from bstack.measure.budgets import even_budgets
from bstack.measure.child import Measured, measure_size
from bstack.measure.results import Comparison, Point, Report, Source, frontier

__all__ = ["Options", "Progress", "run_bench"]

LENGTH = 512
# progress(stage, steps) is entered as a context and gives a function to call after each step.
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes
    ----------
    budgets : list of Decimal or None
        Sizes in MB; None: ten from the smallest to the whole file.
    speed, quality : bool
    text : str or None
        File, folder or hub data set; None: the default of `bstack.measure.text`.
    windows : int
    length : int or None
        Tokens in each window; None: 512, or what the model reads if that is less.
    original : str or None
        The model that the file was made from.
    against : list of Choice
        Baselines; they need the original.
    calibration : str or None
        For GPTQ; None: what the file's metadata names.
    tasks : list of str
        For lm-eval.
    """

    budgets: Sequence[Decimal] | None = None
    speed: bool = True
    quality: bool = True
    text: str | None = None
    windows: int = 16
    length: int | None = None
    original: str | None = None
    against: Sequence[Choice] = ()
    calibration: str | None = None
    tasks: Sequence[str] = ()


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
    bstk.BstkError
        Anything else that `bstack.load` or a text may raise.
    """
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bstk.PartialWarning)
            file = stack.enter_context(bstk.open(path))
        budgets = list(options.budgets or even_budgets(file))
        cuts = [file.fit(mb=mb) for mb in budgets]
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bstack-bench-")))
        run = _Run(file, path, options, scratch, progress)
        if options.quality:
            run.prepare()
        done: dict[bstk.Cut, Point] = {}
        points = []
        for number, (mb, cut) in enumerate(zip(budgets, cuts, strict=True), 1):
            if cut not in done:
                done[cut] = run.point(mb, cut, f"size {number} of {len(budgets)}", speed=options.speed)
            points.append(replace(done[cut], mb=mb))
        baselines, comparisons = run.baselines(done) if options.against else ([], [])
        return Report(run.source(), points, baselines, comparisons, run.notes)


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
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Windows and reference."""
        import numpy as np

        from bstack.measure.text import first_windows, measuring_text

        options = self.options
        self.length = _length(self.file, options.length)
        with self.progress("text", 1) as step:
            self.text = measuring_text(options.text)
            self._tokenizer = _tokenizer(self.file, self.scratch / "tokenizer")
            self.windows = first_windows(self.text, self._tokenizer, options.windows, self.length)
            self.windows_path = self.scratch / "windows.npy"
            np.save(self.windows_path, self.windows.numpy())
            step()
        self.reference = self._own_reference() if options.original is None else self._original_reference()

    def _own_reference(self) -> Any:
        from bstack.measure.reference import Reference

        self.notes.append(
            "The divergence (KLD) is measured against this file at its full depth, not against the original. "
            "Give --original MODEL for that."
        )
        full = self.file.fit()
        with self.progress("own reference", len(self.windows)) as step:
            measure_size(
                self.path, _exact_mb(full.budget), speed=False, windows=self.windows_path,
                make_reference=self.scratch / "own.ref", progress=step,
            )  # fmt: skip
        return Reference(self.scratch / "own.ref")

    def _original_reference(self) -> Any:
        from bstack.measure.original import original_reference
        from bstack.models.open import open_checkpoint
        from bstack.models.skeleton import Skeleton

        with self.progress("original", 1) as step:
            checkpoint = open_checkpoint(self.options.original)
            self.skeleton = Skeleton(checkpoint)
            made_from = (self.file.metadata.get("model") or {}).get("source")
            if made_from is not None and made_from != checkpoint.provenance():
                self.notes.append(
                    f"{self.options.original} is not the checkpoint this file was made from: its digests differ. "
                    "The divergence says how far the file is from what was given."
                )
            vocabulary = self.skeleton.model.config.get_text_config().vocab_size
            if not 0 <= int(self.windows.max()) < vocabulary:
                raise bstk.UsageError(
                    f"{self.options.original} has a vocabulary of {vocabulary}; this file's tokenizer goes beyond it. "
                    "It is not the model the file was made from."
                )
            step()
        with self.progress("reference", 2 * len(self.skeleton.layers)) as step:
            return original_reference(self.skeleton, self.windows, self.scratch, step)

    def point(self, mb: Decimal, cut: bstk.Cut, what: str, *, speed: bool) -> Point:
        """Measure one size."""
        from bstack.measure.speed import REPETITIONS

        steps = (REPETITIONS + 1 if speed else 0) + (len(self.windows) if self.options.quality else 0)
        with self.progress(f"{what}: {mb} MB", steps) as step:
            measured: Measured = measure_size(
                self.path, mb, speed=speed, windows=self.windows_path, progress=step, tasks=self.options.tasks,
                reference=Path(self.reference.path) if self.reference is not None else None,
            )  # fmt: skip
        return Point(mb, cut.file_bytes, cut.memory_bytes, self.file.bits_per_weight(cut), measured)

    def baselines(self, done: dict[bstk.Cut, Point]) -> tuple[list[Any], list[Comparison]]:
        """Measure the baselines, and this file at their sizes."""
        from bstack.measure.baselines.run import Baselines

        runner = Baselines(self.file, self.skeleton, self.windows, self.reference, self.scratch)
        choices = self._fitting(runner)
        calibration = self._calibration() if any(choice.method == "gptq" for choice in choices) else None
        found = []
        for choice in choices:
            with self.progress(f"{choice.method} {choice.bits} bits", runner.steps(choice.method)) as step:
                found += runner.measure(choice.method, choice.bits, calibration, step)
        comparisons = []
        best = frontier(found)
        if below := [b.name for b in best if b.sizes.file_bytes < self.file.smallest.budget]:
            self.notes.append(f"Smaller than the smallest cut of this file, so nothing compares with them: {'; '.join(below)}.")
        for baseline in best:
            budget = baseline.sizes.file_bytes
            if budget < self.file.smallest.budget:
                continue
            cut = self.file.fit_bytes(budget)
            if cut not in done:
                done[cut] = self.point(_exact_mb(budget), cut, f"at {baseline.name}'s bytes", speed=False)
            comparisons.append(Comparison(baseline, done[cut]))
        return found, comparisons

    def _fitting(self, runner: Any) -> list[Choice]:
        smallest, full = self.file.smallest.file_bytes, self.file.fit().file_bytes
        fitting, left_out = [], []
        for choice in self.options.against:
            sizes = [size.file_bytes for size in runner.estimated_sizes(choice.bits)]
            inside = min(sizes) <= 1.05 * full and max(sizes) >= smallest
            (fitting if choice.asked or inside else left_out).append(choice)
        if left_out:
            names = ", ".join(f"{choice.method}:{choice.bits}" for choice in left_out)
            self.notes.append(f"Left out, as they are larger or smaller than every cut of this file: {names}.")
        return fitting

    def _calibration(self) -> Any:
        """The calibration that the file's metadata names, or the text given, in as many windows."""
        from bstack.calibration.selftext import write_windows
        from bstack.calibration.texts import SELF, open_text, token_windows
        from bstack.measure.text import digest

        settings = self.file.metadata.get("settings") or {}
        samples, length = settings.get("samples", 64), settings.get("sequence_length", 256)
        source = self.options.calibration or settings.get("calibration", SELF)
        if source == SELF:
            with self.progress("calibration text", length * -(-samples // 64)) as step:
                return write_windows(self.skeleton, samples, length, seed=settings.get("seed", 0), progress=step)
        try:
            text = open_text(source)
        except bstk.BstkError as error:
            if self.options.calibration is not None:
                raise
            raise CalibrationError(
                f"This file was calibrated on {source!r}, which is not here. GPTQ should have the same text: give it "
                "with --calibration FILE, or --calibration self."
            ) from error
        if self.options.calibration is None or source == settings.get("calibration"):
            expected = settings.get("calibration_sha256")
            if expected is not None and digest(text) != expected:
                self.notes.append(f"GPTQ was calibrated on {text.name}, whose text is not the one this file was calibrated on.")
        return token_windows(text, self._tokenizer, samples, length)

    def source(self) -> Source:
        """What was measured, and on what."""
        from bstack.measure.text import digest

        model = self.file.metadata.get("model") or {}
        extra = self.reference.extra if self.reference is not None else {}
        return Source(
            file=os.path.basename(os.fspath(self.path)),
            root=self.file.root.hex(),
            model=model.get("name"),
            parameters=model.get("parameters"),
            text=None if self.text is None else {
                "name": self.text.name, "sha256": digest(self.text),
                "windows": self.options.windows, "sequence_length": self.length,
            },
            reference=None if self.reference is None else ("original" if self.options.original is not None else "full file"),
            original={} if not extra else {"model": self.options.original, "bytes": self.skeleton.checkpoint.size_bytes, **extra},
        )  # fmt: skip


def _tokenizer(file: bstk.Reader, folder: Path) -> Any:
    from transformers import AutoTokenizer

    if "tokenizer_config.json" not in file.files:
        raise CalibrationError(
            "The file has no tokenizer, so no text can be read and no quality measured. Use --no-quality for its speed."
        )
    for name in file.files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.file(name))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _length(file: bstk.Reader, asked: int | None) -> int:
    """Tokens in a window; refuses more than the model was made to read."""
    config = json.loads(file.file("config.json")) if "config.json" in file.files else {}
    limits = [config[key] for key in ("max_position_embeddings", "n_positions") if isinstance(config.get(key), int)]
    if asked is None:
        return min([LENGTH, *limits])
    if limits and asked > min(limits):
        raise bstk.UsageError(
            f"this model reads at most {min(limits)} tokens, and windows of {asked} were asked for. "
            f"Give at most --sequence-length {min(limits)}."
        )
    return asked


def _exact_mb(size: int) -> Decimal:
    """A size in MB without rounding: dividing by 2**20 ends after twenty decimals."""
    return Decimal(size) / bstk.MB
