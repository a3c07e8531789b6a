"""Estimate how much memory a compression takes, before it starts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bstack.calibration.head import LOGITS_TOGETHER
from bstack.calibration.selftext import number_of, writing_bytes
from bstack.calibration.sensitivity import BACKWARD_TOKENS
from bstack.calibration.stream import TOKENS_TOGETHER
from bstack.calibration.texts import SELF
from bstack.compression.encode import WIDE, Workers
from bstack.compression.layers import layer_shapes
from bstack.memory.free import free_memory
from bstack.memory.process import resident_bytes
from bstack.models.skeleton import Skeleton
from bstack.progress import Plan
from bstack.settings import Settings
from bstk.errors import ResourceError

__all__ = ["plan"]

FLOAT = 4
# Copies of an array that exist at the same time.
LOGITS, ACTIVATIONS, HESSIANS, MATRICES = 5, 4, 3, 4
# The same on a GPU, where a factor in double precision lies beside its hessian up to a width; and of a layer's gradients.
DEVICE_HESSIANS, DEVICE_MATRICES, GRADIENTS = 5, 8, 16
# What the heaps of threads hold beside these arrays: SmolLM2 takes 2.0 GB where they make 1.3. On a GPU what its libraries hold.
HEAPS = 700 * 2**20
# What cuBLAS takes at most for each thread; each batch that passes through the layers has one.
WORKSPACE = 32 * 2**20
# Of a GPU's memory: the rest is lost between blocks of different sizes.
USABLE = 0.95


def plan(skeleton: Skeleton, settings: Settings, workers: Workers) -> Plan:
    """Estimate the most memory that this process will hold, in whichever stage takes most; on a GPU also of that.

    Parameters
    ----------
    skeleton : Skeleton
        The model, nothing loaded.
    settings : Settings
    workers : Workers
        Who encodes the matrices; those of a cluster are counted as if they were here.

    Raises
    ------
    bstk.ResourceError
        The GPU has too little memory.
    """
    sizes = _Sizes(skeleton)
    held, memory = resident_bytes(), free_memory()
    free = None if memory is None else held + memory.free
    if workers.device.type != "cpu":
        loading = 2 * max(sizes.layer, sizes.head)
        needed, device_free = _on_device(skeleton, sizes, settings), _free(workers.device)
        if needed > device_free:
            raise _too_small(skeleton, sizes, settings, workers.device, needed, device_free)
        return Plan(held + loading + HEAPS, free, needed, device_free)
    tokens = settings.samples * settings.sequence_length
    matrix = FLOAT * (HESSIANS * sizes.inputs**2 + MATRICES * sizes.matrix)
    states = sizes.states(tokens)
    logits = LOGITS * FLOAT * LOGITS_TOGETHER
    stages = [
        sizes.rest + states + sizes.layer + max(sizes.running(tokens), workers.max_pending(sizes.inputs) * matrix),
        sizes.rest + states + sizes.head + logits,  # sensitivities
        sizes.rest + 2 * sizes.head + logits,  # the curve
    ]
    if settings.calibration == SELF:
        stages.append(writing_bytes(skeleton, settings.samples, settings.sequence_length))
    return Plan(held + max(stages) + HEAPS, free)


class _Sizes:
    """What decides the memory of a model's stages: bytes of parameters, and the largest matrices."""

    def __init__(self, skeleton: Skeleton):
        def size(names: Iterable[str]) -> int:
            return FLOAT * sum(skeleton.parameter(name).numel() for name in names)

        self.width = skeleton.parameter(skeleton.output_name).shape[1]
        self.layers = list(layer_shapes(skeleton))
        shapes = [shape for layer in self.layers for either in layer for shape in either] or [(1, 1)]
        self.widest, self.inputs = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
        self.matrix = max(rows * columns for rows, columns in shapes)
        self.rest, self.head = size(skeleton.rest_names), size([skeleton.output_name])
        self.layer = max(size(skeleton.layer_names(index)) for index in range(len(skeleton.layers)))

    def states(self, tokens: int) -> int:
        """Return the bytes of the hidden states in front of a layer and behind it."""
        return 2 * FLOAT * tokens * self.width

    def running(self, tokens: int) -> int:
        """Return the bytes of what tokens that pass through a layer together leave in it."""
        return ACTIVATIONS * FLOAT * min(TOKENS_TOGETHER, tokens) * self.widest


def _on_device(skeleton: Skeleton, sizes: _Sizes, settings: Settings) -> int:
    """Return the most bytes of a GPU that a stage takes."""
    tokens, length = settings.samples * settings.sequence_length, settings.sequence_length
    logits, states = LOGITS * FLOAT * LOGITS_TOGETHER, sizes.states(tokens)
    hessians = FLOAT * max(
        (sum(max(n for _, n in either) ** 2 for either in layer) for layer in sizes.layers), default=0
    )
    copies = HESSIANS if sizes.inputs > WIDE else DEVICE_HESSIANS
    matrix = FLOAT * (copies * sizes.inputs**2 + DEVICE_MATRICES * sizes.matrix)
    heads = number_of(skeleton.model.config.get_text_config(), "num_attention_heads") or 1
    together = max(BACKWARD_TOKENS, length)
    backward = FLOAT * together * (GRADIENTS * sizes.widest + ACTIVATIONS * heads * length)
    stages = [
        sizes.rest + states + sizes.layer + hessians + max(sizes.running(tokens), matrix),
        sizes.rest + states + sizes.head + sizes.layer + max(logits, backward),
        sizes.rest + 2 * sizes.head + sizes.layer + logits,
    ]
    if settings.calibration == SELF:
        stages.append(writing_bytes(skeleton, settings.samples, length))
    threads = 1 + -(-settings.samples // max(1, TOKENS_TOGETHER // length))
    return int(max(stages) / USABLE) + HEAPS + WORKSPACE * threads


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _too_small(
    skeleton: Skeleton, sizes: _Sizes, settings: Settings, device: torch.device, needed: int, free: int
) -> ResourceError:
    """Return the error of a GPU with too little memory, with what fits."""

    def fits(changed: Settings) -> bool:
        return _on_device(skeleton, sizes, changed) <= free

    with_text = settings.with_changes(calibration="text" if settings.calibration == SELF else None)
    samples = settings.samples
    while samples > 1 and not fits(with_text.with_changes(samples=samples)):
        samples //= 2
    few = with_text.with_changes(samples=samples)
    hint = "Compress on the CPU."
    if fits(few):
        least = _on_device(skeleton, sizes, few)
        words = ["a calibration text" if settings.calibration == SELF else ""]
        words.append(f"samples of {samples}" if samples < settings.samples else "")
        hint = f"With {' and '.join(filter(None, words))} it takes about {least / 2**30:.1f} GiB."
    return ResourceError(
        f"{device} ({torch.cuda.get_device_name(device)}) has {free / 2**30:.1f} GiB of free memory; compressing "
        f"{skeleton.checkpoint.name} takes about {needed / 2**30:.1f} GiB of it.",
        hint=hint,
    )
