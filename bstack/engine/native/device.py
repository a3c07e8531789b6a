"""The native engine on a GPU: prompts in torch, one token of each text in a step that a CUDA graph records.

A step launches the same kernels whatever the texts, their lengths, the experts that they choose and the size of the model: what
they depend on lies in device memory. So it is recorded once for each number of texts. Where the kernels in CUDA are missing, a step
reads one token of each text as if it were a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import bstk
from bstack.engine.graphs import record, warn_not_recorded
from bstack.engine.native.architecture import Architecture
from bstack.engine.native.device_experts import DeviceExperts, is_packed
from bstack.engine.native.model import SCORES, NativeModel
from bstack.engine.native.sequence import LARGEST, PAGE, Sequence
from bstack.errors import one_line
from bstack.kernels.cuda.step import WIDEST, Heads, Step, Texts
from bstack.kernels.table import Stacked
from bstack.packed.backends import LESS, Backend, activation_type, backend_of, check_room, device_of, on_device
from bstack.packed.matrix import FEW, Table

__all__ = ["DeviceModel", "DeviceSequence", "DeviceWeights", "loading", "place"]

# Texts of a step: a call with another number fills up with a text of no meaning, one with more takes several steps.
SIZES = (1, 2, 4, 8)
# Tokens of a prompt that are read at a time, all in all and between two steps of a server: rows are decoded once for each piece.
PIECE, TURN = 1024, 512


def place(device: str | torch.device) -> Callable[[bstk.Reader, int | None], tuple[Any, ...]]:
    """Return what makes models on a device, as `bstack.engine.native.load` takes it; BstkError if the device cannot be used."""
    found = device_of(device, packed=True)

    def make(file: bstk.Reader, budget: int | None) -> tuple[Any, ...]:
        check_room(found, file, budget)
        backend = backend_of(found, sum(chunk.is_block and chunk.level == 0 for chunk in file.chunks))
        return DeviceWeights(backend), backend.arena(), backend.free_memory, partial(DeviceModel, backend)

    return make


def loading(device: str | torch.device) -> AbstractContextManager[None]:
    """Return what raises errors that name the device where it fails while a model is loaded."""
    return on_device(torch.device(device), "model", LESS)


class DeviceWeights:
    """Makes weights in a device's memory, as `bstack.engine.native.weights.Host` does."""

    def __init__(self, backend: Backend):
        self.matrix, self.packed, self._device = backend.matrix, backend.packed, backend.device

    def plain(self, stored: np.ndarray) -> Table | torch.Tensor:
        """Make a table of a matrix, or float32 of a vector."""
        whole = stored.dtype != np.uint16
        tensor = torch.from_numpy(np.array(stored if whole else stored.view(np.int16)))
        tensor = (tensor if whole else tensor.view(torch.bfloat16)).to(self._device)
        return Table(tensor) if tensor.dim() > 1 else tensor.float()


class DeviceSequence(Sequence):
    """A text whose pages are tensors of the device; `listed` holds their addresses there."""

    def __init__(self, architecture: Architecture, device: torch.device):
        super().__init__(architecture)
        self._device = device
        self.listed = torch.zeros(0, dtype=torch.int64, device=device)

    def _make_page(self) -> Any:
        of = self._of
        return torch.empty(2, of.layers, of.key_heads, PAGE * of.head_width, dtype=torch.float16, device=self._device)

    def _add(self, page: Any) -> None:
        at = len(self._pages)
        if at == len(self.listed):
            self.listed = torch.cat([self.listed, self.listed.new_zeros(at + 4)])
        self.listed[at] = page.data_ptr()
        self._pages.append(page)

    def _cached(self, given: Any) -> Any:
        return given.half()

    def get(self, layer: int, first: int, stop: int) -> Any:
        """Return keys and values of some tokens, (2, heads, tokens, width), in half precision."""
        numbers = range(first // PAGE, -(-stop // PAGE))
        found = torch.stack([torch.cat([self._rows(n, kind, layer) for n in numbers], 1) for kind in (0, 1)])
        offset = first // PAGE * PAGE
        return found[:, :, first - offset : stop - offset]


class DeviceModel(NativeModel):
    """A decoder with packed weights in a device's memory; parameters and methods are those of `NativeModel`.

    Prompts are computed in bfloat16 where the GPU has it, otherwise in float32; the hidden state between the layers, and steps, in
    float32. A text's results agree to rounding whatever else runs.
    """

    turn = TURN
    _lib = torch
    _embedding: Any
    _head: Any

    def __init__(self, backend: Backend, architecture: Architecture, *rest: Any):
        self.device = backend.device
        self._on_gpu = self.device.type == "cuda"
        #: Type of the activations of prompts.
        self.dtype = activation_type(self.device)
        self._kernels: Any = getattr(backend, "kernels", None)
        super().__init__(architecture, *rest)
        self.piece = PIECE
        self._step_kernels = self._make_step()
        if self._step_kernels is not None:
            for layer in self._layers:
                for names in (_ATTENTION, _FEED):
                    if own := [layer[name] for name in names if name in layer]:
                        layer[_stack_name(names)] = _stacked(own)
        self._inputs: dict[int, _Inputs] = {}
        self._spare = self.sequence()

    def sequence(self) -> Sequence:
        return DeviceSequence(self.architecture, self.device)

    def read(self, sequence: Sequence, ids: Many[int], *, every: bool = False) -> np.ndarray:
        with on_device(self.device):
            return super().read(sequence, ids, every=every)

    def step(self, sequences: Many[Sequence], ids: Many[int]) -> np.ndarray:
        with on_device(self.device):
            return super().step(sequences, ids)

    def _make_decoder(self) -> None:
        return None

    def _make_step(self) -> Step | None:
        """Return what launches the kernels of a step; None where there are none, or the model is not for them."""
        of = self.architecture
        if not hasattr(self._kernels, "launch") or of.head_width > WIDEST or not all(map(is_packed, self._layers)):
            return None
        if of.experts is not None and any("router" in layer for layer in self._layers):
            self._experts = DeviceExperts(self._layers, self._kernels, SIZES[-1], of.experts.chosen)
        rotary = 2 * len(of.rotary[0].frequencies)
        sizes = of.heads, of.key_heads, of.head_width, rotary, of.layers
        return Step(self._kernels, Heads(*sizes, of.epsilon, of.scale, of.cap))

    # Prompts.

    def _embed(self, tokens: np.ndarray) -> Any:
        index = torch.from_numpy(tokens)
        found = self._embedding.lookup(
            index.to(self.device) if isinstance(self._embedding, Table) else index, torch.float32
        )
        return found.to(self.device) * self.architecture.embedding_scale

    def _logits(self, hidden: Any) -> np.ndarray:
        return self._capped(self._head.multiply(self._typed(hidden)).float()).cpu().numpy()

    def _typed(self, x: torch.Tensor) -> torch.Tensor:
        """Return inputs of products in the type for prompts; those of few tokens stay as they are."""
        return x if len(x) <= FEW else x.to(self.dtype)

    def _multiply_all(self, weights: list[Any], x: Any) -> list[Any]:
        return [weight.multiply(self._typed(x)).float() for weight in weights]

    def _angles(self, positions: np.ndarray) -> tuple[Any, Any]:
        cosine, sine = (torch.from_numpy(rows).to(self.device) for rows in self._rotary_rows(positions))
        return cosine, sine

    def _activated(self, gate: Any, up: Any) -> Any:
        return _ACTIVATIONS[self.architecture.activation](gate) * up

    def _choose(self, logits: Any) -> tuple[np.ndarray, Any]:
        chosen, share = self._chosen(logits)
        return chosen.cpu().numpy(), share

    def _chosen(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which experts each token takes, and how much each of them counts, without a wait for the device."""
        of = self.architecture.experts
        assert of is not None
        share, chosen = logits.softmax(-1).topk(of.chosen)
        return chosen, share / share.sum(-1, keepdim=True) if of.normalised else share

    def _norm(self, x: Any, weight: Any) -> Any:
        return x if weight is None else functional.rms_norm(x, x.shape[-1:], weight, self.architecture.epsilon)

    def _attend(self, sequence: Sequence, number: int, query: Any) -> Any:
        of, tokens, start = self.architecture, len(query), sequence.length
        stop, window = start + tokens, of.windows[number]
        first = max(0, start - window + 1) if window else 0
        kind = torch.float16 if self._on_gpu and not of.cap else torch.float32
        keys, values = (
            part.to(kind).repeat_interleave(of.heads // of.key_heads, 0)[None]
            for part in sequence.get(number, first, stop)
        )
        query = query.clamp(-LARGEST, LARGEST).to(kind).transpose(0, 1)[None]
        plain = start == 0 and not (window and window < stop) and not of.cap
        out = query.new_empty(query.shape)
        step = max(1, 4 * SCORES // (of.heads * (stop - first))) if of.cap else tokens
        for begin in range(0, tokens, step):
            part = query[:, :, begin : begin + step]
            own = torch.arange(start + begin, start + begin + part.shape[2], device=self.device)[:, None]
            seen = torch.arange(first, stop, device=self.device)
            mask: Any = None if plain else (seen <= own) & (seen > own - window) if window else seen <= own
            if of.cap:
                scores = of.cap * torch.tanh(part @ keys.mT * (of.scale / of.cap))
                read = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values
            else:
                read = functional.scaled_dot_product_attention(
                    part, keys, values, attn_mask=mask, is_causal=plain, scale=of.scale
                )
            out[:, :, begin : begin + step] = read
        return out[0].transpose(0, 1).reshape(tokens, -1)

    # Steps.

    def _step(self, sequences: Many[Any], tokens: np.ndarray) -> np.ndarray:
        if self._step_kernels is None:
            return super()._step(sequences, tokens)
        found = []
        for start in range(0, len(tokens), SIZES[-1]):
            together = sequences[start : start + SIZES[-1]]
            found.append(self._step_together(self._step_kernels, together, tokens[start : start + SIZES[-1]]))
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.tokens.append(token)
        return np.concatenate(found)

    def _step_together(self, kernels: Step, sequences: Many[Any], tokens: np.ndarray) -> np.ndarray:
        count = next(size for size in SIZES if len(tokens) <= size)
        self._spare.reserve(1)
        texts = [*sequences, *[self._spare] * (count - len(tokens))]
        rows = self._rotary_rows(np.array([text.length for text in texts]))
        if count not in self._inputs:
            self._inputs[count] = _Inputs(rows, self.device)
        inputs = self._inputs[count]
        inputs.fill(np.resize(tokens, count), [(text.length, text.listed.data_ptr()) for text in texts], rows)
        with self._lock.acquire():
            logits = inputs.run(lambda: self._forward(kernels, inputs))
            return logits[: len(tokens)].cpu().numpy()  # waits for the device, with the lock held

    def _forward(self, kernels: Step, inputs: _Inputs) -> torch.Tensor:
        """Launch a step; nothing in here may depend on what is in the device's memory."""
        of, table = self.architecture, self._embedding
        x = table.tensor[inputs.ids].float() if isinstance(table, Table) else table.rows_at(inputs.ids)
        x = x if of.embedding_scale == 1 else x * of.embedding_scale
        added = added_norm = None
        for number, layer in enumerate(self._layers):
            x, plain, rotated = kernels.prepare(x, added, added_norm, layer.get("input_norm"))
            given = self._products(layer, _ATTENTION, plain, rotated)
            norms = {name: layer.get(name) for name in ("query_norm", "key_norm")}
            if of.whole_norms:
                given, norms = self._norm_whole(given, norms), {}
            window, rope = of.windows[number], of.ropes[number]
            read = kernels.attend(given, inputs.texts, number, window=window, rope=rope, **norms)
            added = self._products(layer, ("out",), *read)
            x, plain, rotated = kernels.prepare(x, added, layer.get("attention_norm"), layer.get("post_norm"))
            activated = partial(kernels.activated, activation=of.activation)
            if "router" in layer:
                choice = self._chosen(self._products(layer, ("router",), plain, rotated))
                added = self._experts.run(layer, choice, plain, rotated, activated)
            else:
                inner = activated(self._products(layer, _FEED, plain, rotated))
                added = self._products(layer, ("down",), *inner)
            added_norm = layer.get("feed_norm")
        _, plain, rotated = kernels.prepare(x, added, added_norm, self._final_norm)
        return self._capped(self._products({"head": self._head}, ("head",), plain, rotated))

    def _products(
        self, layer: dict[str, Any], names: Many[str], plain: torch.Tensor, rotated: torch.Tensor
    ) -> torch.Tensor:
        """Return the products of some matrices side by side, float32; a layer may have them as one."""
        own = [name for name in names if name in layer]
        rows = [layer[name].rows for name in own]
        y = torch.empty(len(plain), sum(rows), device=plain.device)
        parts = y.split(rows, 1)
        if (stack := layer.get(_stack_name(names))) is not None:
            self._kernels.multiply(stack, plain, rotated, y)
        else:
            for name, part in zip(own, parts, strict=True):
                if isinstance(layer[name], Table):
                    part.copy_(layer[name].multiply(plain))
                else:
                    layer[name].multiply_into(plain, rotated, part)
        for name, part in zip(own, parts, strict=True):
            if (bias := layer.get(f"{name}_bias")) is not None:
                part += bias
        return y

    def _norm_whole(self, given: torch.Tensor, norms: dict[str, Any]) -> torch.Tensor:
        """Normalise all heads of queries, and of keys, at once."""
        of = self.architecture
        parts = given.split([share * of.head_width for share in (of.heads, of.key_heads, of.key_heads)], 1)
        return torch.cat(
            [self._norm(parts[0], norms["query_norm"]), self._norm(parts[1], norms["key_norm"]), parts[2]], 1
        )


# Matrices of one input, whose products are one launch where all of them are packed.
_ATTENTION, _FEED = ("query", "key", "value"), ("gate", "up")


def _stack_name(names: Many[str]) -> str:
    return f"{'_'.join(names)}_stack"


def _stacked(weights: Many[Any]) -> Stacked | None:
    if any(isinstance(weight, Table) for weight in weights):
        return None
    return Stacked([part for weight in weights for part in weight.parts])


class _Inputs:
    """What a step of so many texts reads, in device memory, and the recorded step."""

    def __init__(self, rows: Many[np.ndarray], device: torch.device):
        count, angles = len(rows[0]), rows[0].size
        self._host = torch.zeros(24 * count + 8 * angles, dtype=torch.uint8)
        if device.type == "cuda":
            self._host = self._host.pin_memory()
        self._bytes = self._host.to(device)
        self._views, given = (self._parts(memory, rows[0].shape) for memory in (self._host, self._bytes))
        self.ids, self.texts = given[0], Texts(*given[1:])
        self._device = device
        self._graph: Any = None
        self._logits: Any = None
        self._recorded = device.type != "cuda"  # or cannot be

    @staticmethod
    def _parts(memory: torch.Tensor, shape: tuple[int, ...]) -> list[torch.Tensor]:
        """Return tokens, the table of texts, cosine and sine in one memory, so that one copy brings all."""
        count = shape[0]
        numbers, angles = memory[: 24 * count].view(torch.int64), memory[24 * count :].view(torch.float32)
        return [numbers[:count], numbers[count:].view(count, 2), *(part.view(shape) for part in angles.chunk(2))]

    def fill(self, ids: np.ndarray, texts: Many[tuple[int, int]], rows: Many[np.ndarray]) -> None:
        """Set the tokens, each text's position and the address of its list of pages, and their rotary rows."""
        for view, given in zip(self._views, (ids, np.array(texts), *rows), strict=True):
            view.numpy()[:] = given
        self._bytes.copy_(self._host, non_blocking=True)

    def run(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the step, recorded at its first run on a GPU."""
        if not self._recorded:
            self._recorded = True
            try:
                self._graph, self._logits = record(forward, self._device)
            except RuntimeError as error:
                warn_not_recorded(one_line(error), self._device)
        if self._graph is None:
            return forward()
        self._graph.replay()
        return self._logits


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {"silu": functional.silu, "gelu_tanh": _gelu_tanh}
