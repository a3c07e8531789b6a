"""Quantise a whole model with a baseline, count its bytes, measure it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import bstk
from bstack.bench.baselines.gptq import gptq
from bstack.bench.baselines.rtn import GridMatrix, round_to_nearest
from bstack.bench.baselines.spqr import SpqrMatrix, spqr
from bstack.bench.options import CALIBRATED
from bstack.bench.quality import Scores
from bstack.bench.reference import Reference
from bstack.bench.results import Baseline, Sizes
from bstack.calibration.statistics import gather
from bstack.calibration.stream import LayerStream
from bstack.eval.streamed import Loaded, altered, run_streamed
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton, layer_parameters

__all__ = ["Baselines"]

EMBEDDING_BITS = (8, 4)
TOKENS_TOGETHER = 4096


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
        self._rest = Sizes(
            sum(chunk.stored_length for chunk in plain), sum(chunk.raw_length for chunk in plain if chunk.is_weight)
        )

    def estimated_sizes(self, method: str, bits: int) -> list[Sizes]:
        """Estimate the bytes at each number of bits for the embeddings, without quantising anything."""
        # SpQR's groups of 16, its order of the inputs and its outliers take about .7 bits per weight more than groups of 64.
        more = 0.7 if method == "spqr" else 0
        linear = sum(
            _raw_bytes(chunk.shape, bits) + int(math.prod(chunk.shape) * more / 8) for chunk in self._linears.values()
        )
        found = []
        for embedding_bits in EMBEDDING_BITS:
            embeddings = sum(
                _raw_bytes(self._skeleton.parameter(name).shape, embedding_bits) for name in self._embeddings
            )
            found.append(Sizes(linear + embeddings, linear + embeddings) + self._rest)
        return found

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
        batches = list(calibration.split(max(1, TOKENS_TOGETHER // calibration.shape[1])))
        skeleton = self._skeleton
        with skeleton.loaded(skeleton.outer_names), LayerStream(skeleton, batches) as stream:
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

    def _in_layer(self, index: int) -> list[str]:
        inside = self._skeleton.layers[index][0] + "."
        return [name for name in self._linears if name.startswith(inside)]

    def _weights(self, index: int) -> dict[str, torch.Tensor]:
        """Return views of the matrices to quantise in a loaded layer, as (outputs, inputs)."""
        found = {}
        for name in self._in_layer(index):
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
