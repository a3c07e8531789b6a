"""The baselines of a bench run: which of them fit the file's sizes, their calibration, and the file at their sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.bench.baselines.model import Baselines
from bstack.bench.options import CALIBRATED, Choice, Options
from bstack.bench.results import Baseline, Comparison, Point, frontier
from bstack.bench.resume import ResumeFile
from bstack.bench.text import Text, digest
from bstack.calibration.selftext import token_steps, write_windows
from bstack.calibration.texts import HELD_OUT, SELF, open_text, token_windows
from bstack.errors import CalibrationError
from bstack.models.skeleton import Skeleton
from bstack.progress import Progress

__all__ = ["compare", "measure_baselines"]


def measure_baselines(
    file: bstk.Reader,
    options: Options,
    skeleton: Skeleton,
    text: Text,
    scratch: Path,
    resume: ResumeFile,
    notes: list[str],
    progress: Progress,
) -> list[Baseline]:
    """Quantise the original and measure it; without named bits only baselines of a size with the file."""
    runner = Baselines(file, skeleton, text.windows, text.reference, scratch)
    choices = _fitting(file, runner, options.against, notes)
    windows = None
    if any(choice.method in CALIBRATED for choice in choices):
        windows = _calibration(file, options.calibration, skeleton, text.tokenizer, notes, progress)
    found = []
    for choice in choices:

        def run(choice: Choice = choice) -> list[dict[str, Any]]:
            with progress(f"{choice.name} bits", runner.steps) as step:
                measured = runner.measure(choice.method, choice.bits, windows, step, choice.bpw)
                return [baseline.to_plain() for baseline in measured]

        on = ""
        if windows is not None and choice.method in CALIBRATED:
            on = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        found += [Baseline.from_plain(plain) for plain in resume.get(f"{choice.name}:{on}", run)]
    return found


def compare(
    file: bstk.Reader, baselines: Sequence[Baseline], point: Callable[[int, str], Point], notes: list[str]
) -> list[Comparison]:
    """Compare the file with the best of the baselines at their bytes."""
    smallest = file.smallest.budget
    best = frontier(baselines)
    if below := [b.name for b in best if b.sizes.file_bytes < smallest]:
        notes.append(f"Not compared, because they are smaller than the smallest cut of this file: {'; '.join(below)}.")
    return [
        Comparison(b, point(b.sizes.file_bytes, f"at {b.name}'s bytes")) for b in best if b.sizes.file_bytes >= smallest
    ]


def _fitting(file: bstk.Reader, runner: Baselines, choices: Sequence[Choice], notes: list[str]) -> list[Choice]:
    smallest, full = file.smallest.file_bytes, file.fit().file_bytes
    fitting: list[Choice] = []
    left_out: list[Choice] = []
    for choice in choices:
        sizes = [size.file_bytes for size in runner.estimated_sizes(choice.method, choice.bits)]
        inside = min(sizes) <= 1.05 * full and max(sizes) >= smallest
        (fitting if choice.asked or inside else left_out).append(choice)
    if left_out:
        names = ", ".join(choice.name for choice in left_out)
        notes.append(f"Left out, because they are larger or smaller than every cut of this file: {names}.")
    return fitting


def _calibration(
    file: bstk.Reader, given: str | None, skeleton: Skeleton, tokenizer: Any, notes: list[str], progress: Progress
) -> torch.Tensor:
    """Return the calibration windows that the file was made from, or as many of the given text."""
    settings = file.metadata.get("settings") or {}
    samples, length = settings.get("samples", 64), settings.get("sequence_length", 256)
    source = given or settings.get("calibration", SELF)
    if source == SELF:
        # Windows depend on how many are written, so the held-out ones are written, too.
        count = samples + HELD_OUT
        with progress("calibration text", token_steps(count, length)) as step:
            windows = write_windows(skeleton, count, length, seed=settings.get("seed", 0), progress=step)
        return windows[:samples]
    try:
        text = open_text(source)
    except bstk.BstkError as error:
        if given is not None:
            raise
        raise CalibrationError(
            f"This file was calibrated on {source!r}, which cannot be read here. Baselines should have the same text: "
            "name it as calibration, or set calibration to self."
        ) from error
    expected = settings.get("calibration_sha256")
    if (given is None or text.name == settings.get("calibration")) and expected not in (None, digest(text)):
        notes.append(f"Baselines were calibrated on another text {text.name} than this file.")
    return token_windows(text, tokenizer, samples, length, HELD_OUT)[:samples]
