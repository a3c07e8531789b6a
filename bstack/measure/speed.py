"""How fast a model reads and writes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["DECODED", "PROMPT", "Rate", "Speed", "measure_speed"]

# One sequence, as an interactive user has it. Each test once to warm up, then this often.
PROMPT, DECODED, REPETITIONS = 128, 32, 3


class Rate(NamedTuple):
    """Tokens per second: mean and standard deviation over repetitions."""

    value: float
    deviation: float


class Speed(NamedTuple):
    """Speed at batch size 1.

    Attributes
    ----------
    prompt_tokens, decoded_tokens : int
        How many; fewer than usual for a model of a short context.
    prompt, decode : Rate
    threads : int
        Of torch.
    """

    prompt_tokens: int
    decoded_tokens: int
    prompt: Rate
    decode: Rate
    threads: int


def measure_speed(model: Any, progress: Callable[[], None] = lambda: None) -> Speed:
    """Time the model on random tokens: a prompt of 128, then 32 tokens one by one after it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    progress : callable
        Called after each repetition, the first to warm up included.
    """
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or PROMPT + DECODED
    prompt = max(1, min(PROMPT, room * PROMPT // (PROMPT + DECODED)))
    decoded = max(1, min(DECODED, room - prompt))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, prompt + decoded), generator=generator)
    times = []
    for repetition in range(REPETITIONS + 1):
        found = _once(model, ids, prompt)
        if repetition:
            times.append(found)
        progress()
    reading, writing = zip(*times, strict=True)
    return Speed(prompt, decoded, _rate(prompt, reading), _rate(decoded, writing), torch.get_num_threads())


def _once(model: Any, ids: torch.Tensor, prompt: int) -> tuple[float, float]:
    """Seconds for the prompt, and for the rest token by token."""
    with torch.inference_mode():
        started = time.perf_counter()
        state = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
        between = time.perf_counter()
        for position in range(prompt, ids.shape[1]):
            # The tokens are given, so that every size does the same work whatever it would say.
            state = model(input_ids=ids[:, position : position + 1], past_key_values=state, use_cache=True).past_key_values
        return between - started, time.perf_counter() - between


def _rate(tokens: int, seconds: tuple[float, ...]) -> Rate:
    rates = [tokens / s for s in seconds]
    return Rate(statistics.mean(rates), statistics.stdev(rates) if len(rates) > 1 else 0.0)
