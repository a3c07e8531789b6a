"""The baselines of a bench run: which of them, calibrated on what, and the file at their sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.bench.baselines.choice import CALIBRATED, Choice
from bstack.bench.baselines.run import Baseline, Baselines
from bstack.bench.reference import Reference
from bstack.bench.results import Comparison, Point, frontier
from bstack.bench.resume import Rows
from bstack.bench.text import digest
from bstack.calibration.selftext import token_steps, write_windows
from bstack.calibration.texts import HELD_OUT, SELF, open_text, token_windows
from bstack.errors import CalibrationError
from bstack.models.skeleton import Skeleton
from bstack.progress import Progress

__all__ = ["Against"]


class Against:
    """Measures baselines of a file's original.

    Parameters
    ----------
    file : bstk.Reader
    skeleton : Skeleton
        The original, nothing loaded.
    tokenizer : transformers.PreTrainedTokenizerBase
    windows : torch.Tensor
        To measure on; int64, shape (windows, length).
    reference : Reference
        The original's log probabilities on them.
    scratch : Path
        A temporary folder.
    rows : Rows
        Where results are kept.
    notes : list of str
        Receives sentences for the user.
    progress : callable
    """

    def __init__(
        self,
        file: bstk.Reader,
        skeleton: Skeleton,
        tokenizer: Any,
        windows: torch.Tensor,
        reference: Reference,
        scratch: Path,
        rows: Rows,
        notes: list[str],
        progress: Progress,
    ):
        self._file, self._skeleton, self._tokenizer = file, skeleton, tokenizer
        self._rows, self._notes, self._progress = rows, notes, progress
        self._runner = Baselines(file, skeleton, windows, reference, scratch)

    def measure(self, choices: Sequence[Choice], calibration: str | None) -> list[Baseline]:
        """Quantise and measure; those that were not asked for by their bits only if they are of a size with the file.

        Parameters
        ----------
        choices : sequence of Choice
        calibration : str or None
            A text for GPTQ and SpQR; None for what the file's metadata names.

        Raises
        ------
        bstack.errors.CalibrationError
            The text cannot be had, or is too short.
        """
        fitting = self._fitting(choices)
        windows = self._calibration(calibration) if any(choice.method in CALIBRATED for choice in fitting) else None
        found = []
        for choice in fitting:

            def run(choice: Choice = choice) -> list[Any]:
                with self._progress(f"{choice.name} bits", self._runner.steps(choice.method)) as step:
                    return [
                        b.to_plain()
                        for b in self._runner.measure(choice.method, choice.bits, windows, step, choice.bpw)
                    ]

            on = _hash(windows) if choice.method in CALIBRATED else ""
            found += [Baseline.from_plain(plain) for plain in self._rows.get(f"{choice.name}:{on}", run)]
        return found

    def compare(self, baselines: Sequence[Baseline], point: Callable[[int, str], Point]) -> list[Comparison]:
        """Compare the file with the best of the baselines at their bytes.

        Parameters
        ----------
        baselines : sequence of Baseline
        point : callable
            Measures the file at a budget in bytes; the text says what for.
        """
        smallest = self._file.smallest.budget
        best = frontier(baselines)
        if below := [b.name for b in best if b.sizes.file_bytes < smallest]:
            self._notes.append(
                f"Smaller than the smallest cut of this file, so nothing compares with them: {'; '.join(below)}."
            )
        return [
            Comparison(b, point(b.sizes.file_bytes, f"at {b.name}'s bytes"))
            for b in best
            if b.sizes.file_bytes >= smallest
        ]

    def _fitting(self, choices: Sequence[Choice]) -> list[Choice]:
        smallest, full = self._file.smallest.file_bytes, self._file.fit().file_bytes
        fitting, left_out = [], []
        for choice in choices:
            sizes = [size.file_bytes for size in self._runner.estimated_sizes(choice.method, choice.bits)]
            inside = min(sizes) <= 1.05 * full and max(sizes) >= smallest
            (fitting if choice.asked or inside else left_out).append(choice)
        if left_out:
            names = ", ".join(choice.name for choice in left_out)
            self._notes.append(f"Left out, as they are larger or smaller than every cut of this file: {names}.")
        return fitting

    def _calibration(self, given: str | None) -> torch.Tensor:
        """The calibration windows that the file was made from, or as many of the text given."""
        settings = self._file.metadata.get("settings") or {}
        samples, length = settings.get("samples", 64), settings.get("sequence_length", 256)
        source = given or settings.get("calibration", SELF)
        if source == SELF:
            # Windows depend on how many are written: with those held out they are the ones that the file was made from.
            count = samples + HELD_OUT
            with self._progress("calibration text", token_steps(count, length)) as step:
                return write_windows(self._skeleton, count, length, seed=settings.get("seed", 0), progress=step)[
                    :samples
                ]
        try:
            text = open_text(source)
        except bstk.BstkError as error:
            if given is not None:
                raise
            raise CalibrationError(
                f"This file was calibrated on {source!r}, which is not here. Baselines should have the same text: give it "
                "with --calibration FILE, or --calibration self."
            ) from error
        expected = settings.get("calibration_sha256")
        if (given is None or text.name == settings.get("calibration")) and expected not in (None, digest(text)):
            self._notes.append(
                f"Baselines were calibrated on {text.name}, whose text is not the one this file was calibrated on."
            )
        return token_windows(text, self._tokenizer, samples, length, HELD_OUT)[:samples]


def _hash(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()
