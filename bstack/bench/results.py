"""What a bench run found, as plain values and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bstack.bench.baselines.run import Baseline
    from bstack.bench.child import Measured
    from bstack.bench.running import Running

__all__ = ["Comparison", "Dense", "Point", "Report", "Source", "frontier"]


@dataclass(frozen=True)
class Source:
    """What was measured, and on what.

    Attributes
    ----------
    file : str
        Its name, without folders.
    root : str
        Its root digest, in hexadecimal digits.
    model : str or None
    parameters : int or None
    text : dict or None
        ``name``, ``sha256``, ``windows``, ``sequence_length``; None when quality was not measured.
    reference : str or None
        What the divergence is measured against: ``original`` or ``full file``.
    original : dict
        ``model``, ``bytes`` of its weight files, its own quality (``original``) and the ``noise_floor``; empty when
        no original was given.
    """

    file: str
    root: str
    model: str | None
    parameters: int | None
    text: dict[str, Any] | None
    reference: str | None
    original: dict[str, Any]

    def value(self, which: str, figure: str) -> float | None:
        """A figure of the ``original`` or the ``noise_floor``; None when there is none."""
        return ((self.original.get(which) or {}).get(figure) or {}).get("value")


@dataclass(frozen=True)
class Point:
    """The file at one size.

    Attributes
    ----------
    mb : Decimal
        The budget.
    file_bytes, memory_bytes : int
        What the cut takes as a file and as packed weights in memory.
    bits_per_weight : float or None
    measured : Measured
    """

    mb: Decimal
    file_bytes: int
    memory_bytes: int
    bits_per_weight: float | None
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        m = self.measured
        return {
            "budget_mb": float(self.mb),
            "file_bytes": self.file_bytes,
            "memory_bytes": self.memory_bytes,
            "bits_per_weight": self.bits_per_weight,
            **(m.quality.to_json() if m.quality is not None else {}),
            **(m.running.to_json() if m.running is not None else {}),
            "tasks": {name: estimate.to_json() for name, estimate in m.tasks.items()},
        }


@dataclass(frozen=True)
class Dense:
    """A model with float32 weights, run as the packed sizes are, to compare their speed with.

    Attributes
    ----------
    name : str
        ``file`` or ``original``.
    file_bytes : int or None
        Of the cut; None for the original.
    running : Running
    """

    name: str
    file_bytes: int | None
    running: Running

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"name": self.name, "file_bytes": self.file_bytes, **self.running.to_json()}


@dataclass(frozen=True)
class Comparison:
    """A baseline, and the file cut to at most its bytes."""

    baseline: Baseline
    point: Point

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "baseline": self.baseline.name,
            "baseline_bytes": self.baseline.sizes.file_bytes,
            "file_bytes": self.point.file_bytes,
            "baseline_quality": self.baseline.quality.to_json(),
            "quality": self.point.measured.quality.to_json(),
        }


@dataclass(frozen=True)
class Report:
    """Everything.

    Attributes
    ----------
    source : Source
    points : list of Point
    dense : list of Dense
    baselines : list of Baseline
    comparisons : list of Comparison
    notes : list of str
        Sentences for the user.
    """

    source: Source
    points: Sequence[Point]
    dense: Sequence[Dense] = ()
    baselines: Sequence[Baseline] = ()
    comparisons: Sequence[Comparison] = ()
    notes: Sequence[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, schema bstack.bench/1."""
        return {
            **vars(self.source),
            "points": [point.to_json() for point in self.points],
            "dense": [dense.to_json() for dense in self.dense],
            "baselines": [baseline.to_json() for baseline in self.baselines],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "notes": list(self.notes),
        }


def frontier(baselines: Sequence[Baseline]) -> list[Baseline]:
    """Of each method, by size, those that no other of the method beats with as few bytes.

    So of two roundings of the embeddings the better one at those bytes remains; both where neither is better.
    """
    kept = []
    for one in sorted(baselines, key=lambda b: (b.method, b.sizes.file_bytes, b.quality.kld.value)):
        if not kept or kept[-1].method != one.method or one.quality.kld.value < kept[-1].quality.kld.value:
            kept.append(one)
    return kept
