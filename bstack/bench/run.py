"""Measure the sizes of one file, its original and baselines, in one run on the same text."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bstk
from bstack.bench.child import Cut, Measure, WriteReference, ask
from bstack.bench.options import Options, even_budgets
from bstack.bench.quality import Quality, original_reference, reference_key
from bstack.bench.reference import Reference
from bstack.bench.results import Baseline, Comparison, Dense, Measured, Original, Point, Report, Source
from bstack.bench.resume import ResumeFile
from bstack.bench.speed import REPETITIONS
from bstack.bench.tasks import file_digests
from bstack.bench.text import Text, file_tokenizer, first_windows, measuring_text, window_length
from bstack.errors import ForeignCodeWarning
from bstack.kernels.native import instructions, processors
from bstack.memory.free import too_little
from bstack.models.skeleton import Skeleton
from bstack.models.tokenizer import check_ids
from bstack.progress import Progress

__all__ = ["run_bench"]

# These decide how fast a process is, and so whether a result of an earlier run may be used.
THREADS = ("OMP_NUM_THREADS", "BSTACK_THREADS")


def run_bench(path: str | os.PathLike[str], options: Options, progress: Progress) -> tuple[Report, ResumeFile]:
    """Measure a file.

    Parameters
    ----------
    path : path
        A .bstk file.
    options : Options
    progress : callable
        Receives each stage and its steps.

    Returns
    -------
    report : Report
    resume : ResumeFile
        To delete when the report is written; until then the same call finds all results in it.

    Raises
    ------
    bstk.BudgetError
        A size is below the base model; before anything is measured.
    bstk.UsageError
        The original is not the one that the file was made from.
    bstk.BstkError
        Anything else that `bstack.load` or a text may raise.
    """
    with ExitStack() as stack:
        file = stack.enter_context(bstk.open(path, warn=False))
        budgets = list(options.budgets or even_budgets(file))
        cuts = [file.fit(budget=budget) for budget in budgets]
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bstack-bench-")))
        run = _Run(file, os.fspath(path), options, scratch, progress)
        done: dict[bstk.Cut, Point] = {}
        points = []
        for number, (budget, cut) in enumerate(zip(budgets, cuts, strict=True), 1):
            if cut not in done:
                done[cut] = run.point(budget, cut, f"size {number} of {len(budgets)}")
            points.append(replace(done[cut], budget=budget))
        dense = run.dense(max(cuts)) if options.speed else []
        baselines, comparisons = run.baselines(done) if options.against else ([], [])
        unfused = [p.measured.running.speed.unfused for p in points if p.measured.running and p.measured.running.speed]
        if reasons := {reason for reason in unfused if reason}:
            run.notes.append(
                f"Tokens are decoded by the model's own code, without the fused step: {', '.join(reasons)}."
            )
        if run.resume.found:
            run.notes.append(f"Results taken from a run of this command that was stopped: {run.resume.found}.")
        return Report(run.source(), points, dense, baselines, comparisons, run.notes), run.resume


class _Run:
    """State of one run."""

    def __init__(self, file: bstk.Reader, path: str, options: Options, scratch: Path, progress: Progress):
        self.file, self.path, self.options, self.scratch, self.progress = file, path, options, scratch, progress
        self.notes: list[str] = []
        self.text: Text | None = None
        self.skeleton: Skeleton | None = None
        if options.quality:
            self.text = self._read_text()
            if options.original is None:
                self.text.reference = self._own_reference(self.text)
            else:
                self.skeleton = self._open_original(options.original, self.text)
                with progress("reference", 2 * len(self.skeleton.layers)) as step:
                    self.text.reference = original_reference(self.skeleton, self.text.windows, scratch, step)
        self.resume = ResumeFile(self._key())

    def _read_text(self) -> Text:
        options = self.options
        length = window_length(self.file, options.sequence_length)
        with self.progress("text", 1) as step:
            source = measuring_text(options.text)
            tokenizer, vocabulary = file_tokenizer(self.file, options.trust_remote_code, options.code)
            windows = first_windows(source, tokenizer, options.windows, length)
            check_ids(windows, vocabulary, tokenizer, source.name)
            text = Text(source, tokenizer, windows, self.scratch / "windows.npy")
            step()
        return text

    def _own_reference(self, text: Text) -> Reference:
        self.notes.append(
            "The divergence (KLD) is measured against this file at its full depth, not against the original. "
            "Name the original to measure against it."
        )
        output = self.scratch / "own.ref"
        with self.progress("own reference", len(text.windows)) as step:
            ask(WriteReference(self._cut(self.file.model.budget), str(text.path), str(output)), step)
        return Reference(output)

    def _open_original(self, model: str, text: Text) -> Skeleton:
        from bstack.models.open import open_checkpoint

        with self.progress("original", 1) as step:
            checkpoint = open_checkpoint(model, self.options.trust_remote_code)
            skeleton = Skeleton(checkpoint)
            made_from = (self.file.metadata.get("model") or {}).get("source")
            if made_from is not None and made_from != checkpoint.provenance():
                message = f"{model} is not the checkpoint this file was made from: its digests differ."
                if not self.options.force:
                    raise bstk.UsageError(
                        f"{message} Name the one it was made from, or set force to measure how far the file is from this one."
                    )
                self.notes.append(f"{message} The divergence says how far the file is from what was given.")
            vocabulary = checkpoint.config.get_text_config().vocab_size
            if not 0 <= int(text.windows.max()) < vocabulary:
                raise bstk.UsageError(
                    f"{model} has a vocabulary of {vocabulary}, but this file's tokenizer has larger token ids.",
                    hint="Name the model that the file was made from.",
                )
            self._check_against(skeleton)
            step()
        return skeleton

    def _check_against(self, skeleton: Skeleton) -> None:
        """Check files, and that the linears can have the bits per weight that were asked for, before minutes of measuring."""
        from bstack.bench.baselines.model import check_gguf
        from bstack.bench.baselines.spqr import check_targets

        for choice in self.options.against:
            if choice.path is not None:
                check_gguf(choice.path, skeleton.parameter(skeleton.output_name).shape[0])

        stacks = [chunk for chunk in self.file.chunks if chunk.is_block and chunk.level == 0]
        layers = [
            [(chunk.shape[0], chunk.shape[1]) for chunk in stacks if chunk.name.startswith(f"{name}.")]
            for name, _ in skeleton.layers
        ]
        check_targets(self.options.against, [shapes for shapes in layers if shapes])

    def _key(self) -> str:
        """Digest what decides the results: file, text, code, versions and threads."""
        on = None
        if self.text is not None and self.skeleton is not None:
            on = reference_key(self.skeleton, self.text.windows)
        elif self.text is not None:
            on = hashlib.sha256(self.text.windows.numpy().tobytes()).hexdigest()
        about = {
            "root": self.file.root.hex(),
            "windows": on,
            "reference": self._reference_name(),
            "full": self.file.model.chunks,
            "versions": {package: version(package) for package in ("bstack", "torch", "transformers")},
            "kernels": instructions(),
            "device": self.options.device,
            "threads": [processors(), *(os.environ.get(name) for name in THREADS)],
            "tasks": file_digests(self.options.tasks),
            "code": self._code(),
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _reference_name(self) -> str | None:
        return None if self.text is None else "full file" if self.skeleton is None else "original"

    def _code(self) -> dict[str, Any] | None:
        """Return the digests of the Python code that the model needs; None where it needs none."""
        from bstack.engine.container import embedded_files
        from bstack.models.code import allowed_code

        if not self.options.trust_remote_code:
            return None
        # The warning belongs to the process that runs the code.
        with embedded_files(self.file) as folder, warnings.catch_warnings(action="ignore", category=ForeignCodeWarning):
            code = allowed_code(self.file, folder, True, self.options.code)
        return None if code is None else code.to_json()

    def _cut(self, budget: int) -> Cut:
        trusted = self.options.trust_remote_code
        return Cut(os.path.abspath(self.path), budget, self.options.code if trusted else None, trusted)

    def point(self, budget: int, cut: bstk.Cut, what: str, *, run: bool = True) -> Point:
        """Measure one size; `run` for load time, memory, speed and tasks, too."""
        speed = run and self.options.speed
        tasks = tuple(self.options.tasks) if run else ()
        text = self.text

        def measure() -> dict[str, Any]:
            steps = (REPETITIONS + 1 if speed else 0) + (0 if text is None else len(text.windows))
            request = Measure(
                self._cut(budget),
                run="packed" if run else None,
                speed=speed,
                device=self.options.device,
                windows=None if text is None else str(text.path),
                reference=None if text is None else text.reference.path,
                tasks=tasks,
            )
            with self.progress(f"{what}: {bstk.mb_text(budget)} MB", steps) as step:
                return ask(request, step).to_plain()

        plain = self.resume.get(f"size:{cut.chunks}:{run}:{speed}:{','.join(tasks)}", measure)
        measured = Measured.from_plain(plain)
        return Point(budget, cut.file_bytes, cut.memory_bytes, self.file.bits_per_weight(cut), measured)

    def dense(self, cut: bstk.Cut) -> list[Dense]:
        """Measure float32 weights, of the file and of the original, to compare the packed sizes with."""
        needed = 4 * sum(math.prod(chunk.shape) for chunk in self.file.chunks if chunk.is_weight and not chunk.level)
        if memory := too_little(needed):
            self.notes.append(
                f"Not compared with the speed of float32 weights: they take {needed / bstk.MB:,.0f} MB, and "
                f"{memory.free / bstk.MB:,.0f} MB are free of {memory.source}."
            )
            return []
        device = self.options.device
        original = self.options.original if device == "cpu" else None  # it is kept on the CPU
        found = []
        for name, run in [("file", "dense"), *([] if original is None else [("original", "original")])]:
            request = Measure(self._cut(cut.budget), run=run, speed=True, device=device, original=original)

            def measure(request: Measure = request, name: str = name) -> dict[str, Any]:
                with self.progress(f"{name} in float32", REPETITIONS + 1) as step:
                    return ask(request, step).to_plain()

            measured = Measured.from_plain(self.resume.get(f"{run}:{cut.chunks}:{original}", measure))
            assert measured.running is not None
            found.append(Dense(name, cut.file_bytes if name == "file" else None, measured.running))
        return found

    def baselines(self, done: dict[bstk.Cut, Point]) -> tuple[Sequence[Baseline], Sequence[Comparison]]:
        """Measure the baselines, and this file at their sizes."""
        from bstack.bench.baselines.model import compare, measure_baselines

        text, skeleton = self.text, self.skeleton
        if text is None or skeleton is None:
            raise bstk.UsageError(
                "Baselines are quantised from the original.", hint="Name the original, and measure quality."
            )
        found = measure_baselines(
            self.file, self.options, skeleton, text, self.scratch, self.resume, self.notes, self.progress
        )

        def point(budget: int, what: str) -> Point:
            cut = self.file.fit_bytes(budget)
            if cut not in done:
                done[cut] = self.point(budget, cut, what, run=False)
            return done[cut]

        return found, compare(self.file, found, point, self.notes)

    def source(self) -> Source:
        """Return what was measured, and on which text."""
        model = self.file.metadata.get("model") or {}
        original = None
        if self.text is not None and self.skeleton is not None:
            extra = self.text.reference.extra
            quality, floor = (Quality.from_plain(extra[name]) for name in ("original", "noise_floor"))
            original = Original(str(self.options.original), self.skeleton.checkpoint.size_bytes, quality, floor)
        text = None if self.text is None else self.text.to_json()
        name, parameters = model.get("name"), model.get("parameters")
        file, root = os.path.basename(self.path), self.file.root.hex()
        return Source(file, root, name, parameters, text, self._reference_name(), original)
