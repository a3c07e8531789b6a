"""What is outside the repeated layers: embedding and head, the other parameters, the model's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import bstk
from bstack.calibration.sensitivity import Sensitivity
from bstack.codecs import Codec
from bstack.compression.encode import Matrix, add_dense, encode
from bstack.compression.workers import Workers
from bstack.errors import UnsupportedModelError
from bstack.models.code import write_references
from bstack.models.names import MatrixName, row_ranges
from bstack.models.skeleton import Skeleton
from bstack.workdir import WorkDirectory
from bstk.errors import os_errors

__all__ = [
    "FILES_PART",
    "OUTSIDE_PART",
    "EmbeddingStatistics",
    "add_files",
    "check_dense",
    "compress_outside",
    "embedding_part",
    "embeddings",
]

FILES_PART = "files"
OUTSIDE_PART = "outside"


class EmbeddingStatistics:
    """Hessian and sensitivity of the embedding and the head.

    An error E in row i of the head costs F_i (E H E^T)_ii, F_i about the probability of token i. The same row as an
    embedding is read with that probability and costs sum_j G_j E_ij^2 then, G the sensitivity of the first layer's
    input. So one weighted hessian, H + T diag(G), and one sensitivity per row serve a tied matrix in both roles.

    Parameters
    ----------
    head_hessian : torch.Tensor
        Hessian of the head's input, shape (width, width), over `tokens` tokens.
    tokens : int
    sensitivity : Sensitivity
    calibration : torch.Tensor
        The calibration's token ids: how often each row is read.
    """

    def __init__(self, head_hessian: torch.Tensor, tokens: int, sensitivity: Sensitivity, calibration: torch.Tensor):
        self.tokens = tokens
        self._head_hessian = head_hessian
        self._sensitivity = sensitivity
        self._calibration = calibration

    def of(self, skeleton: Skeleton, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hessian and the sensitivity per row of the embedding, the head, or the tied matrix of both."""
        rows, width = shape
        embedding = self._sensitivity.embedding
        if embedding.shape[0] != width:
            # OPT-350M has a projection between the embedding and the layers, so their channels are not the same.
            embedding = embedding.mean().expand(width)
        read = self.tokens * torch.diag(embedding)
        if name == skeleton.output_name:
            hessian = self._head_hessian + read if name == skeleton.input_name else self._head_hessian
            return hessian, self._sensitivity.outputs[name]
        counts = torch.bincount(self._calibration.reshape(-1), minlength=rows)[:rows].float()
        return read, (counts + 1) / (counts.sum() + rows)


def embedding_part(parameter: str) -> str:
    """Return the name of the part of an embedding or a head."""
    return f"embedding-{parameter}"


def embeddings(skeleton: Skeleton) -> dict[str, list[MatrixName]]:
    """Return the embedding and the head by parameter name, one entry when they are tied, with their ranges of rows."""
    names = dict.fromkeys((skeleton.input_name, skeleton.output_name))
    return {name: row_ranges(name, _shape(skeleton, name)) for name in names}


def _shape(skeleton: Skeleton, name: str) -> tuple[int, int]:
    rows, width = skeleton.parameter(name).shape
    return rows, width


def check_dense(skeleton: Skeleton, stack_embeddings: bool) -> None:
    """Check that every tensor that is kept dense fits in a chunk of the container.

    Raises
    ------
    bstack.errors.UnsupportedModelError
    """
    stacked = set(embeddings(skeleton)) if stack_embeddings else set()
    for name in skeleton.outer_names:
        tensor = skeleton.parameter(name)
        dtype = skeleton.checkpoint.stored_dtype(name) if tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * dtype.itemsize
        if name not in stacked and size > bstk.limits.MAX_RAW_LENGTH:
            advice = " Set embeddings to stack, which splits it." if name in embeddings(skeleton) else ""
            raise UnsupportedModelError(
                f"{skeleton.checkpoint.name}: {name} takes {size / 2**30:.2f} GiB and would be kept dense, but a dense tensor "
                f"of a .bstk file takes at most {bstk.limits.MAX_RAW_LENGTH / 2**30:.0f} GiB.{advice}"
            )


def compress_outside(
    skeleton: Skeleton,
    statistics: EmbeddingStatistics,
    codec: Codec | None,
    work: WorkDirectory,
    workers: Workers,
    progress: Callable[[], None],
) -> None:
    """Finish the parts outside the layers; without a codec the embedding and the head stay dense."""
    stacked = {} if codec is None else embeddings(skeleton)
    for parameter, ranges in stacked.items():
        if codec is not None and not work.has(embedding_part(parameter)):
            _compress_embedding(skeleton, parameter, ranges, statistics, codec, work, workers, progress)
    if work.has(OUTSIDE_PART):
        return
    with work.part(OUTSIDE_PART) as part:
        for name in skeleton.outer_names:
            if name not in stacked:
                with skeleton.loaded([name]):
                    add_dense(name, skeleton.parameter(name), skeleton.checkpoint.stored_dtype(name), part)


def _compress_embedding(
    skeleton: Skeleton,
    parameter: str,
    ranges: list[MatrixName],
    statistics: EmbeddingStatistics,
    codec: Codec,
    work: WorkDirectory,
    workers: Workers,
    progress: Callable[[], None],
) -> None:
    """Encode an embedding or a head by ranges of rows; a function of its own, so that its gigabytes are freed."""
    with skeleton.loaded([parameter]), work.part(embedding_part(parameter)) as part:
        weight = skeleton.parameter(parameter)
        hessian, sensitivity = statistics.of(skeleton, parameter, _shape(skeleton, parameter))
        rows = {name: slice(*name.rows) if name.rows else slice(None) for name in ranges}
        encode(
            (
                Matrix(str(name), weight[r], hessian, statistics.tokens, sensitivity[r], even=True)
                for name, r in rows.items()
            ),
            codec,
            part,
            workers,
            progress,
        )


def add_files(skeleton: Skeleton, work: WorkDirectory) -> bool:
    """Pack configuration and tokenizer files; return whether there is a tokenizer.

    Raises
    ------
    bstack.errors.UnsupportedModelError
        They are larger than the files of a container may be.
    """
    folder: Path = work.scratch()
    checkpoint = skeleton.checkpoint
    names = checkpoint.export_tokenizer(folder)
    with os_errors(str(folder)):
        (folder / "config.json").write_text(checkpoint.config.to_json_string(use_diff=True), encoding="utf-8")
        if checkpoint.code is not None and checkpoint.code.hub is not None:
            write_references(checkpoint.code, folder, place=checkpoint.code.hub.partition("@")[0])
    size = sum((folder / name).stat().st_size for name in {*names, "config.json"})
    if size > bstk.limits.MAX_FILES_LENGTH:
        raise UnsupportedModelError(
            f"{checkpoint.name}: its configuration and tokenizer take {size / 2**20:.0f} MB as files, and those of a .bstk file take "
            f"at most {bstk.limits.MAX_FILES_LENGTH / 2**20:.0f} MB."
        )
    with work.part(FILES_PART) as part:
        for name in sorted({*names, "config.json"}):
            if data := (folder / name).read_bytes():
                part.add(data, name=name, kind=bstk.FILE)
    return "tokenizer_config.json" in names
