"""Run an original model over windows, one layer in memory at a time, with its weights as they are or altered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from bstack.calibration.head import Head
from bstack.calibration.stream import LayerStream
from bstack.models.skeleton import Skeleton

__all__ = ["Loaded", "altered", "run_streamed", "run_to_head", "to_bfloat16"]

# Names of parameters -> a context in which the skeleton holds them.
Loaded = Callable[[list[str]], AbstractContextManager[None]]


def run_streamed(
    skeleton: Skeleton,
    windows: torch.Tensor,
    finish: Callable[[int, torch.Tensor], Any],
    *,
    loaded: Loaded | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Run the model, and hand the logits of every window to `finish`.

    Parameters
    ----------
    skeleton : Skeleton
        The model, nothing loaded.
    windows : torch.Tensor
        Token ids, int64, shape (windows, length); each is run on its own.
    finish : callable
        Called in the order of the windows with the number and the logits, float32, shape (length, vocabulary).
    loaded : callable, optional
        Loads the parameters of a layer, given their names; by default `skeleton.loaded`.
    progress : callable
        Called after each layer.
    """

    def give_logits(number: int, head: Head, hidden: torch.Tensor) -> None:
        finish(number, head.logits(hidden))

    run_to_head(skeleton, windows, give_logits, loaded=loaded, progress=progress)


def run_to_head(
    skeleton: Skeleton,
    windows: torch.Tensor,
    finish: Callable[[int, Head, torch.Tensor], Any],
    *,
    loaded: Loaded | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Run the model, and hand the last hidden states of every window to `finish`, with the head that makes logits of them.

    The other parameters are those of `run_streamed`.
    """
    # Batches reach the end in their order.
    numbers = iter(range(len(windows)))

    def run(ids: torch.Tensor) -> None:
        head = Head(skeleton.model)
        hidden = head.hidden(ids)
        finish(next(numbers), head, hidden)

    loaded = loaded or skeleton.loaded
    with (
        loaded(skeleton.rest_names),
        LayerStream(skeleton, list(windows.split(1)), run=run, embedding=lambda name: loaded([name])) as stream,
    ):
        for index, _ in stream.steps():
            with loaded(skeleton.layer_names(index)):
                stream.run_all(index)
            progress()


def altered(skeleton: Skeleton, alter: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Loaded:
    """Return a way to load parameters from the checkpoint with some of them replaced.

    `alter` receives the name and value of every loaded parameter; it returns a new tensor, or None to keep it.
    """

    @contextmanager
    def loaded(names: list[str]) -> Iterator[None]:
        with skeleton.loaded(names):
            for name in names:
                parameter = skeleton.parameter(name)
                if isinstance(parameter, torch.nn.Parameter) and (value := alter(name, parameter.data)) is not None:
                    parameter.data = value
            yield

    return loaded


def to_bfloat16(_name: str, value: torch.Tensor) -> torch.Tensor | None:
    """Convert weights, and so the arithmetic, to bfloat16."""
    return value.bfloat16() if value.is_floating_point() else None
