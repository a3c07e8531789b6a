"""What the native engine computes: a decoder in plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import bstk
from bstack.errors import UnsupportedModelError

__all__ = ["EMBEDDING", "FINAL_NORM", "HEAD", "Architecture", "Experts", "NotNativeError", "Rope", "read_json"]

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_DENSE = ("gate", "up", "down")  # matrices that a layer of experts does not have


class NotNativeError(UnsupportedModelError):
    """The native engine does not know the model; the message says what."""

    def __init__(self, reason: str):
        super().__init__(f"the native engine does not run this model: {reason}.", option="engine")
        self.reason = reason


def read_json(file: bstk.Reader, name: str) -> Mapping[str, Any]:
    """Return an embedded JSON file; an empty mapping if it is not there."""
    if name not in file.files:
        return {}
    try:
        found = json.loads(file.file(name))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise NotNativeError(f"{name} is no JSON object")
    return found


@dataclass(frozen=True)
class Rope:
    """Rotary positions: angles for each position, and the factor of their cosine and sine."""

    frequencies: np.ndarray
    factor: float

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return cosine and sine, float32, (positions, values that are rotated)."""
        angles = np.multiply.outer(positions.astype(np.float32), self.frequencies)
        angles = np.concatenate([angles, angles], -1)
        return np.cos(angles) * np.float32(self.factor), np.sin(angles) * np.float32(self.factor)


@dataclass(frozen=True)
class Experts:
    """Layers whose feed-forward is a row of experts: how many, how many of them a token takes, and the width of one.

    `normalised` says that what a token's experts count adds up to 1.
    """

    layers: frozenset[int]
    count: int
    chosen: int
    inner: int
    normalised: bool


@dataclass(frozen=True)
class Architecture:
    """A decoder in plain values.

    Attributes
    ----------
    names : mapping
        The name of a parameter in a layer (``query``, ``post_norm``; those of `bstack.kernels.decoder.Layer`) -> that in the
        file, after the layer's prefix and without ``.weight``.
    biases : frozenset
        Matrices that have a bias.
    windows, ropes : tuple of int
        Of each layer: the tokens that attention sees (0: all), and the entry of `rotary` (-1: no rotary positions).
    norm_offset : float
        Added to the weights of norms.
    cap, final_cap : float
        Of attention scores and of logits; 0 for none.
    context : int
        Most tokens of a text.
    experts : Experts, optional
    """

    names: Mapping[str, str]
    biases: frozenset[str]
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    epsilon: float
    scale: float
    activation: str
    tied: bool
    context: int
    windows: tuple[int, ...]
    ropes: tuple[int, ...]
    rotary: tuple[Rope, ...]
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    whole_norms: bool = False
    cap: float = 0.0
    final_cap: float = 0.0
    experts: Experts | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by its name in the file."""
        found = {EMBEDDING: (self.vocabulary, self.width), FINAL_NORM: (self.width,)}
        if not self.tied:
            found[HEAD] = (self.vocabulary, self.width)
        for layer in range(self.layers):
            found |= self.layer(layer).values()
        return found

    def layer(self, number: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return a layer's parameters: the name in `bstack.kernels.decoder.Layer` -> the name in the file, and the shape."""
        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        split, twice = "key" in self.names, "up" not in self.names
        of = {
            "query": (queries if split else queries + 2 * keys, self.width),
            "key": (keys, self.width),
            "value": (keys, self.width),
            "out": (self.width, queries),
            "gate": (2 * self.inner if twice else self.inner, self.width),
            "up": (self.inner, self.width),
            "down": (self.width, self.inner),
            "query_norm": (queries if self.whole_norms else self.head_width,),
            "key_norm": (keys if self.whole_norms else self.head_width,),
        }
        prefix = f"model.layers.{number}."
        own, found = self.experts, {}
        for name, place in self.names.items():
            if own and number in own.layers and name in _DENSE:
                continue
            shape = of.get(name, (self.width,))
            found[name] = f"{prefix}{place}.weight", shape
            if name in self.biases:
                found[f"{name}_bias"] = f"{prefix}{place}.bias", shape[:1]
        if own and number in own.layers:
            found["router"] = f"{prefix}mlp.gate.weight", (own.count, self.width)
            found["expert_gate"] = f"{prefix}mlp.experts.gate_up_proj", (own.count, 2 * own.inner, self.width)
            found["expert_down"] = f"{prefix}mlp.experts.down_proj", (own.count, self.width, own.inner)
        return found
