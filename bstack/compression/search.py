"""Order blocks by the paper's perplexity search over a model rebuilt from all its blocks, whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bstack.compression.assemble import Collected, Order
from bstack.compression.layers import layer_part
from bstack.compression.rebuild import load_blocks, rebuild, weight_view
from bstack.eval.perplexity import perplexity
from bstack.models.skeleton import Skeleton
from bstack.ordering.paper import PrefixCache, cut_scores
from bstack.ordering.stack import by_level
from bstack.workdir import Record, WorkDirectory

__all__ = ["paper_order"]

# Tokens of a search run; few, because there are thousands of runs.
SEARCH_TOKENS = 256


def paper_order(
    skeleton: Skeleton, windows: torch.Tensor, collected: Collected, work: WorkDirectory, progress: Callable[[], None]
) -> Order:
    """Score every block by the paper's search and sort level by level; `progress` is called once a layer.

    The scores of finished layers are kept in the work directory.
    """
    parts: list[tuple[str, list[str]]] = [("embeddings", _inside(collected, skeleton, None))]
    parts += [(layer_part(i), _inside(collected, skeleton, i)) for i in range(len(skeleton.layers))]
    scores: dict[str, list[float]] = {}
    with skeleton.loaded(skeleton.model.state_dict()), torch.no_grad():
        load_blocks(skeleton, collected.stacks)
        tokens = windows[:1, :SEARCH_TOKENS]
        cache = PrefixCache([layer for _, layer in skeleton.layers], lambda: perplexity(skeleton.model, tokens))
        for position, (part, names) in enumerate(parts):

            def search(first: int = max(position - 1, 0), names: list[str] = names) -> dict[str, list[float]]:
                with cache.from_layer(first) as measure:
                    stacks = {name: collected.stacks[name] for name in names}
                    return {
                        name: cut_scores(weight_view(skeleton, name, blocks), _prefixes(blocks), measure)
                        for name, blocks in stacks.items()
                    }

            scores.update(work.value(f"search-{part}", search))
            progress()
    return [(name, level + 1, min(score, 1e300)) for name, level, score in by_level(scores)]


def _inside(collected: Collected, skeleton: Skeleton, index: int | None) -> list[str]:
    """Return the names of the stacks in one layer, or outside all layers."""
    if index is not None:
        return [name for name in collected.stacks if name.startswith(skeleton.layers[index][0] + ".")]
    prefixes = tuple(name + "." for name, _ in skeleton.layers)
    return [name for name in collected.stacks if not name.startswith(prefixes)]


def _prefixes(blocks: list[Record]) -> Iterator[torch.Tensor]:
    for count in range(1, len(blocks)):
        yield rebuild(blocks[:count])
