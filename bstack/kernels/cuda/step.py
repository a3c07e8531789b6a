"""What a step computes between its products, on an NVIDIA GPU: launches of the kernels in step.cu.

Nothing here waits for the device or looks at what is in its memory, so a step can be recorded as a CUDA graph.
"""

from __future__ import annotations

from ctypes import c_float, c_int
from dataclasses import dataclass

import torch

from bstack.kernels.cuda import CHUNK, Kernels

__all__ = ["PAGE", "WIDEST", "Heads", "Step", "Texts"]

# Of step.cu: tokens of a page, parts of a text that are attended to side by side, values of a head at most.
PAGE, SPLITS, WIDEST = 64, 16, 512
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class Heads:
    """Shape of attention: heads of queries and of keys, their width, values of a head that positions rotate."""

    queries: int
    keys: int
    width: int
    rotary: int
    layers: int
    epsilon: float
    scale: float
    cap: float = 0.0


@dataclass(frozen=True)
class Texts:
    """The texts of a step in device memory.

    Attributes
    ----------
    table : torch.Tensor
        Position of the token, and address of the list of its pages' addresses; int64, shape (t, 2).
    cosine, sine : torch.Tensor
        Rotary rows of the positions, float32, shape (t, kinds, rotary).
    """

    table: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor


class Step:
    """Launches for models of one shape of attention."""

    def __init__(self, kernels: Kernels, heads: Heads):
        self._kernels, self._heads = kernels, heads

    def prepare(
        self,
        x: torch.Tensor,
        added: torch.Tensor | None = None,
        added_norm: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add a layer's result, after its own norm, to the hidden state; return the sum, the sum normalised, and that rotated.

        All are float32: rows of shape (t, n), weights of norms of shape (n,).
        """
        total = torch.empty_like(x)
        given = (*map(_address, (x, added, added_norm, norm)), total.data_ptr())
        return total, *self._row("prepare", given, x, x.shape[1], c_float(self._heads.epsilon))

    def attend(
        self,
        given: torch.Tensor,
        texts: Texts,
        layer: int,
        *,
        query_norm: torch.Tensor | None = None,
        key_norm: torch.Tensor | None = None,
        window: int = 0,
        rope: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a token's keys and values into the caches, and return what its queries read there, and that rotated.

        Parameters
        ----------
        given : torch.Tensor
            Queries, keys and values, float32, contiguous, shape (t, (queries + 2 keys) width).
        texts : Texts
        layer : int
        query_norm, key_norm : torch.Tensor, optional
            Weights of the norm of each head, float32, shape (width,).
        window : int
            Tokens that attention sees; 0 for all.
        rope : int
            Which of the rotary rows; -1 for no rotation.
        """
        of, count = self._heads, len(given)
        query = torch.empty(count, of.queries * of.width, device=given.device)
        self._kernels.launch(
            "heads",
            (of.queries + 2 * of.keys, count),
            *map(_address, (given, query_norm, key_norm, texts.table, texts.cosine, texts.sine, query)),
            *map(c_int, (of.queries, of.keys, of.width, layer, of.layers, of.rotary, texts.cosine.shape[1], rope)),
            c_float(of.epsilon),
        )
        group = of.queries // of.keys
        together = 1 if group == 1 else 4
        parts = torch.empty(count * of.queries * SPLITS * (2 + of.width), device=given.device)
        self._kernels.launch(
            f"attend_{together}",
            (of.keys * -(-group // together) * SPLITS, count),
            *map(_address, (query, texts.table, parts)),
            *map(c_int, (layer, of.layers, of.keys, of.width, group, window)),
            c_float(of.scale),
            c_float(of.cap),
        )
        return self._row("attended", (parts.data_ptr(),), given, of.queries * of.width, c_int(of.width))

    def activated(self, given: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return act(gate) * up of rows (gate, up), float32, contiguous, shape (t, 2 n), and that rotated."""
        number = c_int(ACTIVATIONS.index(activation))
        return self._row("activated", (given.data_ptr(),), given, given.shape[1] // 2, number)

    def _row(
        self, name: str, given: tuple[int, ...], like: torch.Tensor, columns: int, last: c_int | c_float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch a kernel that writes rows and rotated rows."""
        plain, rotated = (torch.empty(len(like), columns, device=like.device) for _ in range(2))
        bits = (columns & -columns).bit_length() - 1
        inside = 1 << bits <= CHUNK
        grid = len(like), -(-columns // CHUNK)
        outputs = plain.data_ptr(), rotated.data_ptr() if inside else 0
        self._kernels.launch(name, grid, *given, *outputs, c_int(columns), c_int(bits), last)
        return plain, rotated if inside else self._kernels.rotate(plain)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
