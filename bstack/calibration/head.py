"""Compute a model's logits from its last hidden states, some positions at a time: those of a window take gigabytes for a large vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Head"]

LOGITS_TOGETHER = 1 << 24  # 64 MB of float32


class _AtHidden(BaseException):
    """Ends a forward pass after the model's body, with what that returns; not an error."""

    def __init__(self, output: Any, hidden: torch.Tensor):
        self.output, self.hidden = output, hidden


class Head:
    """What a causal language model computes after its body: the logits of a position from the hidden state there.

    A model that does not call a body of its own (``base_model``) is body and head in one: its hidden states are the logits.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    """

    def __init__(self, model: Any):
        self._model = model
        self._body: Any = None  # once `hidden` has stopped after it
        self._output: Any = None

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the model's body on token ids, int64, shape (sequences, length); return shape (sequences x length, width)."""
        body = self._model.base_model
        run_body = body.forward

        def stop_after_body(*args: Any, **kwargs: Any) -> Any:
            output = run_body(*args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output.get("last_hidden_state")
            if hidden is not None and hidden.dim() == 3 and hidden.shape[:2] == ids.shape:
                raise _AtHidden(output, hidden)
            return output

        if body is not self._model:
            body.forward = stop_after_body
        try:
            return self._model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        except _AtHidden as end:
            self._body, self._output = body, end.output
            return end.hidden.flatten(0, 1)
        finally:
            body.__dict__.pop("forward", None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32, shape (positions, vocabulary), of hidden states of `hidden`, shape (positions, width)."""
        if self._body is None:
            return hidden.float()
        output: Any = copy.copy(self._output)
        if isinstance(output, tuple):
            output = (hidden[None], *output[1:])
        else:
            output["last_hidden_state"] = hidden[None]
        self._body.forward = lambda *_, **__: output
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            return self._model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            self._body.__dict__.pop("forward", None)

    def parts(self, positions: int) -> Iterator[slice]:
        """Split positions into slices whose logits take little memory."""
        step = max(1, LOGITS_TOGETHER // self._model.config.get_text_config().vocab_size)
        return (slice(start, min(start + step, positions)) for start in range(0, positions, step))
