"""Order the blocks of finished parts, as entries for the container's writer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import bstk
from bstack.ordering.stack import by_gain_per_byte
from bstack.workdir import Record, WorkDirectory

__all__ = ["Collected", "collect", "gain_order", "to_entries"]

Order = list[tuple[str, int, float]]


@dataclass(frozen=True)
class Collected:
    """All chunks of a model: files and dense tensors, and the blocks of each linear by level."""

    plain: list[Record]
    stacks: dict[str, list[Record]]


def collect(work: WorkDirectory, parts: Sequence[str]) -> Collected:
    """Read the records of finished parts, in their order."""
    plain: list[Record] = []
    stacks: dict[str, list[Record]] = defaultdict(list)
    for part in parts:
        for record in work.records(part):
            (stacks[record.entry.name] if record.entry.kind.is_block else plain).append(record)
    return Collected(plain, dict(stacks))


def gain_order(stacks: dict[str, list[Record]]) -> Order:
    """Order the blocks above each linear's first by predicted gain per byte.

    The first block of every linear belongs to the base model. Scores are nats per token and MB.
    """
    order = by_gain_per_byte(
        {name: [record.gain for record in blocks[1:]] for name, blocks in stacks.items()},
        {name: [record.entry.stored_length for record in blocks[1:]] for name, blocks in stacks.items()},
    )
    return [(name, level + 1, score * bstk.MB) for name, level, score in order]


def to_entries(collected: Collected, order: Order) -> tuple[list[bstk.Entry], int]:
    """Return the chunks in file order, and how many of them are the base model.

    Parameters
    ----------
    collected : Collected
    order : list of (str, int, float)
        Linear, level from 1, score: the blocks above each linear's first.
    """
    base = [record.entry for record in collected.plain]
    for blocks in collected.stacks.values():
        base.append(_scored(blocks[0], blocks[0].gain * bstk.MB / blocks[0].entry.stored_length))
    above = [_scored(collected.stacks[name][level], score) for name, level, score in order]
    return base + above, len(base)


def _scored(record: Record, importance: float) -> bstk.Entry:
    return replace(record.entry, importance=importance)
