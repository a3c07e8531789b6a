"""The quality curve that travels inside the file: divergence from the original at some sizes, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import bstk
from bstack.compression.assemble import Collected
from bstack.compression.rebuild import load_blocks
from bstack.eval.divergence import divergence
from bstack.eval.streamed import Loaded, run_streamed
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton
from bstk.writer import build_header

__all__ = ["SIZES", "measure_curve", "with_sizes"]

SIZES = 6


def measure_curve(
    skeleton: Skeleton,
    windows: torch.Tensor,
    collected: Collected,
    entries: Sequence[bstk.Entry],
    base_count: int,
    progress: Callable[[], None],
) -> list[dict[str, Any]]:
    """Compare the model at some sizes with the original, one layer in memory at a time.

    Parameters
    ----------
    skeleton : Skeleton
    windows : torch.Tensor
        Held-out token ids, int64, shape (windows, length).
    collected : Collected
        All chunks.
    entries : sequence of bstk.Entry
        The chunks in file order.
    base_count : int
        How many of them are the base model.
    progress : callable
        Called once for the original and once for each size.

    Returns
    -------
    list of dict
        Smallest first: ``chunks`` kept, ``kld`` and its standard error ``kld_se`` (nats per token, over windows),
        ``same_top``, and ``perplexity`` on these windows, all over every position but the last of a window.
    """
    original: list[torch.Tensor] = []
    run_streamed(skeleton, windows, lambda _, logits: original.append(_predicting(logits).log_softmax(-1)))
    progress()
    points = []
    for count in _counts(entries, base_count):
        found: list[tuple[float, float, float]] = []

        def compare(number: int, logits: torch.Tensor) -> None:
            logits = _predicting(logits)
            compared = divergence(original[number], logits)
            nll = torch.nn.functional.cross_entropy(logits, windows[number, 1:])
            found.append((float(compared.kl.mean()), float(compared.same_top.mean()), float(nll)))  # noqa: B023

        run_streamed(skeleton, windows, compare, loaded=_rebuilt(skeleton, collected, _depths(entries[:count])))
        results = torch.tensor(found)
        means = results.mean(0)
        points.append(
            {
                "chunks": count,
                "kld": _round(means[0]),
                "kld_se": _round(results[:, 0].std() / len(results) ** 0.5) if len(results) > 1 else 0.0,
                "same_top": _round(means[1]),
                "perplexity": _round(means[2].double().clamp_max(700).exp()),
            }
        )
        progress()
    return points


def with_sizes(
    points: list[dict[str, Any]], metadata: dict[str, Any], entries: Sequence[bstk.Entry], base_count: int
) -> dict[str, Any]:
    """Return the metadata with the curve, each point with the bytes of its file and memory.

    The sizes count the metadata that they are part of, so they are computed until they stay the same.
    """
    stored = [0]
    memory = [0]
    weights = blocks = 0
    blocks_before, bits_before = [0], [0]
    for entry in entries:
        stored.append(stored[-1] + entry.stored_length)
        memory.append(memory[-1] + entry.raw_length * entry.kind.is_weight)
        blocks += entry.kind.is_block
        blocks_before.append(blocks)
        bits_before.append(bits_before[-1] + 8 * entry.raw_length * entry.kind.is_block)
        weights += entry.shape[0] * entry.shape[1] if entry.kind.is_block and entry.level == 0 else 0
    header = 0
    while True:
        quality = [
            {
                "file_bytes": header + stored[p["chunks"]],
                "memory_bytes": memory[p["chunks"]],
                "blocks": blocks_before[p["chunks"]],
                "bits_per_weight": round(bits_before[p["chunks"]] / weights, 3) if weights else 0.0,
                **{key: value for key, value in p.items() if key != "chunks"},
            }
            for p in points
        ]
        complete = {**metadata, "quality": quality}
        head, tables = build_header(complete, entries, base_count)
        length = len(head.to_bytes()) + len(tables)
        if length == header:
            return complete
        header = length


def _counts(entries: Sequence[bstk.Entry], base_count: int) -> list[int]:
    """Return the numbers of chunks that cut the blocks above the base model into about equal parts."""
    above = [entry.stored_length for entry in entries[base_count:]]
    total, counts, passed = sum(above), [base_count], 0
    for position, size in enumerate(above, base_count + 1):
        passed += size
        if passed * (SIZES - 1) >= total * len(counts):
            counts.append(position)
    return sorted({*counts[:SIZES], len(entries)})


def _depths(entries: Sequence[bstk.Entry]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for entry in entries:
        if entry.kind.is_block:
            depths[entry.name] = entry.level + 1
    return depths


def _rebuilt(skeleton: Skeleton, collected: Collected, depths: dict[str, int]) -> Loaded:
    """Load parameters from stacks of some depths, the others from the checkpoint."""

    @contextmanager
    def loaded(names: list[str]) -> Iterator[None]:
        with skeleton.loaded(names):
            load_blocks(
                skeleton, {n: b for n, b in collected.stacks.items() if MatrixName.parse(n).parameter in names}, depths
            )
            yield

    return loaded


def _predicting(logits: torch.Tensor) -> torch.Tensor:
    """Return the positions that predict a token of the window, which count in all figures, as in `bstack bench`."""
    return logits[:-1].float()


def _round(value: torch.Tensor) -> float:
    """Round to six digits, because more would differ between machines."""
    return float(f"{float(value):.6g}")
