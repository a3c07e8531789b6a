"""A cache of keys and values that grows in place; transformers' own is copied whole at every token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["GrowingLayer", "cache_argument", "growing_cache", "let_grow"]

MIN_CAPACITY = 64


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, written into buffers that double when they are full.

    `keys` and `values` are views of the used part of the buffers, so transformers can crop, reorder and select them; tensors
    that it replaces are copied to new buffers at the next update.
    """

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; both of shape (batch, heads, new tokens, width). Returns all keys and values as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = None
        used, new = self.get_seq_length(), key_states.shape[-2]
        for buffer, states in zip(self.reserve(new, key_states, value_states), (key_states, value_states), strict=True):
            buffer[..., used : used + new, :] = states
        return self.advance(new)

    def reserve(self, tokens: int, *like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for more tokens and return the buffers of keys and of values, (batch, heads, capacity, width).

        `like` gives the shapes for a cache that is still empty: keys, values.
        """
        used = self.get_seq_length()
        needed = used + tokens
        present: Any = (self.keys, self.values)
        buffers = self._buffers
        if buffers is None or buffers[0].shape[-2] < needed or not all(map(_is_start, present, buffers)):
            capacity = max(MIN_CAPACITY, 2 * needed)
            pairs = zip(like or present, present, strict=True)
            keys, values = (_buffer(new, old, used, capacity) for new, old in pairs)
            self._buffers = buffers = keys, values
            self.advance(0)
        return buffers

    def advance(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Count tokens that were written into the buffers after the counted ones; return all keys and values."""
        assert self._buffers is not None
        stop = self.get_seq_length() + tokens
        keys, values = (buffer.narrow(-2, 0, stop) for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def reset(self) -> None:
        """Forget all tokens."""
        self._buffers = None
        super().reset()


def _is_start(tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Return whether a tensor is the start of a buffer that may be written to."""
    # By address: under torch.inference_mode a view has no base. Tensors made under it cannot be written outside of it.
    return (
        tensor.data_ptr() == buffer.data_ptr()
        and tensor.stride() == buffer.stride()
        and tensor.shape[:-2] == buffer.shape[:-2]
        and (torch.is_inference_mode_enabled() or not buffer.is_inference())
    )


def _buffer(new: torch.Tensor, old: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
    buffer = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
    if used:
        buffer[..., :used, :] = old
    return buffer


def cache_argument(model: Any) -> str:
    """Return the name of a model's argument and output for the cache: `past_key_values` before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def growing_cache(model: Any) -> DynamicCache | None:
    """Return a cache for a model's `generate` or `forward`; None for models with another kind of state.

    Layers with a sliding window keep transformers' own cache, which is bounded.
    """
    takes_it = cache_argument(model) in inspect.signature(model.forward).parameters
    if not takes_it or not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    let_grow(cache)
    return cache


def let_grow(cache: Any) -> None:
    """Replace the empty plain layers of a transformers cache by layers that grow in place."""
    if type(cache) is not DynamicCache:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer for layer in cache.layers
    ]
