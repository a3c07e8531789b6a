"""Estimate how much memory a compression takes, before it starts."""

from __future__ import annotations

from collections.abc import Iterable

from bstack.calibration.head import LOGITS_TOGETHER
from bstack.calibration.selftext import writing_bytes
from bstack.calibration.stream import TOKENS_TOGETHER
from bstack.calibration.texts import SELF
from bstack.compression.encode import Workers
from bstack.compression.layers import layer_shapes
from bstack.memory.free import free_memory
from bstack.memory.process import resident_bytes
from bstack.models.skeleton import Skeleton
from bstack.progress import Plan
from bstack.settings import Settings

__all__ = ["plan"]

FLOAT = 4
# Copies of an array that exist at the same time.
LOGITS, ACTIVATIONS, HESSIANS, MATRICES = 5, 4, 3, 4
# What the heaps of threads hold beside these arrays: SmolLM2 takes 2.0 GB where they make 1.3.
HEAPS = 700 * 2**20


def plan(skeleton: Skeleton, settings: Settings, workers: Workers) -> Plan:
    """Estimate the most memory that this process will hold, in whichever stage takes most.

    Parameters
    ----------
    skeleton : Skeleton
        The model, nothing loaded.
    settings : Settings
    workers : Workers
        Who encodes the matrices; those of a cluster are counted as if they were here.
    """

    def size(names: Iterable[str]) -> int:
        return FLOAT * sum(skeleton.parameter(name).numel() for name in names)

    table = skeleton.parameter(skeleton.output_name)
    shapes = [shape for layer in layer_shapes(skeleton) for either in layer for shape in either] or [(1, 1)]
    widest, inputs = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
    rest, head = size(skeleton.rest_names), size([skeleton.output_name])
    layer = max(size(skeleton.layer_names(index)) for index in range(len(skeleton.layers)))
    logits = LOGITS * FLOAT * LOGITS_TOGETHER
    states = 2 * FLOAT * settings.samples * settings.sequence_length * table.shape[1]
    running = ACTIVATIONS * FLOAT * min(TOKENS_TOGETHER, settings.samples * settings.sequence_length) * widest
    matrix = FLOAT * (HESSIANS * inputs**2 + MATRICES * max(rows * columns for rows, columns in shapes))
    stages = [
        rest + states + layer + max(running, workers.max_pending(inputs) * matrix),
        rest + states + head + logits,  # sensitivities
        rest + 2 * head + logits,  # the curve
    ]
    if settings.calibration == SELF:
        stages.append(writing_bytes(skeleton, settings.samples, settings.sequence_length))
    held, memory = resident_bytes(), free_memory()
    return Plan(held + max(stages) + HEAPS, None if memory is None else held + memory.free)
