"""How long a model takes to load, what it holds in memory, and how fast its engine runs it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from bstack.engine.generate import decoding
from bstack.engine.native.model import NativeModel
from bstack.kernels.native import instructions, threads
from bstack.memory.process import peak_bytes, resident_bytes
from bstack.models.plain import endless
from bstack.models.skeleton import longest_text

__all__ = ["DECODED", "PROMPT", "REPETITIONS", "Rate", "Running", "Speed", "measure_running", "measure_speed"]

# One sequence, as an interactive user has it. Each test once to warm up, then this often.
PROMPT, DECODED, REPETITIONS = 512, 64, 3


@dataclass(frozen=True)
class Rate:
    """Tokens per second: mean and standard deviation over repetitions."""

    value: float
    deviation: float


@dataclass(frozen=True)
class Speed:
    """Speed at batch size 1; a model of a short context has fewer tokens than usual.

    `engine` is ``native`` or ``transformers``; `unfused` says why that decodes without the fused step, None if it does not.
    """

    prompt_tokens: int
    decoded_tokens: int
    prompt: Rate
    decode: Rate
    threads: int
    kernels: str
    engine: str
    unfused: str | None = None


@dataclass(frozen=True)
class Running:
    """What was measured of a model in a process of its own.

    `load_seconds` excludes the imports of Python packages, and is None when the model was not loaded as a user would.
    `start_memory_bytes` is resident before loading; it grew by `held_memory_bytes` with loading, at most by the peak.
    """

    load_seconds: float | None
    start_memory_bytes: int
    held_memory_bytes: int
    peak_memory_bytes: int
    speed: Speed | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Running:
        """Read what `to_json` returned."""
        speed = values["speed"]
        if speed is not None:
            speed = Speed(**{**speed, "prompt": Rate(**speed["prompt"]), "decode": Rate(**speed["decode"])})
        return cls(**{**values, "speed": speed})


def measure_running(
    load: Callable[[], Any], *, speed: bool, progress: Callable[[], None] = lambda: None, device: str = "cpu"
) -> Running:
    """Load a model and run it, in a process that has imported everything and held no model before.

    Memory is that of the process, or what torch holds of the GPU's.
    """
    held, peak = resident_bytes, peak_bytes
    if device != "cpu":
        held, peak = (partial(read, device) for read in (torch.cuda.memory_reserved, torch.cuda.max_memory_reserved))
    before = held()
    started = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - started
    after = held()
    found = measure_speed(model, progress) if speed else None
    return Running(seconds, before, max(0, after - before), max(0, peak() - before), found)


def measure_speed(model: Any, progress: Callable[[], None] = lambda: None) -> Speed:
    """Time greedy decoding: a prompt of 512 random tokens up to its first new token, then 64 more.

    `model` is a `NativeModel`, or one of transformers, which ``generate()`` runs.
    """
    native = isinstance(model, NativeModel)
    if native:
        context, vocabulary = model.architecture.context, model.architecture.vocabulary
    else:
        config = model.config.get_text_config()
        context, vocabulary = longest_text(config), config.vocab_size
    place = getattr(model, "device", torch.device("cpu"))
    prompt, decoded = _lengths(context)
    ids: list[int] = np.random.default_rng(0).integers(vocabulary, size=prompt).tolist()
    times = []
    for _ in range(REPETITIONS + 1):
        times.append((_once_native if native else _once)(model, ids, decoded))
        progress()
    reading, writing = zip(*times[1:], strict=True)
    return Speed(
        prompt,
        decoded,
        _rate(prompt, reading),
        _rate(decoded, writing),
        threads() if native else torch.get_num_threads(),
        f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else instructions(),
        "native" if native else "transformers",
        None if native else getattr(model, "bstack_unfused", None),
    )


def _lengths(context: int | None) -> tuple[int, int]:
    """Return the tokens of the prompt and after its first new token; fewer in the same proportion for a short context."""
    needed = PROMPT + 1 + DECODED
    if context is None or context >= needed:
        return PROMPT, DECODED
    prompt = max(1, context * PROMPT // needed)
    return prompt, max(1, context - prompt - 1)


def _once_native(model: NativeModel, ids: list[int], decoded: int) -> tuple[float, float]:
    """Return the seconds to the first new token, and those for the tokens after it."""
    started = time.perf_counter()
    text = model.sequence()
    token = int(model.read(text, ids).argmax())
    first = time.perf_counter()
    for _ in range(decoded):
        token = int(model.step([text], [token])[0].argmax())
    return first - started, time.perf_counter() - first


def _once(model: Any, prompt: list[int], decoded: int) -> tuple[float, float]:
    """Return the same of transformers' ``generate()``."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Note when tokens arrive; the prompt arrives first."""

        def __init__(self) -> None:
            self.arrivals: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.arrivals.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    ids = torch.tensor([prompt], device=model.device)
    settings = endless(model, decoded + 1)  # every size does the same work
    started = time.perf_counter()
    with torch.inference_mode(), decoding(model, settings):
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
    _, first, *_, last = clock.arrivals
    return first - started, last - first


def _rate(tokens: int, seconds: tuple[float, ...]) -> Rate:
    rates = [tokens / s for s in seconds]
    return Rate(statistics.mean(rates), statistics.stdev(rates))
