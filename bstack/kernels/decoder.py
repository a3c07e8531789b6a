"""Runs tokens through a decoder in C (csrc/decoder.c): one of each of some texts, or several of one text."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bstack.kernels.matrix import Matrix, pointer

__all__ = ["MAX_PARTS", "Decoder", "Layer", "Sizes", "Text"]

MAX_PARTS = 256
_MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
_NORMS = ("input_norm", "post_norm", "query_norm", "key_norm", "attention_norm", "feed_norm")
_BIASES = tuple(f"{name}_bias" for name in _MATRICES)
_EXPERTS = ("expert_gate", "expert_down")
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class Sizes:
    """Shape of a decoder: `width` of the hidden state, `inner` of the feed-forward, heads of queries and of keys.

    `rotary` is how many values of a head positions rotate (None: all), `whole_norms` says that the norms of queries and keys
    take all heads at once, and `cap` is that of attention scores (0: none). A layer may have `experts` of width `expert_inner`, of
    which each token takes `chosen`; `normalised` says that what they count adds up to 1.
    """

    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    epsilon: float
    scale: float
    rotary: int | None = None
    activation: str = "silu"
    whole_norms: bool = False
    cap: float = 0.0
    experts: int = 0
    chosen: int = 0
    expert_inner: int = 0
    normalised: bool = False


@dataclass(frozen=True)
class Layer:
    """Parameters of a layer: matrices; norms and biases as float32 arrays, None where there are none.

    Without `key` and `value` the matrix `query` gives all three, and without `up` the matrix `gate` gives both. Attention
    sees the last `window` tokens (0: all); `rope` is the row of a text's rotary tables, -1 for none. A layer of experts has no
    `gate`, `up` and `down`, but a `router` (float32, or a matrix) and, of each expert, a matrix for gate and up and one for down.
    """

    query: Matrix
    key: Matrix | None
    value: Matrix | None
    out: Matrix
    gate: Matrix | None
    up: Matrix | None
    down: Matrix | None
    input_norm: np.ndarray | None = None
    post_norm: np.ndarray | None = None
    query_norm: np.ndarray | None = None
    key_norm: np.ndarray | None = None
    attention_norm: np.ndarray | None = None
    feed_norm: np.ndarray | None = None
    query_bias: np.ndarray | None = None
    key_bias: np.ndarray | None = None
    value_bias: np.ndarray | None = None
    out_bias: np.ndarray | None = None
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    router: Matrix | np.ndarray | None = None
    expert_gate: Sequence[Matrix] = ()
    expert_down: Sequence[Matrix] = ()
    window: int = 0
    rope: int = 0


class Text(ctypes.Structure):
    """A text as the kernels see it: its next token's position and rotary rows, and where the pages of its caches lie."""

    _fields_ = [
        ("position", ctypes.c_int32),
        ("pages", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "keys", "values")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_MATRICES, *_NORMS, *_BIASES)),
        *((name, ctypes.c_void_p) for name in ("router", "packed_router", *_EXPERTS)),
        ("window", ctypes.c_int32),
        ("rope", ctypes.c_int32),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("width", "inner", "heads", "key_heads", "head_width", "layers")),
        *((name, ctypes.c_int32) for name in ("head_parts", "rotary", "activation", "whole_norms")),
        *((name, ctypes.c_int32) for name in ("experts", "chosen", "expert_inner", "normalised", "half", "page")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale", "cap")),
        *((name, ctypes.c_void_p) for name in ("layer", "final_norm", "head")),
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
        One under the other; at most `MAX_PARTS`. Without any, steps give the normalised hidden state.
    page : int
        Tokens of a page of the caches, which are then of half precision, with a head's keys as (head width, page); 0 for single
        precision, one page in all.

    Raises
    ------
    ValueError
        A shape does not fit.
    """

    def __init__(
        self,
        native: ctypes.CDLL,
        sizes: Sizes,
        layers: Sequence[Layer],
        final_norm: np.ndarray,
        head: Sequence[Matrix],
        page: int = 0,
    ):
        if len(head) > MAX_PARTS:
            raise ValueError(f"the head has {len(head)} parts; allowed are up to {MAX_PARTS}.")
        _check(sizes, layers, final_norm, head)
        self._native = native
        native.bstack_decoder_scratch.restype = ctypes.c_size_t
        self._kept = (layers, final_norm, head)  # C holds addresses only
        self._addresses: list[ctypes.Array[ctypes.c_void_p]] = []
        self._layers = (_Layer * len(layers))()
        for structure, layer in zip(self._layers, layers, strict=True):
            for name in _MATRICES:
                matrix = getattr(layer, name)
                setattr(structure, name, None if matrix is None else ctypes.addressof(matrix))
            for name in (*_NORMS, *_BIASES):
                array = getattr(layer, name)
                setattr(structure, name, None if array is None else array.ctypes.data)
            structure.window, structure.rope = layer.window, layer.rope
            if isinstance(layer.router, np.ndarray):
                structure.router = layer.router.ctypes.data
            elif layer.router is not None:
                structure.packed_router = ctypes.addressof(layer.router)
            for name in _EXPERTS:
                addresses = (ctypes.c_void_p * len(getattr(layer, name)))(*map(ctypes.addressof, getattr(layer, name)))
                self._addresses.append(addresses)
                setattr(structure, name, ctypes.addressof(addresses))
        self._head = (ctypes.c_void_p * len(head))(*map(ctypes.addressof, head))
        self._decoder = _Decoder(
            layers=len(layers),
            head_parts=len(head),
            half=page > 0,
            page=page,
            layer=ctypes.addressof(self._layers),
            final_norm=final_norm.ctypes.data,
            head=ctypes.addressof(self._head),
            **{**asdict(sizes), "rotary": _rotary(sizes), "activation": ACTIVATIONS.index(sizes.activation)},
        )
        self._outputs = [part.rows for part in head] or [sizes.width]
        self.vocabulary = sum(self._outputs)
        self.has_head = bool(head)
        self._scratch = np.empty(0, np.float32)
        self._text = Text()

    def use_cache(self, keys: Sequence[int], values: Sequence[int], capacity: int) -> None:
        """Set where each layer's keys and values lie: addresses of float32, (key heads, capacity, head width)."""
        self._pages = [(ctypes.c_void_p * len(keys))(*addresses) for addresses in (keys, values)]
        self._text.pages = 1
        self._text.keys, self._text.values = map(ctypes.addressof, self._pages)
        self._decoder.page = capacity

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
        if not 0 <= position < self._decoder.page:
            raise ValueError(f"position is {position}; the cache has room for {self._decoder.page}.")
        text = self._text
        text.position, text.cosine, text.sine = position, cosine.ctypes.data, sine.ctypes.data
        return self.run(x[None], (Text * 1)(text))[0]

    def run(self, x: np.ndarray, texts: ctypes.Array[Text]) -> np.ndarray:
        """Run one token of each text and add its keys and values to its cache.

        A text's result is the same bits whatever other texts are in the call.

        Parameters
        ----------
        x : np.ndarray
            Their embeddings, float32, shape (texts, width). Overwritten.
        texts : array of Text
            The caller answers for the addresses and for pages up to each position.

        Returns
        -------
        np.ndarray
            Logits, float32, shape (texts, vocabulary), or the hidden state.
        """
        count = len(texts)
        if (needed := self._scratch_of(count)) > len(self._scratch):
            self._scratch = np.empty(needed, np.float32)
        out = np.empty(count * self.vocabulary, np.float32)
        arrays = pointer(x), pointer(self._scratch), pointer(out)
        if self._native.bstack_decoder_step(ctypes.byref(self._decoder), texts, count, *arrays):
            raise MemoryError
        if count == 1:
            return out[None]
        parts, start = [], 0
        for rows in self._outputs:
            parts.append(out[start : start + count * rows].reshape(count, rows))
            start += count * rows
        return np.concatenate(parts, 1)

    def read(self, layer: int, x: np.ndarray, texts: ctypes.Array[Text], scratch: np.ndarray) -> None:
        """Run tokens of one text, in a row, through one layer, and add their keys and values to its cache.

        Parameters
        ----------
        layer : int
        x : np.ndarray
            What enters the layer, float32, shape (tokens, width). Overwritten with what leaves it.
        texts : array of Text
            The text at the position of each token; the caller answers for the addresses.
        scratch : np.ndarray
            From `scratch`, for as many tokens.
        """
        arrays = pointer(x), pointer(scratch)
        if self._native.bstack_decoder_read(ctypes.byref(self._decoder), layer, texts, len(texts), *arrays):
            raise MemoryError

    def scratch(self, tokens: int) -> np.ndarray:
        """Return memory for `read`."""
        return np.empty(self._scratch_of(tokens), np.float32)

    def _scratch_of(self, tokens: int) -> int:
        return int(self._native.bstack_decoder_scratch(ctypes.byref(self._decoder), tokens))


def _rotary(sizes: Sizes) -> int:
    """Return how many values of a head positions rotate."""
    return sizes.head_width if sizes.rotary is None else sizes.rotary


def _check(sizes: Sizes, layers: Sequence[Layer], final_norm: np.ndarray, head: Sequence[Matrix]) -> None:
    """Raise ValueError where a matrix, norm or bias has another shape than the sizes need."""
    rotary = _rotary(sizes)
    wrong = (
        rotary % 2 or rotary > sizes.head_width or sizes.heads % sizes.key_heads or final_norm.shape != (sizes.width,)
    )
    wrong = wrong or not 0 <= sizes.chosen <= sizes.experts
    wrong = wrong or not all(_fits(sizes, layer, layers[0].key is not None) for layer in layers)
    if wrong or any(part.columns != sizes.width for part in head):
        raise ValueError("the shapes of the layers do not fit those of the decoder")


def _fits(sizes: Sizes, layer: Layer, split: bool) -> bool:
    """Return whether a layer has the matrices, norms and biases that the sizes need; `split` says that queries are alone."""
    queries, keys = sizes.heads * sizes.head_width, sizes.key_heads * sizes.head_width
    routed, twice = layer.router is not None, layer.up is None
    rows = {
        "query": queries if split else queries + 2 * keys,
        "key": keys,
        "value": keys,
        "out": sizes.width,
        "gate": 2 * sizes.inner if twice else sizes.inner,
        "up": sizes.inner,
        "down": sizes.width,
    }
    columns = {**dict.fromkeys(_MATRICES, sizes.width), "out": queries, "down": sizes.inner}
    whole = sizes.whole_norms
    lengths = {
        **dict.fromkeys(_NORMS, sizes.width),
        "query_norm": queries if whole else sizes.head_width,
        "key_norm": keys if whole else sizes.head_width,
        **{f"{name}_bias": rows[name] for name in _MATRICES},
    }
    absent = {*(() if split else ("key", "value")), *(("gate", "up", "down") if routed else ("up",) if twice else ())}
    for name in _MATRICES:
        matrix = getattr(layer, name)
        if (matrix is None) != (name in absent):
            return False
        if matrix is not None and (matrix.rows, matrix.columns) != (rows[name], columns[name]):
            return False
    for name, length in lengths.items():
        array = getattr(layer, name)
        if array is not None and (array.shape != (length,) or array.dtype != np.float32):
            return False
    inner, width = sizes.expert_inner, sizes.width
    shapes = {"expert_gate": (2 * inner, width), "expert_down": (width, inner)}
    if any(len(getattr(layer, name)) != (sizes.experts if routed else 0) for name in shapes):
        return False
    if any((m.rows, m.columns) != shape for name, shape in shapes.items() for m in getattr(layer, name)):
        return False
    if isinstance(layer.router, Matrix):
        return (layer.router.rows, layer.router.columns) == (sizes.experts, width)
    return layer.router is None or (layer.router.shape, layer.router.dtype) == ((sizes.experts, width), np.float32)
