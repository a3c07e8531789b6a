"""Order the blocks of finished parts for the container's writer, and rebuild the model from the first ones of each stack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

import bstk
from bstack.codecs import codec_of_kind
from bstack.eval.perplexity import perplexity
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton
from bstack.ordering.orders import PrefixCache, by_gain_per_byte, by_level, cut_scores
from bstack.workdir import Record, WorkDirectory
from bstk.frames import unpack

__all__ = ["Collected", "collect", "gain_order", "load_blocks", "paper_order", "to_entries"]

# Tokens of a search run; few, because there are thousands of runs.
SEARCH_TOKENS = 256

# Linear, level from 1, score: the blocks above each linear's first, which belongs to the base model.
Order = list[tuple[str, int, float]]
Stacks = Mapping[str, Sequence[Record]]


class Collected(NamedTuple):
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


def to_entries(collected: Collected, order: Order) -> tuple[list[bstk.Entry], int]:
    """Return the chunks in file order, and how many of them are the base model."""
    base = [record.entry for record in collected.plain]
    for first, *_ in collected.stacks.values():
        base.append(replace(first.entry, importance=first.gain * bstk.MB / first.entry.stored_length))
    above = [replace(collected.stacks[name][level].entry, importance=score) for name, level, score in order]
    return base + above, len(base)


def gain_order(stacks: Stacks) -> Order:
    """Order the blocks by predicted gain per byte; scores are nats per token and MB."""
    order = by_gain_per_byte(
        {name: [record.gain for record in blocks[1:]] for name, blocks in stacks.items()},
        {name: [record.entry.stored_length for record in blocks[1:]] for name, blocks in stacks.items()},
    )
    return [(name, level + 1, score * bstk.MB) for name, level, score in order]


def paper_order(
    skeleton: Skeleton,
    windows: torch.Tensor,
    stacks: Stacks,
    part_names: Sequence[str],
    work: WorkDirectory,
    progress: Callable[[], None],
) -> Order:
    """Order the blocks level by level, by the paper's perplexity search over a model rebuilt from all of them.

    The scores of finished parts, ``embeddings`` and the layers (`part_names`), are kept in the work directory.
    """
    prefixes = [f"{name}." for name, _ in skeleton.layers]
    inside = [[name for name in stacks if name.startswith(prefix)] for prefix in prefixes]
    outside = [name for name in stacks if not name.startswith(tuple(prefixes))]
    scores: dict[str, list[float]] = {}
    with skeleton.loaded(skeleton.model.state_dict()), torch.no_grad():
        load_blocks(skeleton, stacks)
        tokens = windows[:1, :SEARCH_TOKENS]
        cache = PrefixCache([layer for _, layer in skeleton.layers], lambda: perplexity(skeleton.model, tokens))
        for position, (part, names) in enumerate(zip(part_names, [outside, *inside], strict=True)):

            def search(first: int = max(position - 1, 0), names: list[str] = names) -> dict[str, list[float]]:
                with cache.from_layer(first) as measure:
                    return {
                        name: cut_scores(_view(skeleton, name, stacks[name]), _prefixes(stacks[name]), measure)
                        for name in names
                    }

            scores.update(work.value(f"search-{part}", search))
            progress()
    return [(name, level + 1, min(score, 1e300)) for name, level, score in by_level(scores)]


def load_blocks(skeleton: Skeleton, stacks: Stacks, depths: Mapping[str, int] | None = None) -> None:
    """Overwrite loaded weights with the first blocks of their stacks, or all."""
    with torch.no_grad():
        for name, blocks in stacks.items():
            depth = len(blocks) if depths is None else depths[name]
            _view(skeleton, name, blocks).copy_(_rebuild(blocks[:depth]))


def _rebuild(blocks: Sequence[Record]) -> torch.Tensor:
    """Add up the first blocks of a stack; float32, shape (outputs, inputs)."""
    entries = [record.entry for record in blocks]
    kinds = [entry.kind for entry in entries]
    payloads = [unpack(record.read(), record.entry.raw_length) for record in blocks]
    rows, columns = entries[0].shape
    return codec_of_kind(kinds[0]).rebuild(payloads, kinds, [entry.rank for entry in entries], (rows, columns))


def _view(skeleton: Skeleton, name: str, blocks: Sequence[Record]) -> torch.Tensor:
    """Return a view of the loaded weight that a stack replaces, as (outputs, inputs)."""
    matrix = MatrixName.parse(name)
    return matrix.view(skeleton.parameter(matrix.parameter), blocks[0].entry.transposed)


def _prefixes(blocks: Sequence[Record]) -> Iterator[torch.Tensor]:
    for count in range(1, len(blocks)):
        yield _rebuild(blocks[:count])
