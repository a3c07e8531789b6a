"""The quality curve that travels inside the file: divergence from the original at some sizes, on held-out text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import bstk
from bstack.calibration.head import Head
from bstack.compression.assemble import Collected, load_blocks
from bstack.eval.divergence import divergence
from bstack.eval.streamed import run_to_head
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton
from bstk.index import bits_per_weight
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
    """Compare the model at some sizes with the original, one layer in memory at a time; the smallest comes first.

    `windows` are held-out token ids, int64, shape (windows, length). Each point has the number of ``chunks`` kept, ``kld`` and
    its standard error ``kld_se`` (nats per token, over windows), ``same_top`` and ``perplexity``, over all positions but the
    last of each window. `progress` is called once for the original and once for each size.
    """
    hidden_states: list[torch.Tensor] = []
    run_to_head(skeleton, windows, lambda _number, _head, hidden: hidden_states.append(hidden))
    with skeleton.loaded([skeleton.output_name]):
        original_head = skeleton.parameter(skeleton.output_name).data
    progress()
    sizes: Counter[str] = Counter()
    for name, blocks in collected.stacks.items():
        sizes[MatrixName.parse(name).parameter] += math.prod(blocks[0].entry.shape)
    # A large model's weights would be read from the disk once more for each size, only to be overwritten.
    replaced = {name for name, size in sizes.items() if size == skeleton.parameter(name).numel()}
    points = []
    for count in _counts(entries, base_count):
        depths = {entry.name: entry.level + 1 for entry in entries[:count] if entry.kind.is_block}
        found: list[tuple[float, ...]] = []

        def compare(number: int, head: Head, hidden: torch.Tensor) -> None:
            sums = torch.zeros(3, dtype=torch.float64)
            parameter = skeleton.parameter(skeleton.output_name)
            rebuilt_head = parameter.data
            for part in head.parts(
                len(hidden) - 1
            ):  # the positions that predict a token of the window, as in `bstack bench`
                parameter.data = original_head
                original = head.logits(hidden_states[number][part]).log_softmax(-1)
                parameter.data = rebuilt_head
                logits = head.logits(hidden[part])
                compared = divergence(original, logits)
                nll = torch.nn.functional.cross_entropy(logits, windows[number, 1:][part], reduction="sum")
                sums += torch.stack([compared.kl.sum(), compared.same_top.sum(), nll]).cpu()
            found.append(tuple((sums / (len(hidden) - 1)).tolist()))  # noqa: B023

        @contextmanager
        def rebuilt(names: list[str]) -> Iterator[None]:
            with skeleton.loaded(names, unread=replaced):
                stacks = {n: b for n, b in collected.stacks.items() if MatrixName.parse(n).parameter in names}
                load_blocks(skeleton, stacks, depths)  # noqa: B023
                yield

        run_to_head(skeleton, windows, compare, loaded=rebuilt)
        results = torch.tensor(found)
        means = results.mean(0)
        kld_se = results[:, 0].std() / len(results) ** 0.5 if len(results) > 1 else 0.0
        perplexity = means[2].double().clamp_max(700).exp()
        values = {"kld": means[0], "kld_se": kld_se, "same_top": means[1], "perplexity": perplexity}
        # Six digits, because more would differ between machines.
        points.append({"chunks": count, **{name: float(f"{float(value):.6g}") for name, value in values.items()}})
        progress()
    return points


def with_sizes(
    points: list[dict[str, Any]], metadata: dict[str, Any], entries: Sequence[bstk.Entry], base_count: int
) -> dict[str, Any]:
    """Return the metadata with the curve, each point with the bytes of its file and memory.

    The sizes count the metadata that they are part of, so they are computed until they stay the same.
    """
    quality = []
    for point in points:
        kept = entries[: point["chunks"]]
        quality.append(
            {
                "file_bytes": sum(entry.stored_length for entry in kept),
                "memory_bytes": sum(entry.raw_length for entry in kept if entry.kind.is_weight),
                "blocks": sum(entry.kind.is_block for entry in kept),
                "bits_per_weight": round(bits_per_weight(kept) or 0.0, 3),
                **{key: value for key, value in point.items() if key != "chunks"},
            }
        )
    header = 0
    while True:
        complete = {**metadata, "quality": [{**p, "file_bytes": header + p["file_bytes"]} for p in quality]}
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
