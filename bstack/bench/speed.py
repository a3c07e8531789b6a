"""How fast a model reads and writes, in transformers' own ``generate()``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bstack.kernels.native import instructions

__all__ = ["DECODED", "PROMPT", "REPETITIONS", "Rate", "Speed", "measure_speed"]

# One sequence, as an interactive user has it. Each test once to warm up, then this often.
PROMPT, DECODED, REPETITIONS = 512, 64, 3


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
    kernels : str
        Those in use for packed weights, as ``bstack --version`` names them.
    """

    prompt_tokens: int
    decoded_tokens: int
    prompt: Rate
    decode: Rate
    threads: int
    kernels: str


def measure_speed(model: Any, progress: Callable[[], None] = lambda: None) -> Speed:
    """Time greedy ``generate()``: a prompt of 512 random tokens up to its first new token, then 64 more.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    progress : callable
        Called after each repetition, the first to warm up included.
    """
    config = model.config.get_text_config()
    prompt, decoded = _lengths(getattr(config, "max_position_embeddings", None))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, prompt), generator=generator)
    times = []
    for repetition in range(REPETITIONS + 1):
        found = _once(model, ids, decoded)
        if repetition:
            times.append(found)
        progress()
    reading, writing = zip(*times, strict=True)
    return Speed(
        prompt, decoded, _rate(prompt, reading), _rate(decoded, writing), torch.get_num_threads(), instructions()
    )


def _lengths(room: int | None) -> tuple[int, int]:
    """Tokens of the prompt, and after its first new token: in their usual proportion where the model reads fewer."""
    needed = PROMPT + 1 + DECODED
    if room is None or room >= needed:
        return PROMPT, DECODED
    prompt = max(1, room * PROMPT // needed)
    return prompt, max(1, room - prompt - 1)


def _once(model: Any, ids: torch.Tensor, decoded: int) -> tuple[float, float]:
    """Seconds to the first new token, and for those after it."""
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when tokens arrive; the prompt is handed over first."""

        def __init__(self) -> None:
            self.arrivals: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.arrivals.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    # A field that is None is taken from the model's own configuration. No token ends the text, so that every size does
    # the same work whatever it says.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=decoded + 1,
        use_cache=True,
        eos_token_id=model.config.get_text_config().vocab_size,
        pad_token_id=0,
    )
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
    _, first, *_, last = clock.arrivals
    return first - started, last - first


def _rate(tokens: int, seconds: tuple[float, ...]) -> Rate:
    rates = [tokens / s for s in seconds]
    return Rate(statistics.mean(rates), statistics.stdev(rates) if len(rates) > 1 else 0.0)
