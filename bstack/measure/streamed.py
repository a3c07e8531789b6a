"""Run an original model over windows, one layer in memory at a time, with its weights as they are or altered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bstack.calibration.stream import LayerStream
from bstack.models.skeleton import Skeleton

__all__ = ["Alter", "run_streamed", "to_bfloat16"]

Alter = Callable[[str, torch.Tensor], "torch.Tensor | None"]


def run_streamed(
    skeleton: Skeleton,
    windows: torch.Tensor,
    finish: Callable[[int, torch.Tensor], Any],
    *,
    alter: Alter | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Hand the logits of every window to `finish`.

    Parameters
    ----------
    skeleton : Skeleton
        The model, nothing loaded.
    windows : torch.Tensor
        Token ids, int64, shape (windows, length); each is run on its own.
    finish : callable
        Called in the order of the windows with the number and the logits, shape (length, vocabulary).
    alter : callable, optional
        Given the name and value of every loaded parameter: a new tensor for its place, or None to leave it.
        The value itself must not be written to: it may be the checkpoint's memory.
    progress : callable
        Called after each layer.
    """
    # Batches reach the end one after the other, in their order.
    numbers = iter(range(len(windows)))

    def run(ids: torch.Tensor) -> None:
        logits = skeleton.model(input_ids=ids, use_cache=False).logits[0]
        finish(next(numbers), logits)

    with (
        _loaded(skeleton, skeleton.rest_names, alter),
        LayerStream(skeleton, list(windows.split(1)), run=run, table=lambda name: _loaded(skeleton, [name], alter)) as stream,
    ):
        for index, _ in stream.steps():
            with _loaded(skeleton, skeleton.layer_names(index), alter):
                stream.run_all(index)
            progress()


@contextmanager
def _loaded(skeleton: Skeleton, names: list[str], alter: Alter | None) -> Iterator[None]:
    with skeleton.loaded(names):
        altered = []
        for name in names if alter is not None else ():
            parameter = skeleton.parameter(name)
            if isinstance(parameter, torch.nn.Parameter) and (value := alter(name, parameter.data)) is not None:
                altered.append(parameter)
                parameter.data = value
        try:
            yield
        finally:
            for parameter in altered:
                # The next load of this parameter would take its dtype for the model's.
                parameter.data = torch.empty(parameter.shape)


def to_bfloat16(_name: str, value: torch.Tensor) -> torch.Tensor | None:
    """Weights, and so the arithmetic, in bfloat16."""
    return value.bfloat16() if value.is_floating_point() else None
