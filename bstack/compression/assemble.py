"""Finished parts -> the universal stack, as entries for the container's writer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import bstk
from bstack.ordering.stack import by_gain_per_byte
from bstack.workdir import Record, WorkDirectory

__all__ = ["Collected", "collect", "gain_order", "to_entries"]

Source = tuple[Record, Callable[[], bytes]]
Order = list[tuple[str, int, float]]


@dataclass(frozen=True)
class Collected:
    """All chunks of a model.

    Attributes
    ----------
    plain : list
        Files and dense tensors.
    stacks : dict
        By linear: its blocks by level.
    """

    plain: list[Source]
    stacks: dict[str, list[Source]]


def collect(work: WorkDirectory, parts: Sequence[str]) -> Collected:
    """Read the records of finished parts, in that order."""
    plain: list[Source] = []
    stacks: dict[str, list[Source]] = defaultdict(list)
    for part in parts:
        for record, read in work.entries(part):
            if record.kind in (bstk.FILE.code, bstk.TENSOR.code):
                plain.append((record, read))
            else:
                stacks[record.name].append((record, read))
    return Collected(plain, dict(stacks))


def gain_order(stacks: dict[str, list[Source]]) -> Order:
    """Order the blocks above each linear's first by predicted gain per byte.

    The first block of every linear belongs to the smallest model. Scores are nats per token and MB.
    """
    order = by_gain_per_byte(
        {name: [record.gain for record, _ in blocks[1:]] for name, blocks in stacks.items()},
        {name: [record.stored_length for record, _ in blocks[1:]] for name, blocks in stacks.items()},
    )
    return [(name, level + 1, score * bstk.MB) for name, level, score in order]


def to_entries(collected: Collected, order: Order) -> tuple[list[bstk.Entry], int]:
    """The chunks in file order, and how many of them are the smallest model.

    Parameters
    ----------
    collected : Collected
    order : list of (str, int, float)
        Linear, level from 1, score: the blocks above each linear's first.
    """
    base = [_entry(source, 0.0) for source in collected.plain]
    for blocks in collected.stacks.values():
        record = blocks[0][0]
        base.append(_entry(blocks[0], record.gain * bstk.MB / record.stored_length))
    above = [_entry(collected.stacks[name][level], score) for name, level, score in order]
    return base + above, len(base)


def _entry(source: Source, importance: float) -> bstk.Entry:
    record, read = source
    return bstk.Entry(
        name=record.name,
        kind=bstk.kinds.BY_CODE[record.kind],
        level=record.level,
        shape=tuple(record.shape),
        dtype=record.dtype,
        rank=record.rank,
        transposed=record.transposed,
        importance=importance,
        error=record.error,
        raw_length=record.raw_length,
        stored_length=record.stored_length,
        digest=bytes.fromhex(record.digest),
        stored=read,
    )
