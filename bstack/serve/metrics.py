"""Counters of the server in the text form of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from bstack.serve.scheduler import Job, Scheduler
from bstack.serve.size import Size

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """What /metrics shows; the scheduler counts for itself."""

    def __init__(self, scheduler: Scheduler, size: Size):
        self._scheduler, self._size = scheduler, size
        self._registry = CollectorRegistry()
        self._registry.register(self)
        own: dict[str, Any] = {"namespace": "bstack", "registry": self._registry}
        self._answers = Counter("http_responses", "Answers by address and status.", ["path", "status"], **own)
        self._first = Histogram("first_token_seconds", "From a request to its first token.", buckets=_SECONDS, **own)
        self._whole = Histogram("text_seconds", "From a request to the end of its text.", buckets=_SECONDS, **own)

    def answered(self, path: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(path, str(status)).inc()

    def finished(self, jobs: Sequence[Job]) -> None:
        """Count the times of texts that have ended."""
        for job in jobs:
            if job.first_token is not None:
                self._first.observe(job.first_token)
                self._whole.observe(job.seconds)

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """Yield what the scheduler and the model count, for the registry."""
        scheduler, size = self._scheduler, self._size.state()
        tokens = CounterMetricFamily(
            "bstack_tokens", "Tokens of prompts read, found again, and written.", labels=["kind"]
        )
        tokens.add_metric(["read"], scheduler.read_tokens)
        tokens.add_metric(["found"], scheduler.found_tokens)
        tokens.add_metric(["written"], scheduler.new_tokens)
        yield tokens
        texts = CounterMetricFamily("bstack_texts", "Texts by their end.", labels=["end"])
        for end, count in scheduler.ended.items():
            texts.add_metric([end], count)
        yield texts
        yield GaugeMetricFamily("bstack_texts_running", "Texts that run.", len(scheduler.running))
        yield GaugeMetricFamily("bstack_texts_waiting", "Texts that wait.", len(scheduler.waiting))
        yield GaugeMetricFamily("bstack_weight_megabytes", "Weights in memory.", size["mb"])
        yield GaugeMetricFamily("bstack_bits_per_weight", "Bits per weight in memory.", size["bits_per_weight"] or 0)
        kept = scheduler.prefixes.pages * scheduler.page_bytes
        yield GaugeMetricFamily("bstack_prompt_cache_bytes", "Keys and values of kept prompts.", kept)
