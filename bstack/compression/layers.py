"""Compress the parts of a model: the repeated layers, the embedding and the head, the other parameters, the files."""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

import bstk
from bstack.calibration.sensitivity import Sensitivity
from bstack.calibration.statistics import HessianTable, Operand, gather
from bstack.calibration.stream import LayerStream
from bstack.codecs import Codec
from bstack.compression.assemble import collect, load_blocks
from bstack.compression.encode import Matrix, Workers, add_dense, encode
from bstack.errors import ModelWarning, UnsupportedModelError
from bstack.models.code import write_references
from bstack.models.generation import GENERATION, read_generation
from bstack.models.names import MatrixName, row_ranges
from bstack.models.skeleton import Checkpoint, Skeleton, layer_parameters
from bstack.models.tokenizer import tokenizer_files
from bstack.workdir import WorkDirectory
from bstk.errors import os_errors

__all__ = [
    "FILES_PART",
    "OUTSIDE_PART",
    "add_files",
    "check_dense",
    "compress_layers",
    "compress_outside",
    "embedding_part",
    "embedding_statistics",
    "embeddings",
    "layer_matrices",
    "layer_part",
    "layer_shapes",
    "model_files",
]

FILES_PART = "files"
OUTSIDE_PART = "outside"
# Smaller matrices are routers and gates: few bytes, and much quality.
MIN_SIDE = 16
MIN_FRACTION = 0.001


def layer_part(index: int) -> str:
    """Return the name of a layer's part in the work directory."""
    return f"layer-{index:05d}"


def embedding_part(parameter: str) -> str:
    """Return the name of the part of an embedding or a head."""
    return f"embedding-{parameter}"


def compress_layers(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    sensitivity: Sensitivity,
    codec: Codec,
    work: WorkDirectory,
    workers: Workers,
    progress: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Finish every layer's part; return the ``hessian`` of the head's input, (width, width), and its ``tokens``."""
    with (
        skeleton.loaded(skeleton.rest_names),
        LayerStream(skeleton, batches, embedding=lambda name: skeleton.loaded([name])) as stream,
    ):
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                finished = work.has(layer_part(index))
                if not finished:
                    parameters = layer_parameters(skeleton, index)
                    table = gather(stream, index, parameters, sensitivity.tokens)
                    _compress_layer(skeleton, index, table, sensitivity, codec, work, workers)
                if codec.calibrated_with is not None:
                    stacks = collect(work, [layer_part(index)]).stacks
                    load_blocks(skeleton, stacks, {n: min(codec.calibrated_with, len(b)) for n, b in stacks.items()})
                if finished or codec.calibrated_with is not None:
                    stream.run_all(index)
            progress()
        hidden = [result.reshape(-1, result.shape[-1]) for result in stream.results]
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
        for name in skeleton.own_layer_names(index):
            if name not in stacked:
                add_dense(name, skeleton.parameter(name), skeleton.checkpoint.stored_dtype(name), part)
        fitted = codec.for_layer(m.task for m in layer_matrices(skeleton, index, table, sensitivity))
        encode(layer_matrices(skeleton, index, table, sensitivity), fitted, part, workers)


def layer_matrices(skeleton: Skeleton, index: int, table: HessianTable, sensitivity: Sensitivity) -> Iterator[Matrix]:
    """Return the matrices of a loaded layer that become stacks, with their statistics."""
    for parameter, operands in _stacked(table, layer_parameters(skeleton, index)).items():
        seen = [operand for operand in operands if operand.name in table.operands]
        for operand in operands:
            # An expert that no calibration token reached gets the statistics of the others, one that no token of the
            # sensitivity run reached their mean sensitivity.
            sources = [operand] if operand in seen else seen
            statistics = [table.statistics(source.name) for source in sources]
            weight = MatrixName.parse(operand.name).view(skeleton.parameter(parameter), operand.transposed)
            outputs = sensitivity.outputs
            known = [outputs[s.name] for s in sources if s.name in outputs]
            known = known or [outputs[s.name] for s in seen if s.name in outputs] or [torch.zeros(weight.shape[0])]
            yield Matrix(
                operand.name,
                weight,
                functools.reduce(torch.add, (s.hessian for s in statistics)),
                sum(s.tokens for s in statistics),
                (functools.reduce(torch.add, known) / len(known)).to(weight.device),
                operand.transposed,
            )


def layer_shapes(skeleton: Skeleton) -> Iterator[list[list[tuple[int, int]]]]:
    """Return the possible shapes of the matrices that become stacks, by layer, before anything is loaded.

    Each matrix has one shape (outputs, inputs), or two where its module does not say which side is which. A parameter that
    is not used as a matrix (CONTRIBUTING.md, product watching) is among them.
    """
    for index in range(len(skeleton.layers)):
        parameters = layer_parameters(skeleton, index)
        layer = []
        for name, parameter in parameters.items():
            if _large(parameter.shape, parameters):
                rows, columns = parameter.shape[-2:]
                module = skeleton.model.get_submodule(name.rpartition(".")[0])
                sides = getattr(module, "out_features", None), getattr(module, "in_features", None)
                one = rows == columns or sides == (rows, columns)
                shapes = [(rows, columns)] if one else [(rows, columns), (columns, rows)]
                layer += [shapes] * math.prod(parameter.shape[:-2])
        yield layer


def _large(shape: Sequence[int], parameters: dict[str, torch.Tensor]) -> bool:
    """Return whether one of a layer's parameters becomes a stack, if it is used as a matrix."""
    total = sum(p.numel() for p in parameters.values())
    return min(shape[-2:]) >= MIN_SIDE and math.prod(shape) >= MIN_FRACTION * total


def _stacked(table: HessianTable, parameters: dict[str, torch.Tensor]) -> dict[str, list[Operand]]:
    """Return the parameters that become stacks, each with its matrices."""
    seen: dict[str, Operand] = {}
    for operand in table.operands.values():
        seen.setdefault(MatrixName.parse(operand.name).parameter, operand)
    chosen: dict[str, list[Operand]] = {}
    for name, operand in seen.items():
        shape = parameters[name].shape
        if _large(shape, parameters):
            experts = [Operand(f"{name}[{i}]", operand.transposed) for i in range(shape[0])]
            chosen[name] = [operand] if len(shape) == 2 else experts
    return chosen


def embeddings(skeleton: Skeleton) -> dict[str, list[MatrixName]]:
    """Return the embedding and the head by parameter name, one entry when they are tied, with their ranges of rows."""
    names = dict.fromkeys((skeleton.input_name, skeleton.output_name))
    return {name: row_ranges(name, skeleton.parameter(name).shape) for name in names}


def check_dense(skeleton: Skeleton, stack_embeddings: bool) -> None:
    """Check that every tensor that is kept dense fits in a chunk of the container; else raise UnsupportedModelError."""
    split = embeddings(skeleton)
    for name in skeleton.outside_names:
        tensor = skeleton.parameter(name)
        dtype = skeleton.checkpoint.stored_dtype(name) if tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * dtype.itemsize
        if size > bstk.limits.MAX_RAW_LENGTH and not (stack_embeddings and name in split):
            raise UnsupportedModelError(
                f"{skeleton.checkpoint.name}: {name} takes {size / 2**30:.2f} GiB and would be kept dense, but a dense tensor "
                f"of a .bstk file takes at most {bstk.limits.MAX_RAW_LENGTH / 2**30:.0f} GiB.",
                hint="Set embeddings to stack, which splits it." if name in split else None,
            )


def compress_outside(
    skeleton: Skeleton,
    statistics: Callable[[str], tuple[torch.Tensor, int, torch.Tensor]],
    codec: Codec | None,
    work: WorkDirectory,
    workers: Workers,
    progress: Callable[[], None],
) -> None:
    """Finish the parts outside the layers; without a codec the embedding and the head stay dense.

    `statistics` is `embedding_statistics` of all but the name.
    """
    stacked = {} if codec is None else embeddings(skeleton)
    for name, ranges in stacked.items():
        if codec is not None and not work.has(embedding_part(name)):
            with skeleton.loaded([name]), work.part(embedding_part(name)) as part:
                encode(_range_matrices(skeleton, name, ranges, *statistics(name)), codec, part, workers, progress)
    if not work.has(OUTSIDE_PART):
        with work.part(OUTSIDE_PART) as part:
            for name in skeleton.outside_names:
                if name not in stacked:
                    with skeleton.loaded([name]):
                        add_dense(name, skeleton.parameter(name), skeleton.checkpoint.stored_dtype(name), part)


def _range_matrices(
    skeleton: Skeleton, parameter: str, ranges: list[MatrixName], hessian: torch.Tensor, tokens: int, rows: torch.Tensor
) -> Iterator[Matrix]:
    weight = skeleton.parameter(parameter)
    for name in ranges:
        part = slice(*name.rows) if name.rows else slice(None)
        yield Matrix(str(name), weight[part], hessian, tokens, rows[part], even=True)


def embedding_statistics(
    skeleton: Skeleton, head: dict[str, torch.Tensor], sensitivity: Sensitivity, windows: torch.Tensor, name: str
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Return the hessian, its tokens and the sensitivity per row of the embedding, the head, or the tied matrix of both.

    An error E in row i of the head costs F_i (E H E^T)_ii, F_i about the probability of token i. The same row as an
    embedding is read with that probability and costs sum_j G_j E_ij^2 then, G the sensitivity of the first layer's
    input. So one weighted hessian, H + T diag(G), and one sensitivity per row serve a tied matrix in both roles. How
    often a row is read is counted in the calibration's `windows`.
    """
    rows, width = skeleton.parameter(name).shape
    tokens = int(head["tokens"])
    embedding = sensitivity.embedding
    if embedding.shape[0] != width:
        # OPT-350M has a projection between the embedding and the layers, so their channels are not the same.
        embedding = embedding.mean().expand(width)
    read = tokens * torch.diag(embedding)
    if name == skeleton.output_name:
        hessian = head["hessian"] + read if name == skeleton.input_name else head["hessian"]
        return hessian, tokens, sensitivity.outputs[name]
    counts = torch.bincount(windows.reshape(-1), minlength=rows)[:rows].float()
    return read, tokens, (counts + 1) / (counts.sum() + rows)


def model_files(checkpoint: Checkpoint, tokenizer: bool) -> dict[str, bytes]:
    """Return the files that a container carries, by name: configuration, generation settings, and the tokenizer if it is asked for.

    Raises UnsupportedModelError for a tokenizer that cannot be carried, or if no container takes so many bytes.
    """
    with tempfile.TemporaryDirectory(prefix="bstack-") as name, os_errors(name):
        folder = Path(name)
        config = copy.deepcopy(checkpoint.config)
        if checkpoint.untied:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        (folder / "config.json").write_text(config.to_json_string(use_diff=True), encoding="utf-8")
        words = config.get_text_config().vocab_size
        if (generation := read_generation(checkpoint.beside, checkpoint.name, words)) is not None:
            (folder / GENERATION).write_text(json.dumps(generation, indent=2), encoding="utf-8")
        if tokenizer:
            checkpoint.export_tokenizer(folder)
            if not tokenizer_files(path.name for path in folder.iterdir()):
                warnings.warn(
                    f"{checkpoint.name}: no tokenizer was found beside the weights, so the file takes token ids alone.",
                    ModelWarning,
                    stacklevel=2,
                )
        if checkpoint.code is not None and checkpoint.code.hub is not None:
            write_references(checkpoint.code, folder, place=checkpoint.code.hub.partition("@")[0])
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in paths)
        if size > bstk.limits.MAX_FILES_LENGTH:
            raise UnsupportedModelError(
                f"{checkpoint.name}: its configuration and tokenizer take {size / 2**20:.0f} MB as files, "
                f"and those of a .bstk file take at most {bstk.limits.MAX_FILES_LENGTH / 2**20:.0f} MB.",
                hint="Leave the tokenizer out.",
                option="tokenizer",
            )
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def add_files(files: Mapping[str, bytes], work: WorkDirectory) -> None:
    """Pack the `model_files`."""
    with work.part(FILES_PART) as part:
        for name, data in files.items():
            if data:
                part.add(data, name=name, kind=bstk.FILE)
