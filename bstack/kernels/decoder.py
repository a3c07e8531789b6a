"""Runs one token through a whole decoder of the Llama family in C (csrc/decoder.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bstack.kernels.matrix import Matrix, pointer

__all__ = ["MAX_PARTS", "Decoder", "Layer", "Sizes"]

MAX_PARTS = 256
_MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
_NORMS = ("input_norm", "post_norm", "query_norm", "key_norm")
_BIASES = tuple(f"{name}_bias" for name in _MATRICES)


@dataclass(frozen=True)
class Sizes:
    """Shape of a decoder: `width` of the hidden state, `inner` of the feed-forward, heads of queries and of keys."""

    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    epsilon: float
    scale: float


@dataclass(frozen=True)
class Layer:
    """Parameters of a layer: seven matrices; norms and biases as float32 arrays, the optional ones None."""

    query: Matrix
    key: Matrix
    value: Matrix
    out: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    input_norm: np.ndarray
    post_norm: np.ndarray
    query_norm: np.ndarray | None = None
    key_norm: np.ndarray | None = None
    query_bias: np.ndarray | None = None
    key_bias: np.ndarray | None = None
    value_bias: np.ndarray | None = None
    out_bias: np.ndarray | None = None
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*_MATRICES, *_NORMS, *_BIASES, "keys", "values")]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in "width inner heads key_heads head_width layers head_parts".split()),
        *((name, ctypes.c_float) for name in ("epsilon", "scale")),
        *((name, ctypes.c_void_p) for name in ("layer", "final_norm", "head", "scratch")),
    ]


class Decoder:
    """A decoder whose matrices stay packed.

    Parameters
    ----------
    native : ctypes.CDLL
        The C kernels (`bstack.kernels.native.library`).
    sizes : Sizes
    layers : sequence of Layer
    final_norm : np.ndarray
        float32, shape (width,).
    head : sequence of Matrix
        One under the other; at most `MAX_PARTS`.

    Raises
    ------
    ValueError
        A shape does not fit.
    """

    def __init__(
        self, native: ctypes.CDLL, sizes: Sizes, layers: Sequence[Layer], final_norm: np.ndarray, head: Sequence[Matrix]
    ):
        if not 1 <= len(head) <= MAX_PARTS:
            raise ValueError(f"the head has {len(head)} parts; allowed are 1 to {MAX_PARTS}.")
        _check(sizes, layers, final_norm, head)
        self._native = native
        native.bstack_decoder_scratch.restype = ctypes.c_size_t
        self._kept = (layers, final_norm, head)  # C holds addresses only
        self._layers = (_Layer * len(layers))()
        for structure, layer in zip(self._layers, layers, strict=True):
            for name in _MATRICES:
                setattr(structure, name, ctypes.addressof(getattr(layer, name)))
            for name in (*_NORMS, *_BIASES):
                array = getattr(layer, name)
                setattr(structure, name, None if array is None else array.ctypes.data)
        self._head = (ctypes.c_void_p * len(head))(*map(ctypes.addressof, head))
        self._decoder = _Decoder(
            layers=len(layers),
            head_parts=len(head),
            layer=ctypes.addressof(self._layers),
            final_norm=final_norm.ctypes.data,
            head=ctypes.addressof(self._head),
            **asdict(sizes),
        )
        self.vocabulary = sum(part.rows for part in head)
        self._capacity = 0

    def use_cache(self, keys: Sequence[int], values: Sequence[int], capacity: int) -> None:
        """Set where each layer's keys and values lie: addresses of float32, (key heads, capacity, head width)."""
        for structure, key, value in zip(self._layers, keys, values, strict=True):
            structure.keys, structure.values = key, value
        if capacity != self._capacity:
            floats = self._native.bstack_decoder_scratch(ctypes.byref(self._decoder), capacity)
            self._scratch = np.empty(floats, np.float32)
            self._decoder.scratch = self._scratch.ctypes.data
            self._capacity = capacity

    def step(self, x: np.ndarray, cosine: np.ndarray, sine: np.ndarray, position: int) -> np.ndarray:
        """Run one token and add its keys and values to the cache.

        Parameters
        ----------
        x : np.ndarray
            Its embedding, float32, shape (width,). Overwritten.
        cosine, sine : np.ndarray
            Of its position's angles, float32, shape (head width,).
        position : int
            Tokens in the cache before it, less than the capacity.

        Returns
        -------
        np.ndarray
            Logits, float32, shape (vocabulary,).
        """
        if not 0 <= position < self._capacity:
            raise ValueError(f"position is {position}; the cache has room for {self._capacity}.")
        logits = np.empty(self.vocabulary, np.float32)
        if self._native.bstack_decoder_step(
            ctypes.byref(self._decoder),
            pointer(x),
            pointer(cosine),
            pointer(sine),
            position,
            self._capacity,
            pointer(logits),
        ):
            raise MemoryError
        return logits


def _check(sizes: Sizes, layers: Sequence[Layer], final_norm: np.ndarray, head: Sequence[Matrix]) -> None:
    """Raise ValueError where a matrix, norm or bias has another shape than the sizes need."""
    queries, keys = sizes.heads * sizes.head_width, sizes.key_heads * sizes.head_width
    rows = queries, keys, keys, sizes.width, sizes.inner, sizes.inner, sizes.width
    shapes = list(zip(rows, [*[sizes.width] * 3, queries, *[sizes.width] * 2, sizes.inner], strict=True))
    lengths = sizes.width, sizes.width, sizes.head_width, sizes.head_width, *rows
    wrong = sizes.head_width % 2 or sizes.heads % sizes.key_heads or final_norm.shape != (sizes.width,)
    for layer in layers:
        for name, shape in zip(_MATRICES, shapes, strict=True):
            matrix = getattr(layer, name)
            wrong = wrong or (matrix.rows, matrix.columns) != shape
        for name, length in zip((*_NORMS, *_BIASES), lengths, strict=True):
            array = getattr(layer, name)
            wrong = wrong or (array is not None and (array.shape != (length,) or array.dtype != np.float32))
    if wrong or any(part.columns != sizes.width for part in head):
        raise ValueError("the shapes of the layers do not fit those of the decoder")
