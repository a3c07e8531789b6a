"""What a bench run found, as plain values and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import bstk
from bstack.bench.options import width
from bstack.bench.quality import Quality
from bstack.bench.speed import Running
from bstack.eval.estimates import Estimate

__all__ = ["Baseline", "Comparison", "Dense", "Measured", "Original", "Point", "Report", "Sizes", "Source", "frontier"]


@dataclass(frozen=True)
class Measured:
    """What a child process measured of one size."""

    running: Running | None = None
    quality: Quality | None = None
    tasks: dict[str, Estimate] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Return values that Python's JSON can carry and `from_plain` reads back."""
        running = self.running and self.running.to_json()
        return {"running": running, "quality": self.quality and vars(self.quality), "tasks": self.tasks}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Measured:
        """Read what `to_plain` returned."""
        running, quality = plain["running"], plain["quality"]
        tasks = {name: Estimate(*pair) for name, pair in plain["tasks"].items()}
        return cls(running and Running.from_json(running), quality and Quality.from_plain(quality), tasks)


@dataclass(frozen=True)
class Original:
    """The model that the file was made from: bytes of its weight files, its quality, and the noise floor."""

    model: str
    bytes: int
    quality: Quality
    noise_floor: Quality

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = {"model": self.model, "bytes": self.bytes}
        return {**named, "original": self.quality.to_json(), "noise_floor": self.noise_floor.to_json()}


@dataclass(frozen=True)
class Source:
    """What was measured, and on which text; `reference` is what the divergence is measured against."""

    file: str
    root: str
    model: str | None
    parameters: int | None
    text: dict[str, Any] | None
    reference: str | None
    original: Original | None


@dataclass(frozen=True)
class Point:
    """The file cut to a budget in bytes."""

    budget: int
    file_bytes: int
    memory_bytes: int
    bits_per_weight: float | None
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        m = self.measured
        return {
            "budget_mb": float(bstk.mb_text(self.budget)),
            "file_bytes": self.file_bytes,
            "memory_bytes": self.memory_bytes,
            "bits_per_weight": self.bits_per_weight,
            **(m.quality.to_json() if m.quality is not None else {}),
            **(m.running.to_json() if m.running is not None else {}),
            "tasks": {name: estimate.to_json() for name, estimate in m.tasks.items()},
        }


@dataclass(frozen=True)
class Dense:
    """The ``file`` or the ``original`` with float32 weights, run as the packed sizes are, to compare their speed with."""

    name: str
    file_bytes: int | None
    running: Running

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"name": self.name, "file_bytes": self.file_bytes, **self.running.to_json()}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a quantised model: in a file, each matrix compressed as a .bstk chunk is; and raw, in memory."""

    file_bytes: int
    memory_bytes: int

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.file_bytes + other.file_bytes, self.memory_bytes + other.memory_bytes)


@dataclass(frozen=True)
class Baseline:
    """One measured baseline. `bpw` is SpQR's, if the user chose it.

    Embeddings and head are rounded to nearest. A GGUF file has its name in `file` in place of numbers of bits.
    """

    method: str
    bits: int | None
    embedding_bits: int | None
    sizes: Sizes
    quality: Quality
    bpw: float | None = None
    file: str | None = None

    @property
    def name(self) -> str:
        """Short, for tables."""
        return self.file or f"{self.method} {self.width} bits, embeddings {self.embedding_bits}"

    @property
    def series(self) -> str:
        """The rows of it in a CSV file."""
        return f"{self.method}:{self.file or f'{self.width}, embeddings {self.embedding_bits}'}"

    @property
    def width(self) -> str:
        """Bits of the linears, as the user writes them; of a file its name."""
        return self.file or ("-" if self.bits is None else width(self.bits, self.bpw))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = {key: getattr(self, key) for key in ("method", "bits", "bpw", "embedding_bits", "file")}
        return {**named, **vars(self.sizes), **self.quality.to_json()}

    def to_plain(self) -> dict[str, Any]:
        """Return values that Python's JSON can carry and `from_plain` reads back."""
        return {**vars(self), "sizes": vars(self.sizes), "quality": vars(self.quality)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Baseline:
        """Read what `to_plain` returned."""
        return cls(**{**plain, "sizes": Sizes(**plain["sizes"]), "quality": Quality.from_plain(plain["quality"])})


@dataclass(frozen=True)
class Comparison:
    """A baseline, and the file cut to at most its bytes."""

    baseline: Baseline
    point: Point

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        quality = self.point.measured.quality
        return {
            "baseline": self.baseline.name,
            "baseline_bytes": self.baseline.sizes.file_bytes,
            "file_bytes": self.point.file_bytes,
            "baseline_quality": self.baseline.quality.to_json(),
            "quality": None if quality is None else quality.to_json(),
        }


@dataclass(frozen=True)
class Report:
    """Everything that one run measured; `notes` are sentences for the user."""

    source: Source
    points: Sequence[Point]
    dense: Sequence[Dense] = ()
    baselines: Sequence[Baseline] = ()
    comparisons: Sequence[Comparison] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, schema bstack.bench/1."""
        original = self.source.original
        measured = ("points", "dense", "baselines", "comparisons")
        return {
            **vars(self.source),
            "original": {} if original is None else original.to_json(),
            **{key: [one.to_json() for one in getattr(self, key)] for key in measured},
            "notes": list(self.notes),
        }


def frontier(baselines: Sequence[Baseline]) -> list[Baseline]:
    """Return of each method, by size, the baselines that no other of the method beats with as few bytes."""
    kept: list[Baseline] = []
    for one in sorted(baselines, key=lambda b: (b.method, b.sizes.file_bytes, _kld(b))):
        if not kept or kept[-1].method != one.method or _kld(one) < _kld(kept[-1]):
            kept.append(one)
    return kept


def _kld(baseline: Baseline) -> float:
    kld = baseline.quality.kld
    return math.inf if kld is None else kld.value
