"""Estimate how fast this machine decodes with a cut of a model, before any of its blocks is fetched."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np

import bstk
from bstack.kernels.matrix import Matrix, block_bytes
from bstack.kernels.multiply import multiply_many
from bstack.kernels.selftest import random_payload
from bstack.models.names import MatrixName

__all__ = ["expected_speed"]

# Bytes that one call multiplies: more than the caches of most processors hold, and some milliseconds.
MEASURED = 2**25
SECONDS = 0.1


def expected_speed(file: bstk.Reader, cut: bstk.Cut) -> float | None:
    """Return the tokens per second that the products with a cut's blocks allow on this machine as busy as it is.

    The matrix that takes most bytes is multiplied for a tenth of a second, with random blocks of its kinds. The rest of a
    step, such as attention, is not counted. None for experts, of which a token uses some, and for a file without blocks.
    """
    blocks = [chunk for chunk in file.all_chunks[: cut.chunks] if chunk.is_block]
    names = {chunk.name: MatrixName.parse(chunk.name) for chunk in blocks}
    if not blocks or any(name.index is not None for name in names.values()):
        return None
    if any(name.parameter.startswith("lm_head.") for name in names.values()):  # then the embedding is not multiplied
        blocks = [chunk for chunk in blocks if "embed" not in names[chunk.name].parameter]
    sizes: Counter[str] = Counter()
    for chunk in blocks:
        sizes[chunk.name] += chunk.raw_length
    ((largest, _),) = sizes.most_common(1)
    stack = [chunk for chunk in blocks if chunk.name == largest and chunk.kind is not bstk.OUTLIERS]
    rows, columns = stack[0].shape
    rng = np.random.default_rng(0)
    payloads = [(c.kind.code, c.rank, random_payload(rng, rows, columns, c.kind.code, c.rank)) for c in stack]
    size = sum(block_bytes(rows, columns, kind, rank) for kind, rank, _ in payloads)
    matrices = [Matrix.of(rows, columns, payloads) for _ in range(max(1, MEASURED // size))]
    x = rng.standard_normal((1, columns)).astype(np.float32)
    multiply_many(matrices, x)
    calls, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        multiply_many(matrices, x)
        calls += 1
    return size * len(matrices) * calls / seconds / sum(sizes.values())
