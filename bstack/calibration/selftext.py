"""Calibration text that the model writes itself: no network, no files, and the model's own distribution.

The idea of data-free calibration is that of LLM-QAT (arXiv 2305.17888, section 3.1): start from a random token and
sample on. Each sequence starts with the model's own start token where it has one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bstack.memory.free import free_memory
from bstack.models.skeleton import Skeleton
from bstk.errors import ResourceError

__all__ = ["TOGETHER", "write_windows"]

# Sequences that are generated side by side: enough to use the matrix units, few enough for the cache of keys; and
# the default number with the held-out ones fits in one group.
TOGETHER = 68


def write_windows(
    skeleton: Skeleton,
    samples: int,
    length: int,
    *,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Let the model write token windows.

    Parameters
    ----------
    skeleton : Skeleton
        The model; the whole of it is loaded for the length of the call.
    samples, length : int
        How many windows, and how many tokens each.
    seed : int
        Of the sampling.
    progress : callable
        Called after each token of each group of sequences.

    Returns
    -------
    torch.Tensor
        int64, shape (samples, length).

    Raises
    ------
    bstk.ResourceError
        When the whole model does not fit in the memory that is free.
    """
    _check_memory(skeleton)
    generator = torch.Generator().manual_seed(seed)
    # torch.multinomial inside generate() draws from the global generator: put it where the seed says, and back.
    before = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        with skeleton.loaded(skeleton.model.state_dict()), torch.no_grad():
            groups = [
                _write_group(skeleton, min(TOGETHER, samples - start), length, generator, progress)
                for start in range(0, samples, TOGETHER)
            ]
    finally:
        torch.set_rng_state(before)
    return torch.cat(groups)


def _write_group(
    skeleton: Skeleton, count: int, length: int, generator: torch.Generator, progress: Callable[[], None]
) -> torch.Tensor:
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Report(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
            progress()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    config = skeleton.model.config.get_text_config()
    first = torch.randint(0, config.vocab_size, (count, 1), generator=generator)
    start = getattr(config, "bos_token_id", None)
    if isinstance(start, int) and 0 <= start < config.vocab_size:
        first = torch.cat([torch.full((count, 1), start), first], dim=1)
    # No end token: text after an end is what the model says next, and windows must be full.
    written = skeleton.model.generate(
        first[:, :length],
        attention_mask=torch.ones_like(first[:, :length]),
        generation_config=GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(length - first.shape[1], 1),
            eos_token_id=None, pad_token_id=0, use_cache=True,
        ),
        stopping_criteria=StoppingCriteriaList([Report()]),
    )
    return written[:, :length]


def _check_memory(skeleton: Skeleton) -> None:
    memory = free_memory()  # where the system does not tell, the allocation itself has to
    needed = 4 * sum(p.numel() for p in skeleton.model.parameters())
    if memory is not None and needed > 0.8 * memory.free:
        raise ResourceError(
            f"To write its own calibration text the whole model must be in memory: {needed / 2**30:.1f} GiB as float32, "
            f"{memory.free / 2**30:.1f} GiB are free of {memory.source}. Give a text with --calibration FILE: that streams one "
            "layer at a time."
        )
