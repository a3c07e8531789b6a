"""Estimate how fast this machine decodes with cuts of a model, before any of its blocks is read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

import bstk
from bstack.kernels.matrix import Matrix, block_bytes
from bstack.kernels.multiply import multiply_many
from bstack.kernels.native import library
from bstack.kernels.selftest import random_payload
from bstack.models.names import MatrixName

__all__ = ["expected_speeds"]

# Bytes that one call multiplies: more than the caches of most processors hold, and some milliseconds.
MEASURED = 2**25
MATRICES = 1024
SECONDS = 0.1

# What decides the bytes a second of a block: its kind, and the number of weights that its index calls rank.
_Form = tuple[bstk.Kind, int]


def expected_speeds(file: bstk.Reader, cuts: Sequence[bstk.Cut]) -> list[float | None]:
    """Return the tokens per second that the products with each cut's blocks allow on this machine as busy as it is.

    For each form of blocks, random ones of the matrix with most of their bytes are multiplied for a tenth of a second. The
    rest of a step, such as attention, is not counted. None for experts, of which a token uses some, for a cut without blocks,
    and where the C kernels are missing.
    """
    blocks = [(number, chunk) for number, chunk in enumerate(file.all_chunks) if chunk.is_block]
    names = {chunk.name: MatrixName.parse(chunk.name) for _, chunk in blocks}
    if library() is None or any(name.index is not None for name in names.values()):
        return [None] * len(cuts)
    if any(name.parameter.startswith("lm_head.") for name in names.values()):  # then the embedding is not multiplied
        blocks = [(number, chunk) for number, chunk in blocks if "embed" not in names[chunk.name].parameter]
    last = max((cut.chunks for cut in cuts), default=0)
    sizes: Counter[tuple[_Form, tuple[int, ...]]] = Counter()
    for number, chunk in blocks:
        if number < last and chunk.kind is not bstk.OUTLIERS:
            sizes[(chunk.kind, chunk.rank), chunk.shape] += chunk.raw_length
    rates: dict[_Form, float] = {}
    for (form, shape), _ in sizes.most_common():
        if form not in rates:
            rates[form] = _rate(form, shape)
    slowest = min(
        rates.values(), default=0.0
    )  # outliers, which random payloads do not show, are some percent of the bytes
    found: list[float | None] = []
    for cut in cuts:
        here = [chunk for number, chunk in blocks if number < cut.chunks]
        seconds = sum(chunk.raw_length / rates.get((chunk.kind, chunk.rank), slowest) for chunk in here)
        found.append(1 / seconds if seconds else None)
    return found


def _rate(form: _Form, shape: tuple[int, ...]) -> float:
    """Return the bytes a second of products with blocks of a form."""
    (kind, rank), (rows, columns) = form, shape
    payload = random_payload(np.random.default_rng(0), rows, columns, kind.code, rank)
    size = block_bytes(rows, columns, kind.code, rank)
    matrices = [
        Matrix.of(rows, columns, [(kind.code, rank, payload)]) for _ in range(min(max(1, MEASURED // size), MATRICES))
    ]
    x = np.random.default_rng(1).standard_normal((1, columns)).astype(np.float32)
    multiply_many(matrices, x)
    calls, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        multiply_many(matrices, x)
        calls += 1
    return size * len(matrices) * calls / seconds
