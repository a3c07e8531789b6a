"""Quantise whole models with the baselines, count their bytes, measure them, and compare the file with them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.bench.baselines.gptq import gptq
from bstack.bench.baselines.rtn import GridMatrix, round_to_nearest
from bstack.bench.baselines.spqr import SpqrMatrix, spqr
from bstack.bench.options import CALIBRATED, GGUF, Choice, Options
from bstack.bench.quality import Scores
from bstack.bench.reference import Reference
from bstack.bench.results import Baseline, Comparison, Point, Sizes, frontier
from bstack.bench.resume import ResumeFile
from bstack.bench.text import Text, digest
from bstack.calibration.selftext import token_steps, write_windows
from bstack.calibration.statistics import gather
from bstack.calibration.stream import LayerStream, batches_of
from bstack.calibration.texts import HELD_OUT, SELF, open_text, token_windows
from bstack.eval.streamed import Loaded, altered, run_streamed
from bstack.models.names import MatrixName
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton, layer_parameters
from bstack.models.tokenizer import check_ids
from bstack.progress import Progress

__all__ = ["Baselines", "check_gguf", "compare", "measure_baselines"]

EMBEDDING_BITS = (8, 4)


class Baselines:
    """Runs baselines on the matrices that a .bstk file keeps as stacks; everything else stays as in the file.

    A quantised model is kept in the folder `scratch` while it is measured on `windows` against the original's `reference`.
    """

    def __init__(
        self, file: bstk.Reader, skeleton: Skeleton, windows: torch.Tensor, reference: Reference, scratch: Path
    ):
        self._skeleton, self._windows, self._reference, self._scratch = skeleton, windows, reference, scratch
        self._embeddings = list(dict.fromkeys((skeleton.input_name, skeleton.output_name)))
        inside = tuple(name + "." for name, _ in skeleton.layers)
        self._linears = {
            chunk.name: chunk
            for chunk in file.chunks
            if chunk.is_block and chunk.level == 0 and chunk.name.startswith(inside)
        }
        plain = [chunk for chunk in file.chunks if not chunk.is_block and chunk.name not in self._embeddings]
        in_memory = sum(chunk.raw_length for chunk in plain if chunk.is_weight)
        self._rest = Sizes(sum(chunk.stored_length for chunk in plain), in_memory)

    def estimated_sizes(self, method: str, bits: int) -> list[Sizes]:
        """Estimate the bytes at each number of bits for the embeddings, without quantising anything."""
        # SpQR's groups of 16, its order of the inputs and its outliers take about .7 bits per weight more than groups of 64.
        more = 0.7 if method == "spqr" else 0
        linears = [chunk.shape for chunk in self._linears.values()]
        linear = sum(_raw_bytes(shape, bits) + int(math.prod(shape) * more / 8) for shape in linears)
        shapes = [self._skeleton.parameter(name).shape for name in self._embeddings]
        totals = [linear + sum(_raw_bytes(shape, own) for shape in shapes) for own in EMBEDDING_BITS]
        return [Sizes(total, total) + self._rest for total in totals]

    @property
    def steps(self) -> int:
        """How often `measure` reports progress."""
        return len(self._skeleton.layers) * (1 + len(EMBEDDING_BITS))

    def measure(
        self,
        method: str,
        bits: int,
        calibration: torch.Tensor | None,
        progress: Callable[[], None] = lambda: None,
        bpw: float | None = None,
    ) -> list[Baseline]:
        """Quantise and measure, with the embeddings at 8 bits and at 4; `calibration` is for GPTQ and SpQR."""
        store = _Store(self._scratch / f"{method}-{bits}")
        if calibration is not None and method in CALIBRATED:
            self._quantise_in_order(method, calibration, bits, store, progress, bpw)
        else:
            self._quantise_each(bits, store, progress)
        found = []
        for embedding_bits in EMBEDDING_BITS:
            embeddings = _Store(self._scratch / f"embeddings-{embedding_bits}")
            for name in self._embeddings:
                with self._skeleton.loaded([name]):
                    embeddings.put(name, round_to_nearest(self._skeleton.parameter(name), embedding_bits))
            scores = Scores(self._windows, self._reference)
            quantised = self._altered(store, embeddings)
            run_streamed(self._skeleton, self._windows, scores.add, loaded=quantised, progress=progress)
            sizes = store.sizes + embeddings.sizes + self._rest
            found.append(Baseline(method, bits, embedding_bits, sizes, scores.quality(), bpw))
            embeddings.delete()
        store.delete()
        return found

    def _quantise_each(self, bits: int, store: _Store, progress: Callable[[], None]) -> None:
        for index in range(len(self._skeleton.layers)):
            with self._skeleton.loaded(self._skeleton.layer_names(index)):
                for name, weight in self._weights(index).items():
                    store.put(name, round_to_nearest(weight, bits))
            progress()

    def _quantise_in_order(
        self,
        method: str,
        calibration: torch.Tensor,
        bits: int,
        store: _Store,
        progress: Callable[[], None],
        bpw: float | None,
    ) -> None:
        """Quantise layer after layer, each calibrated on the output of the quantised layers before it, as the paper does."""
        batches = batches_of(calibration)
        skeleton = self._skeleton
        with skeleton.loaded(skeleton.outside_names), LayerStream(skeleton, batches) as stream:
            for index, _ in stream.steps():
                with skeleton.loaded(skeleton.layer_names(index)):
                    statistics = gather(stream, index, layer_parameters(skeleton, index))
                    weights = self._weights(index)
                    # An expert that no token reached has no hessian, so it is rounded to nearest.
                    seen = {name: statistics.statistics(name) for name in weights if name in statistics.operands}
                    together = {}
                    if method == "spqr":
                        together = spqr({n: (weights[n], s.hessian, s.tokens) for n, s in seen.items()}, bits, bpw)
                    for name, weight in weights.items():
                        matrix: GridMatrix | SpqrMatrix
                        if name not in seen:
                            matrix = round_to_nearest(weight, bits)
                        elif method == "spqr":
                            matrix = together[name]
                        else:
                            matrix = gptq(weight, seen[name].hessian, bits)
                        store.put(name, matrix)
                        weight.copy_(matrix.dense())
                    stream.run_all(index)
                progress()

    def _weights(self, index: int) -> dict[str, torch.Tensor]:
        """Return views of the matrices to quantise in a loaded layer, as (outputs, inputs)."""
        inside = self._skeleton.layers[index][0] + "."
        found = {}
        for name in filter(lambda name: name.startswith(inside), self._linears):
            matrix = MatrixName.parse(name)
            found[name] = matrix.view(self._skeleton.parameter(matrix.parameter), self._linears[name].transposed)
        return found

    def _altered(self, store: _Store, embeddings: _Store) -> Loaded:
        parts: dict[str, list[str]] = {}
        for name in self._linears:
            parts.setdefault(MatrixName.parse(name).parameter, []).append(name)

        def alter(parameter: str, value: torch.Tensor) -> torch.Tensor | None:
            if parameter in self._embeddings:
                return embeddings.dense(parameter)
            if parameter not in parts:
                return None
            new = torch.empty_like(value)  # an expert parameter is quantised in all its slices or in none
            for name in parts[parameter]:
                MatrixName.parse(name).view(new, self._linears[name].transposed).copy_(store.dense(name))
            return new

        return altered(self._skeleton, alter)


def _raw_bytes(shape: Sequence[int], bits: int) -> int:
    rows, columns = shape
    return rows * (columns * bits + -(-columns // 64) * (16 + bits)) // 8


class _Store:
    """Quantised matrices on disk."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir()
        self._files: dict[str, Path] = {}
        self.sizes = Sizes(0, 0)

    def put(self, name: str, matrix: GridMatrix | SpqrMatrix) -> None:
        payload = matrix.payload()
        self.sizes += Sizes(bstk.pack(payload).stored_length, len(payload))
        self._files[name] = self._folder / f"{len(self._files)}.pt"
        torch.save(vars(matrix), self._files[name])

    def dense(self, name: str) -> torch.Tensor:
        parts = torch.load(self._files[name])
        return (GridMatrix if "codes" in parts else SpqrMatrix)(**parts).dense()

    def delete(self) -> None:
        for path in self._files.values():
            os.unlink(path)
        self._folder.rmdir()


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
    """Quantise the original and measure it; without named bits only baselines of a size with the file. Also measure GGUF files."""
    runner = Baselines(file, skeleton, text.windows, text.reference, scratch)
    choices = _fitting(file, runner, [choice for choice in options.against if choice.method != GGUF], notes)
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
    paths = [choice.path for choice in options.against if choice.path is not None]
    return found + [_measure_gguf(path, text, resume, progress) for path in paths]


def check_gguf(path: str, vocabulary: int) -> Skeleton:
    """Open a GGUF file to compare with; raise BstkError if it cannot be run, or has another vocabulary than the original."""
    skeleton = Skeleton(open_checkpoint(path, trust_remote_code=False))
    found = skeleton.parameter(skeleton.output_name).shape[0]
    if found != vocabulary:
        raise bstk.UsageError(
            f"{path} has a vocabulary of {found}, but the original has one of {vocabulary}.",
            hint="Name a file of the same model.",
        )
    return skeleton


def _measure_gguf(path: str, text: Text, resume: ResumeFile, progress: Progress) -> Baseline:
    """Measure a GGUF file, dequantised; its bytes are those of the file."""
    skeleton = Skeleton(open_checkpoint(path, trust_remote_code=False))
    checkpoint = skeleton.checkpoint

    def run() -> list[dict[str, Any]]:
        scores = Scores(text.windows, text.reference)
        with progress(checkpoint.name, len(skeleton.layers)) as step:
            run_streamed(skeleton, text.windows, scores.add, progress=step)
        sizes = Sizes(checkpoint.size_bytes, checkpoint.size_bytes)
        return [Baseline(GGUF, None, None, sizes, scores.quality(), file=os.path.basename(path)).to_plain()]

    digests = ",".join(file["sha256"] for file in checkpoint.provenance()["files"])
    (plain,) = resume.get(f"{GGUF}:{digests}", run)
    return Baseline.from_plain(plain)


def compare(
    file: bstk.Reader, baselines: Sequence[Baseline], point: Callable[[int, str], Point], notes: list[str]
) -> list[Comparison]:
    """Compare the file with the best of the baselines at their bytes."""
    base = file.base.budget
    best = frontier(baselines)
    if below := [b.name for b in best if b.sizes.file_bytes < base]:
        notes.append(f"Not compared, because they are smaller than the base model of this file: {'; '.join(below)}.")
    comparable = [b for b in best if b.sizes.file_bytes >= base]
    return [Comparison(b, point(b.sizes.file_bytes, f"at {b.name}'s bytes")) for b in comparable]


def _fitting(file: bstk.Reader, runner: Baselines, choices: Sequence[Choice], notes: list[str]) -> list[Choice]:
    base, full = file.base.file_bytes, file.model.file_bytes
    fitting: list[Choice] = []
    left_out: list[Choice] = []
    for choice in choices:
        sizes = [size.file_bytes for size in runner.estimated_sizes(choice.method, choice.bits)]
        inside = min(sizes) <= 1.05 * full and max(sizes) >= base
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
        raise bstk.BstkError(
            f"This file was calibrated on {source!r}, which cannot be read here. Baselines should have the same text: "
            "name it as calibration, or set calibration to self.",
            option="calibration",
        ) from error
    expected = settings.get("calibration_sha256")
    if (given is None or text.name == settings.get("calibration")) and expected not in (None, digest(text)):
        notes.append(f"Baselines were calibrated on another text {text.name} than this file.")
    windows = token_windows(text, tokenizer, samples, length, HELD_OUT)[:samples]
    check_ids(windows, skeleton.parameter(skeleton.input_name).shape[0], tokenizer, text.name)
    return windows
