"""Caches of keys and values that grow in place; transformers' own is copied whole at every token."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["FixedLayer", "GrowingLayer", "cache_argument", "fix", "forward_by_names", "growing_cache", "let_grow"]

# Tokens that a new buffer holds at least: of a cache that grows, and of one whose buffers stay in place.
MIN_CAPACITY, MIN_FIXED = 64, 256


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


class FixedLayer(DynamicLayer):
    """Keys and values of one layer in buffers that stay where they are until they are full; then they double.

    `keys` and `values` are the whole buffers, and masks, which have their size, hide what is not written yet. The place of the
    next token is a tensor, so that a recorded step finds it. Layers with a sliding window are kept whole, too.
    """

    is_compileable = True  # generate() then makes masks before it calls the model
    keys: Any
    values: Any

    def __init__(self, is_sliding: bool = False):
        super().__init__()
        self.is_sliding = is_sliding
        self.used = 0
        self._capacity = 0
        self._place: Any = None

    @property
    def addresses(self) -> tuple[Any, ...]:
        """What a recorded step knows of the buffers: where they are, and their size."""
        return *(tensor.data_ptr() for tensor in (self.keys, self.values, self._place)), self.keys.shape

    def get_seq_length(self) -> int:
        """Return the number of tokens that were written."""
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next tokens meet, and the place of the first: a prompt meets itself alone."""
        return query_length if self._is_prompt(query_length) else self._room_for(query_length), 0

    def _is_prompt(self, tokens: int) -> bool:
        return not self.used and tokens > 1

    def _room_for(self, tokens: int) -> int:
        if self.used + tokens > self._capacity:
            self._capacity = max(MIN_FIXED, 2 * (self.used + tokens))
        return self._capacity

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write tokens, (batch, heads, new tokens, width); return the keys and values that `get_mask_sizes` counts."""
        tokens = key_states.shape[-2]
        prompt = self._is_prompt(tokens)
        capacity = self._room_for(tokens)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._place = _writable_zeros(key_states, 1, dtype=torch.int64)
        if self.keys.shape[-2:-1] != (capacity,):  # empty at first, of one axis
            self.keys = _fixed_buffer(key_states, self.keys, self.used, capacity)
            self.values = _fixed_buffer(value_states, self.values, self.used, capacity)
        places = self._place + torch.arange(tokens, device=self._place.device)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        self._place.add_(tokens)
        self.used += tokens
        return (key_states, value_states) if prompt else (self.keys, self.values)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is negative."""
        gone = min(abs(tokens_to_remove), self.used)
        self.used -= gone
        if self._place is not None:
            self._place.sub_(gone)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.used = self._capacity = 0
        if self._place is not None:
            self._place.zero_()


def _writable_zeros(like: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
    with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
        return like.new_zeros(shape, **options)


def _fixed_buffer(new: torch.Tensor, old: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
    buffer = _writable_zeros(new, *new.shape[:-2], capacity, new.shape[-1])
    if used:
        buffer[..., :used, :] = old[..., :used, :]
    return buffer


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
    _replace_layers(cache, {DynamicLayer: GrowingLayer})


def fix(cache: Any) -> None:
    """Replace the empty layers of a transformers cache by layers whose buffers stay in place."""
    _replace_layers(cache, {DynamicLayer: FixedLayer, DynamicSlidingWindowLayer: functools.partial(FixedLayer, True)})


def _replace_layers(cache: Any, by: dict[type, Callable[[], DynamicLayer]]) -> None:
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = by[DynamicLayer]
    cache.layers = [
        by[type(layer)]() if type(layer) in by and not layer.is_initialized else layer for layer in cache.layers
    ]


def forward_by_names(model: Any, run: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return a `forward` in place of the model's own, which gives `run` the arguments of a call by their names."""
    own, argument = model.forward, cache_argument(model)
    signature = inspect.signature(own)

    @functools.wraps(own)  # `generate` reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        if argument not in given and "past_key_values" in given:  # the name before transformers 5.24
            given[argument] = given.pop("past_key_values")
        return run(given)

    return forward
