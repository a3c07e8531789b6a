"""Quantise a whole model with a baseline, count its bytes, measure it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bstk
from bstack.bench.baselines.choice import CALIBRATED, width
from bstack.bench.baselines.gptq import gptq
from bstack.bench.baselines.grid import GridMatrix
from bstack.bench.baselines.rtn import round_to_nearest
from bstack.bench.baselines.spqr import SpqrMatrix, spqr
from bstack.bench.quality import Quality, Scores
from bstack.bench.reference import Reference
from bstack.calibration.statistics import gather
from bstack.calibration.stream import LayerStream
from bstack.eval.streamed import altered, run_streamed
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton, layer_parameters

__all__ = ["Baseline", "Baselines", "Sizes"]

EMBEDDING_BITS = (8, 4)
TOKENS_TOGETHER = 4096


@dataclass(frozen=True)
class Sizes:
    """Bytes of a quantised model: in a file, each matrix compressed as a .bstk chunk is; and raw, in memory."""

    file_bytes: int
    memory_bytes: int

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.file_bytes + other.file_bytes, self.memory_bytes + other.memory_bytes)


@dataclass(frozen=True)
class Baseline:
    """One measured baseline.

    Attributes
    ----------
    method : str
    bits, embedding_bits : int
        Of the linears, and of embeddings and head (always rounded to nearest).
    sizes : Sizes
    quality : Quality
    bpw : float or None
        SpQR: what the linears of a layer may take, in bits per weight, if it was chosen.
    """

    method: str
    bits: int
    embedding_bits: int
    sizes: Sizes
    quality: Quality
    bpw: float | None = None

    @property
    def name(self) -> str:
        """Short, for tables."""
        return f"{self.method} {self.width} bits, embeddings {self.embedding_bits}"

    @property
    def width(self) -> str:
        """Bits of the linears, as ``--against`` names them."""
        return width(self.bits, self.bpw)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "method": self.method,
            "bits": self.bits,
            "bpw": self.bpw,
            "embedding_bits": self.embedding_bits,
            "file_bytes": self.sizes.file_bytes,
            "memory_bytes": self.sizes.memory_bytes,
            **self.quality.to_json(),
        }

    def to_plain(self) -> dict[str, Any]:
        """As values that JSON can carry and `from_plain` reads back."""
        return {**vars(self), "sizes": vars(self.sizes), "quality": vars(self.quality)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Baseline:
        """What `to_plain` gave."""
        return cls(**{**plain, "sizes": Sizes(**plain["sizes"]), "quality": Quality.from_plain(plain["quality"])})


class Baselines:
    """Runs baselines on the matrices that a .bstk file keeps as stacks; everything else stays as in the file.

    Parameters
    ----------
    file : bstk.Reader
        Says which matrices are quantised, and what the rest of a file costs.
    skeleton : Skeleton
        The original, nothing loaded.
    windows : torch.Tensor
        To measure on.
    reference : Reference
        The original's log probabilities on them.
    scratch : Path
        A temporary folder; a quantised model is kept there while it is measured.
    """

    def __init__(
        self, file: bstk.Reader, skeleton: Skeleton, windows: torch.Tensor, reference: Reference, scratch: Path
    ):
        self._skeleton, self._windows, self._reference, self._scratch = skeleton, windows, reference, scratch
        self._tables = list(dict.fromkeys((skeleton.input_name, skeleton.output_name)))
        inside = tuple(name + "." for name, _ in skeleton.layers)
        self._linears = {
            chunk.name: chunk
            for chunk in file.chunks
            if chunk.is_block and chunk.level == 0 and chunk.name.startswith(inside)
        }
        plain = [chunk for chunk in file.chunks if not chunk.is_block and chunk.name not in self._tables]
        self._rest = Sizes(
            sum(chunk.stored_length for chunk in plain), sum(chunk.raw_length for chunk in plain if chunk.is_weight)
        )

    def estimated_sizes(self, method: str, bits: int) -> list[Sizes]:
        """Nearly the bytes at each number of bits for the embeddings, without quantising anything."""
        # Groups of 16, an order of the inputs and outliers take SpQR about .7 bits per weight more than groups of 64.
        more = 0.7 if method == "spqr" else 0
        linear = sum(
            _raw_bytes(chunk.shape, bits) + int(math.prod(chunk.shape) * more / 8) for chunk in self._linears.values()
        )
        found = []
        for embedding_bits in EMBEDDING_BITS:
            tables = sum(_raw_bytes(self._skeleton.parameter(name).shape, embedding_bits) for name in self._tables)
            found.append(Sizes(linear + tables, linear + tables) + self._rest)
        return found

    def steps(self, method: str) -> int:
        """How often `measure` will report progress."""
        return len(self._skeleton.layers) * (1 + len(EMBEDDING_BITS))

    def measure(
        self,
        method: str,
        bits: int,
        calibration: torch.Tensor | None,
        progress: Callable[[], None] = lambda: None,
        bpw: float | None = None,
    ) -> list[Baseline]:
        """Quantise and measure, with the embeddings at 8 bits and at 4.

        Parameters
        ----------
        method : str
            ``rtn``, ``gptq`` or ``spqr``.
        bits : int
            Of the linears.
        calibration : torch.Tensor or None
            Token ids, int64, shape (samples, length), which GPTQ and SpQR need.
        progress : callable
            Called once for each layer while quantising, and in each pass of measuring.
        bpw : float, optional
            SpQR: bits per weight that the linears of a layer may take together.
        """
        store = _Store(self._scratch / f"{method}-{bits}")
        if method in CALIBRATED:
            self._quantise_in_order(method, calibration, bits, store, progress, bpw)
        else:
            self._quantise_each(bits, store, progress)
        found = []
        for embedding_bits in EMBEDDING_BITS:
            tables = _Store(self._scratch / f"tables-{embedding_bits}")
            for name in self._tables:
                with self._skeleton.loaded([name]):
                    tables.put(name, round_to_nearest(self._skeleton.parameter(name), embedding_bits))
            scores = Scores(self._windows, self._reference)
            quantised = altered(self._skeleton, self._alter(store, tables))
            run_streamed(self._skeleton, self._windows, scores.add, loaded=quantised, progress=progress)
            sizes = store.sizes + tables.sizes + self._rest
            found.append(Baseline(method, bits, embedding_bits, sizes, scores.quality(), bpw))
            tables.delete()
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
        """Layer after layer, each calibrated on what the quantised layers before it put out, as the paper does."""
        batches = list(calibration.split(max(1, TOKENS_TOGETHER // calibration.shape[1])))
        skeleton = self._skeleton
        with skeleton.loaded(skeleton.outer_names), LayerStream(skeleton, batches) as stream:
            for index, _ in stream.steps():
                with skeleton.loaded(skeleton.layer_names(index)):
                    table = gather(stream, index, layer_parameters(skeleton, index))
                    weights = self._weights(index)
                    # An expert that no token reached has no moments: rounding to nearest is all there is.
                    seen = {name: table.statistics(name) for name in weights if name in table.operands}
                    together = {}
                    if method == "spqr":
                        together = spqr({n: (weights[n], s.hessian, s.tokens) for n, s in seen.items()}, bits, bpw)
                    for name, weight in weights.items():
                        if name not in seen:
                            matrix = round_to_nearest(weight, bits)
                        else:
                            matrix = together[name] if method == "spqr" else gptq(weight, seen[name].hessian, bits)
                        store.put(name, matrix)
                        weight.copy_(matrix.dense())
                    stream.run_all(index)
                progress()

    def _in_layer(self, index: int) -> list[str]:
        inside = self._skeleton.layers[index][0] + "."
        return [name for name in self._linears if name.startswith(inside)]

    def _weights(self, index: int) -> dict[str, torch.Tensor]:
        """The matrices to quantise in a loaded layer, as (outputs, inputs); views."""
        found = {}
        for name in self._in_layer(index):
            matrix = MatrixName.parse(name)
            found[name] = matrix.view(self._skeleton.parameter(matrix.parameter), self._linears[name].transposed)
        return found

    def _alter(self, store: _Store, tables: _Store):
        parts: dict[str, list[str]] = {}
        for name in self._linears:
            parts.setdefault(MatrixName.parse(name).parameter, []).append(name)

        def alter(parameter: str, value: torch.Tensor) -> torch.Tensor | None:
            if parameter in self._tables:
                return tables.dense(parameter)
            if parameter not in parts:
                return None
            altered = torch.empty_like(value)  # an expert parameter is quantised in all its slices or in none
            for name in parts[parameter]:
                MatrixName.parse(name).view(altered, self._linears[name].transposed).copy_(store.dense(name))
            return altered

        return alter


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
