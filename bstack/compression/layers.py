"""Compress the repeated layers: statistics on their hidden states, then the blocks of every linear."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from bstack.calibration.products import Operand
from bstack.calibration.sensitivity import Sensitivity
from bstack.calibration.statistics import HessianTable, gather
from bstack.calibration.stream import LayerStream
from bstack.codecs import Codec
from bstack.compression.encode import Matrix, add_dense, encode
from bstack.compression.workers import Workers
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton, layer_parameters
from bstack.workdir import WorkDirectory

__all__ = ["compress_layers", "layer_matrices", "layer_part", "layer_shapes"]

# Smaller matrices are routers and gates: few bytes, and much quality.
MIN_SIDE = 16
MIN_FRACTION = 0.001


def layer_part(index: int) -> str:
    """Return the name of a layer's part in the work directory."""
    return f"layer-{index:05d}"


def compress_layers(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    sensitivity: Sensitivity,
    codec: Codec,
    work: WorkDirectory,
    workers: Workers,
    progress: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Finish every layer's part, and return the hessian of the head's input.

    Returns
    -------
    dict of str to torch.Tensor
        ``hessian``, shape (width, width), and ``tokens``.
    """
    with (
        skeleton.loaded(skeleton.rest_names),
        LayerStream(skeleton, batches, embedding=lambda name: skeleton.loaded([name])) as stream,
    ):
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                if work.has(layer_part(index)):
                    stream.run_all(index)
                else:
                    table = gather(stream, index, layer_parameters(skeleton, index))
                    _compress_layer(skeleton, index, table, sensitivity, codec, work, workers)
            progress()
        hidden = [result.last_hidden_state.reshape(-1, result.last_hidden_state.shape[-1]) for result in stream.results]
    hessian = sum(rows.t() @ rows for rows in hidden)
    return {"hessian": hessian, "tokens": torch.tensor(sum(rows.shape[0] for rows in hidden))}


def _compress_layer(
    skeleton: Skeleton,
    index: int,
    table: HessianTable,
    sensitivity: Sensitivity,
    codec: Codec,
    work: WorkDirectory,
    workers: Workers,
) -> None:
    stacked = _stacked(table, layer_parameters(skeleton, index))
    with work.part(layer_part(index)) as part:
        for name in skeleton.layer_names(index):
            if name not in stacked:
                add_dense(name, skeleton.parameter(name), skeleton.checkpoint.stored_dtype(name), part)
        fitted = codec.for_layer(m.task for m in _matrices(skeleton, stacked, table, sensitivity))
        encode(_matrices(skeleton, stacked, table, sensitivity), fitted, part, workers)


def layer_matrices(skeleton: Skeleton, index: int, table: HessianTable, sensitivity: Sensitivity) -> Iterator[Matrix]:
    """Return the matrices of a loaded layer that become stacks, with their statistics."""
    return _matrices(skeleton, _stacked(table, layer_parameters(skeleton, index)), table, sensitivity)


def layer_shapes(skeleton: Skeleton) -> Iterator[list[list[tuple[int, int]]]]:
    """Return the possible shapes of the matrices that become stacks, by layer, before anything is loaded.

    Each matrix has one shape (outputs, inputs), or two where its module does not say which side is which. A parameter that
    is not used as a matrix (CONTRIBUTING.md, product watching) is among them.
    """
    for index in range(len(skeleton.layers)):
        parameters = layer_parameters(skeleton, index)
        total = sum(p.numel() for p in parameters.values())
        layer = []
        for name, parameter in parameters.items():
            if _large(parameter.shape, total):
                rows, columns = parameter.shape[-2:]
                module = skeleton.model.get_submodule(name.rpartition(".")[0])
                certain = (
                    getattr(module, "out_features", None) == rows and getattr(module, "in_features", None) == columns
                )
                shapes = [(rows, columns)] if certain or rows == columns else [(rows, columns), (columns, rows)]
                layer += [shapes] * math.prod(parameter.shape[:-2])
        yield layer


def _large(shape: Sequence[int], total: int) -> bool:
    """Return whether a parameter of a layer of `total` weights becomes a stack, if it is used as a matrix."""
    return min(shape[-2:]) >= MIN_SIDE and math.prod(shape) >= MIN_FRACTION * total


def _stacked(table: HessianTable, parameters: dict[str, torch.Tensor]) -> dict[str, list[Operand]]:
    """Return the parameters that become stacks, each with its matrices."""
    seen: dict[str, Operand] = {}
    for operand in table.operands.values():
        seen.setdefault(MatrixName.parse(operand.name).parameter, operand)
    total = sum(p.numel() for p in parameters.values())
    chosen: dict[str, list[Operand]] = {}
    for name, operand in seen.items():
        shape = parameters[name].shape
        if not _large(shape, total):
            continue
        if len(shape) == 2:
            chosen[name] = [operand]
        else:
            chosen[name] = [Operand(f"{name}[{i}]", operand.transposed) for i in range(shape[0])]
    return chosen


def _matrices(
    skeleton: Skeleton, stacked: dict[str, list[Operand]], table: HessianTable, sensitivity: Sensitivity
) -> Iterator[Matrix]:
    for parameter, operands in stacked.items():
        seen = [operand for operand in operands if operand.name in table.operands]
        for operand in operands:
            # An expert that no calibration token reached gets the statistics of the others.
            sources = [operand] if operand in seen else seen
            statistics = [table.statistics(source.name) for source in sources]
            sensitivities = [sensitivity.outputs[s.name] for s in sources if s.name in sensitivity.outputs]
            weight = MatrixName.parse(operand.name).view(skeleton.parameter(parameter), operand.transposed)
            yield Matrix(
                operand.name,
                weight,
                functools.reduce(torch.add, (s.hessian for s in statistics)),
                sum(s.tokens for s in statistics),
                _mean(sensitivities) if sensitivities else _mean_sensitivity(seen, sensitivity, weight),
                operand.transposed,
            )


def _mean_sensitivity(seen: list[Operand], sensitivity: Sensitivity, weight: torch.Tensor) -> torch.Tensor:
    """Return the mean over its siblings, for an expert that no token of the sensitivity run reached."""
    known = [sensitivity.outputs[o.name] for o in seen if o.name in sensitivity.outputs]
    return _mean(known) if known else torch.zeros(weight.shape[0])


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, tensors) / len(tensors)
