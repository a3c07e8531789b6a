"""Mixtures of experts in a step on a GPU: which matrices multiply is decided in device memory, without a wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bstack.kernels.table import DeviceMatrix, MatrixTable, Stacked
from bstack.packed.backends import DeviceBlocks

__all__ = ["DeviceExperts", "is_packed"]

_GATE, _DOWN = "expert_gate", "expert_down"


def is_packed(layer: dict[str, Any]) -> bool:
    """Return whether a layer's experts, if it has any, are all packed."""
    experts = [*layer.get(_GATE, ()), *layer.get(_DOWN, ())]
    return all(isinstance(weight, DeviceBlocks) and len(weight.parts) == 1 for weight in experts)


class DeviceExperts:
    """The experts of all layers, of which each token takes `chosen`; a step has at most `tokens`.

    A step copies what describes the chosen matrices, rows of the table of all, to rows of a table of its own. These are what the
    kernels are launched with, so a recorded step multiplies with whatever the router chooses.
    """

    def __init__(self, layers: Sequence[dict[str, Any]], kernels: Any, tokens: int, chosen: int):
        self._kernels, self._chosen = kernels, chosen
        layers = [layer for layer in layers if _GATE in layer]
        self._gates, self._downs = (_Picked(layers, name, tokens * chosen) for name in (_GATE, _DOWN))
        own = self._gates.matrices
        self._together = [Stacked(own[start : start + chosen]) for start in range(0, len(own), chosen)]

    def run(
        self,
        layer: dict[str, Any],
        choice: tuple[torch.Tensor, torch.Tensor],
        plain: torch.Tensor,
        rotated: torch.Tensor,
        activated: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Return what a layer's experts give, added up by how much each counts.

        Parameters
        ----------
        layer : dict
        choice : tuple
            Which experts each token takes, int64, and how much each of them counts, both (t, chosen).
        plain, rotated : torch.Tensor
            Inputs and rotated inputs, float32, shape (t, n).
        activated : callable
            Gives the activated rows of (gate, up), and them rotated.
        """
        index, share = choice
        for picked, name in ((self._gates, _GATE), (self._downs, _DOWN)):
            picked.pick(layer, name, index)
        tokens, device = len(plain), plain.device
        both = torch.empty(tokens, self._together[0].rows, device=device)
        for t in range(tokens):
            self._kernels.multiply(self._together[t], plain[t : t + 1], rotated[t : t + 1], both[t : t + 1])
        inner, turned = activated(both.view(tokens * self._chosen, -1))
        out = torch.empty(tokens * self._chosen, plain.shape[1], device=device)
        for k in range(len(out)):
            one = slice(k, k + 1)
            self._kernels.multiply(self._downs.matrices[k], inner[one], turned[one], out[one])
        return (out.view(tokens, self._chosen, -1) * share[:, :, None]).sum(1)


class _Picked:
    """Rows of a table of their own, which stand for matrices that are picked by an index."""

    def __init__(self, layers: Sequence[dict[str, Any]], name: str, most: int):
        of: list[DeviceMatrix] = [weight.parts[0] for layer in layers for weight in layer[name]]
        device = of[0].entry.device
        kinds = set().union(*(matrix.kinds for matrix in of))
        table = MatrixTable(most, device)
        self._all, self._rows = of[0].table.rows, table.rows
        self.matrices = [DeviceMatrix(of[0].rows, of[0].columns, table, place, kinds) for place in range(most)]
        for layer in layers:
            layer[_places(name)] = torch.tensor([weight.parts[0].place for weight in layer[name]], device=device)

    def pick(self, layer: dict[str, Any], name: str, index: torch.Tensor) -> None:
        """Let the first matrices be those that the index chooses among a layer's."""
        self._rows[: index.numel()] = self._all[layer[_places(name)][index.reshape(-1)]]


def _places(name: str) -> str:
    return f"{name}_places"
