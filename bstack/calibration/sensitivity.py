"""Estimates how much an error in each output of each linear changes the model's output distribution.

For a small error d in one linear's output y, the Kullback-Leibler divergence of the model's next-token
distribution grows by about 1/2 d^T F d, F = E[g g^T] the Fisher information and g the gradient of the log
probability of a token drawn from the model itself. The result is the diagonal of F, averaged over calibration tokens:
one number per output. One backward pass gives it for all linears; layers are loaded one at a time, backwards.

The same gradients say which tokens matter: an error of row i of a linear is about as large as the row, a_i, so a token x
whose gradients are g counts with w = sum_i a_i^2 g_i^2 in the hessian of the linear's inputs, sum w x x^T.
"""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bstack.calibration.head import Head
from bstack.calibration.statistics import Operand, ProductWatch
from bstack.calibration.stream import LayerCall, LayerStream
from bstack.errors import UnsupportedModelError
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton, layer_parameters
from bstk.errors import os_errors

__all__ = ["BACKWARD_TOKENS", "Sensitivity", "output_sensitivity"]

# Tokens that go backwards together.
BACKWARD_TOKENS = 1024


@dataclass(frozen=True)
class Sensitivity:
    """Diagonal Fisher information, averaged over tokens, in nats^2 per squared unit.

    Attributes
    ----------
    outputs : dict of str to torch.Tensor
        By linear name (see `Operand`), float32, shape (outputs,). The head is under its parameter's name.
    tokens : dict of str to torch.Tensor
        By linear name: the weights w of the run's tokens in their order, with mean 1; float32, shape (tokens,). Only of
        linears in the layers that read every token once; an expert does not.
    embedding : torch.Tensor
        Of the first layer's input, which an error in a token's embedding changes; float32, shape (width,).
    """

    outputs: dict[str, torch.Tensor]
    embedding: torch.Tensor
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)


def output_sensitivity(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    *,
    seed: int,
    scratch: Path,
    progress: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Estimate the diagonal Fisher information of every linear's outputs.

    Parameters
    ----------
    skeleton : Skeleton
        The model, nothing loaded.
    batches : sequence of torch.Tensor
        Token ids, int64, shape (sequences, length).
    seed : int
        Random seed of the tokens drawn from the model's distribution.
    scratch : Path
        An existing folder for the layers' inputs, so that memory does not grow with the number of layers.
    progress : callable
        Called after each of the 2 x layers steps.
    """
    squares = _Squares()
    calls = _LayerInputs(scratch)
    with skeleton.loaded(skeleton.rest_names):
        gradients = _forward(skeleton, batches, seed, calls, squares, progress)
        for index in reversed(range(len(skeleton.layers))):
            with skeleton.loaded(skeleton.layer_names(index)):
                gradients = _backward(skeleton, index, calls.read(index), gradients, squares)
            progress()
    tokens = sum(batch.numel() for batch in batches)
    embedding = functools.reduce(torch.add, map(_sum_of_squares, gradients)) / tokens
    means = {name: total / tokens for name, total in squares.sums.items()}
    return Sensitivity(means, embedding, squares.token_weights(tokens))


class _LayerInputs:
    """The arguments of every layer call, in one unnamed temporary file a layer, each read back once."""

    def __init__(self, scratch: Path):
        self._scratch = scratch
        self._streams: dict[int, IO[bytes]] = {}

    def write(self, index: int, calls: list[LayerCall]) -> None:
        # Unnamed and held open, so that `read` unpickles (objects of any class) only what was written here.
        with os_errors(str(self._scratch)):
            stream = self._streams[index] = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115 - `read` closes it
            packed = io.BytesIO()  # torch would turn a full disk into an error of its own
            torch.save([(call.args, call.kwargs) for call in calls], packed)
            stream.write(packed.getbuffer())
            stream.flush()

    def read(self, index: int) -> list[LayerCall]:
        with self._streams.pop(index) as stream:
            stream.seek(0)
            return [LayerCall(args, kwargs) for args, kwargs in torch.load(stream, weights_only=False)]


class _Squares:
    """Sums of squared output gradients, by linear, and weights of tokens; the callback of ProductWatch."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self._powers: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, list[torch.Tensor]] = {}

    def report(self, operand: Operand, _inputs: torch.Tensor, output: torch.Tensor, part: int | None) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(operand, gradient if part is None else gradient[part]))

    def _add(self, operand: Operand, gradient: torch.Tensor) -> None:
        name, squares = operand.name, gradient.detach().float().square().reshape(-1, gradient.shape[-1])
        self.add_sum(name, squares.sum(0))
        if name not in self._powers:
            matrix = MatrixName.parse(name)
            weight = matrix.view(self.parameters[matrix.parameter], operand.transposed)
            self._powers[name] = weight.detach().float().square().mean(1)
        self._tokens.setdefault(name, []).append(squares @ self._powers[name])

    def token_weights(self, tokens: int) -> dict[str, torch.Tensor]:
        """Return the weights of linears that have read each of so many tokens once, with mean 1."""
        found = {name: torch.cat(parts) for name, parts in self._tokens.items()}
        means = {name: weights.mean() for name, weights in found.items() if len(weights) == tokens}
        return {name: found[name] / mean for name, mean in means.items() if 0 < mean < torch.inf}

    def add_sum(self, name: str, total: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + total if name in self.sums else total


def _sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """Sum the squares over all axes but the last."""
    return gradient.float().square().reshape(-1, gradient.shape[-1]).sum(0)


def _forward(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    seed: int,
    inputs: _LayerInputs,
    squares: _Squares,
    progress: Callable[[], None],
) -> list[torch.Tensor]:
    """Run all layers, keep their inputs, and return the gradient at the last layer's output for each batch."""
    generator = torch.Generator(skeleton.device).manual_seed(seed)
    leaves: list[torch.Tensor] = []

    def start_gradient(output: Any) -> Any:
        torch.set_grad_enabled(True)  # in this batch's thread only
        leaf = _hidden(output).detach().requires_grad_()
        leaves.append(leaf)
        return (leaf, *output[1:]) if isinstance(output, tuple | list) else leaf

    def run(ids: torch.Tensor) -> torch.Tensor:
        head = Head(skeleton.model)
        hidden = head.hidden(ids)
        gradient = torch.empty_like(hidden)
        for part in head.parts(len(hidden)):
            state = hidden[part].detach().requires_grad_()
            logits = head.logits(state)
            with torch.no_grad():
                probabilities = logits.softmax(-1)
                # At the logits the expectation over the draw is known: E[(p - onehot)^2] = p (1 - p).
                squares.add_sum(skeleton.output_name, probabilities.sum(0).sub_(probabilities.square().sum(0)))
                drawn = torch.multinomial(probabilities, 1, generator=generator)
                # Each position's token is drawn independently: the gradient of the sum of -log p, not of the mean.
                slope = probabilities.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=torch.float32))
            (gradient[part],) = torch.autograd.grad(logits, state, slope)
        hidden.backward(gradient)
        return cast(torch.Tensor, leaves[-1].grad)

    def load(name: str) -> AbstractContextManager[None]:
        return skeleton.loaded([name])

    with LayerStream(skeleton, batches, run=run, after_layers=start_gradient, embedding=load) as stream:
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                inputs.write(index, stream.calls())
                stream.run_all(index)
            progress()
        return stream.results


def _backward(
    skeleton: Skeleton, index: int, calls: list[LayerCall], gradients: list[torch.Tensor], squares: _Squares
) -> list[torch.Tensor]:
    """Carry the gradients from a layer's output to its input."""
    layer = skeleton.layers[index][1]
    squares.parameters = layer_parameters(skeleton, index)
    watch = ProductWatch(squares.parameters, squares.report)
    before: list[torch.Tensor] = []
    for call, gradient in zip(calls, gradients, strict=True):
        hidden, rebuild = _take_hidden(call, gradient.shape)
        leaf = hidden.detach().requires_grad_()
        # The gradients of a GPU's other kinds of attention differ from run to run.
        plain = nullcontext() if leaf.device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)
        with plain:
            with torch.enable_grad(), watch:
                output = _hidden(rebuild(layer, leaf))
            output.backward(gradient)
        before.append(cast(torch.Tensor, leaf.grad))
    return before


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _take_hidden(
    call: LayerCall, shape: torch.Size
) -> tuple[torch.Tensor, Callable[[torch.nn.Module, torch.Tensor], Any]]:
    """Find the running hidden state among a layer's arguments; also return how to call the layer with another."""
    if call.args:
        return call.args[0], lambda layer, leaf: layer(leaf, *call.args[1:], **call.kwargs)
    for key, value in call.kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == shape:
            return value, lambda layer, leaf, key=key: layer(**{**call.kwargs, key: leaf})
    raise UnsupportedModelError(f"A repeated layer was called without a hidden state: {sorted(call.kwargs)}.")
