"""Runs a model of any architecture layer by layer: all batches pass one layer before the next is loaded.

A model's forward pass decides what each layer receives (masks, rotary tables, shared states), in its own way for each
architecture. So each batch runs the model's own forward in a thread, which waits at the entrance of each layer until
the layer's weights are loaded. One thread runs at a time, so results do not depend on scheduling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bstack.errors import UnsupportedModelError
from bstack.models.skeleton import Skeleton

__all__ = ["LayerCall", "LayerStream", "batches_of"]

# Tokens that pass through a layer together: as many as keep the BLAS busy, few enough for the memory.
TOKENS_TOGETHER = 4096


def batches_of(windows: torch.Tensor) -> list[torch.Tensor]:
    """Split windows of token ids, shape (windows, tokens), into batches for a `LayerStream`."""
    return list(windows.split(max(1, TOKENS_TOGETHER // windows.shape[1])))


@dataclass(frozen=True)
class LayerCall:
    """The arguments with which the model called a layer for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_NOT_RUN = object()


class _Stopped(BaseException):
    """Ends a batch's thread when the stream is closed early; not an error."""


class _AtHead(BaseException):
    """Ends a batch's forward pass at the head, with the head's input; not an error."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


class _Batch:
    """One batch's forward pass, in a thread that waits at each layer."""

    def __init__(self, run: Callable[[], Any]):
        self._run = run
        self._go = threading.Event()
        self._back = threading.Event()
        self._stop = False
        self.call: LayerCall | None = None
        self.layer: int | None = None
        self.output: Any = _NOT_RUN
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        self._wait()
        try:
            if not self._stop:
                with torch.no_grad():
                    self.result = self._run()
        except _Stopped:
            pass
        except BaseException as error:  # handed to the caller of step(), which raises it
            self.error = error
        self.call = None
        self._back.set()

    def _wait(self) -> None:
        self._go.wait()
        self._go.clear()

    def at_layer(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait at the entrance of a layer, in the batch's thread, then run the layer or take the output kept for it."""
        self.call = LayerCall(args, kwargs)
        self.layer = index
        self._back.set()
        self._wait()
        if self._stop:
            raise _Stopped
        self.call = None
        output, self.output = self.output, _NOT_RUN
        return forward(*args, **kwargs) if output is _NOT_RUN else output

    def step(self) -> None:
        """Let the thread run to the entrance of the next layer, or to the end."""
        self._back.clear()
        self._go.set()
        self._back.wait()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End the thread, wherever it waits."""
        if self._thread.is_alive():
            self._stop = True
            self._go.set()
            self._thread.join()


class LayerStream:
    """All batches of a calibration run, waiting in front of the same layer.

    Use it as a context manager. The parameters outside the layers must be loaded meanwhile; with `embedding`, all of them but
    the embedding and the head.

    Parameters
    ----------
    skeleton : Skeleton
        The model; the caller loads its layers' weights, one layer at a time.
    batches : sequence of torch.Tensor
        Token ids, int64, shape (sequences, length) each.
    run : callable, optional
        What each batch's thread runs, given its token ids; by default the model up to its head, whose input is the
        result. It runs under `torch.no_grad`.
    after_layers : callable, optional
        Called in the batch's thread with the last layer's output; what it returns goes on to the rest of the model.
    embedding : callable, optional
        Returns a context in which a parameter is loaded, given its name: the embedding while the batches run to the first
        layer, the head while they run on from the last.

    Attributes
    ----------
    results : list
        After the last layer: what `run` returned for each batch.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[torch.Tensor],
        *,
        run: Callable[[torch.Tensor], Any] | None = None,
        after_layers: Callable[[Any], Any] = lambda output: output,
        embedding: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ):
        self._skeleton = skeleton
        self._inputs = batches
        self._run = run or self._up_to_head
        self._stopped_head: Any = None
        self._after_layers = after_layers
        self._embedding = embedding
        self._head = [] if run is None else [skeleton.output_name]
        self._current: _Batch  # whose thread runs
        self._forwards: list[Callable[..., Any]] = []
        self._batches: list[_Batch] = []

    def __enter__(self) -> LayerStream:
        for index, (_, layer) in enumerate(self._skeleton.layers):
            self._forwards.append(layer.forward)
            layer.forward = self._stopping(index, layer.forward)
        if self._run == self._up_to_head:
            self._stopped_head = self._skeleton.model.get_output_embeddings()
            if self._stopped_head is None:
                raise UnsupportedModelError(f"{type(self._skeleton.model).__name__} has no head that gives logits.")
            self._stopped_head.forward = _stop_at_head
        self._batches = [_Batch(partial(self._run, ids)) for ids in self._inputs]
        try:
            with self._embedding(self._skeleton.input_name):
                self._advance()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self._batches:
            batch.close()
        for _name, layer in self._skeleton.layers:
            layer.__dict__.pop("forward", None)
        if self._stopped_head is not None:
            self._stopped_head.__dict__.pop("forward", None)

    def _up_to_head(self, ids: torch.Tensor) -> torch.Tensor:
        try:
            self._skeleton.model(input_ids=ids, use_cache=False)
        except _AtHead as end:
            return end.hidden
        raise UnsupportedModelError(f"{type(self._skeleton.model).__name__} computes its logits without its head.")

    def _stopping(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        last = index == len(self._skeleton.layers) - 1

        def stop_then_run(*args: Any, **kwargs: Any) -> Any:
            output = self._current.at_layer(index, forward, args, kwargs)
            return self._after_layers(output) if last else output

        return stop_then_run

    def _advance(self) -> None:
        for batch in self._batches:
            self._current = batch
            batch.step()

    def steps(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield each layer's index and module, and run every batch through it before the next.

        The caller loads the layer's weights before it asks for the next step. A batch that has passed the layer in `run`
        continues with the output of that.
        """
        for index, (name, layer) in enumerate(self._skeleton.layers):
            if any(batch.call is None or batch.layer != index for batch in self._batches):
                raise UnsupportedModelError(
                    f"{type(self._skeleton.model).__name__} does not run its layers once each in their order: {name} was "
                    "expected next. Its layers cannot be streamed."
                )
            yield index, layer
            with ExitStack() as stack:
                for head in self._head if index == len(self._skeleton.layers) - 1 else ():
                    stack.enter_context(self._embedding(head))
                self._advance()
        if any(batch.call is not None for batch in self._batches):
            raise UnsupportedModelError(
                f"{type(self._skeleton.model).__name__} runs layers more than once. Its layers cannot be streamed."
            )

    def calls(self) -> list[LayerCall]:
        """Return the arguments with which each batch waits to call the current layer."""
        return [batch.call for batch in self._batches if batch.call is not None]

    def run(self, index: int, number: int) -> None:
        """Run batch `number` through the current layer `index` now, and keep the output for the next step."""
        batch, call = self._batches[number], self.calls()[number]
        batch.output = self._forwards[index](*call.args, **call.kwargs)

    def run_all(self, index: int) -> None:
        """Run every batch through the current layer `index` now, without gradients."""
        with torch.no_grad():
            for number in range(len(self._batches)):
                self.run(index, number)

    @property
    def results(self) -> list[Any]:
        return [batch.result for batch in self._batches]


def _stop_at_head(hidden: torch.Tensor) -> torch.Tensor:
    raise _AtHead(hidden)
