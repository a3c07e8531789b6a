"""What stands outside the repeated layers: embeddings, head, the remaining parameters, the model's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import bstk
from bstack.calibration.sensitivity import Sensitivity
from bstack.codecs import Codec
from bstack.models.skeleton import Skeleton
from bstack.models.slices import MatrixName, row_ranges
from bstack.pipeline.encode import Matrix, add_dense, encode
from bstack.workdir import WorkDirectory

__all__ = ["FILES_PART", "OUTER_PART", "TableStatistics", "add_files", "compress_outer", "count_tables", "table_parts"]

FILES_PART = "files"
OUTER_PART = "outer"


class TableStatistics:
    """What is known of the inputs and outputs of the embedding and the head.

    An error E in row i of the head costs F_i (E H E^T)_ii, F_i about the probability of token i. The same row as an
    embedding is read with that probability and costs sum_j G_j E_ij^2 then, G the sensitivity of the first layer's
    input. So one weighted moment, H + T diag(G), and one sensitivity per row serve a tied matrix in both roles.

    Parameters
    ----------
    head_moment : torch.Tensor
        Second moment of the head's input, shape (width, width), over `tokens` tokens.
    tokens : int
    sensitivity : Sensitivity
    calibration : torch.Tensor
        The calibration's token ids: how often each row is read.
    """

    def __init__(self, head_moment: torch.Tensor, tokens: int, sensitivity: Sensitivity, calibration: torch.Tensor):
        self.tokens = tokens
        self._head_moment = head_moment
        self._sensitivity = sensitivity
        self._calibration = calibration

    def of(self, skeleton: Skeleton, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Moment and sensitivity per row of the embedding, the head, or the tied matrix of both."""
        rows, width = shape
        embedding = self._sensitivity.embedding
        if embedding.shape[0] != width:
            # OPT-350M has a projection between the embedding and the layers: no channel of one is a channel of the other.
            embedding = embedding.mean().expand(width)
        read = self.tokens * torch.diag(embedding)
        if name == skeleton.output_name:
            moment = self._head_moment + read if name == skeleton.input_name else self._head_moment
            return moment, self._sensitivity.outputs[name]
        counts = torch.bincount(self._calibration.reshape(-1), minlength=rows)[:rows].float()
        return read, (counts + 1) / (counts.sum() + rows)


def table_parts(skeleton: Skeleton) -> Iterator[tuple[str, MatrixName]]:
    """Part name and matrix name of each row range of the embedding and the head."""
    for parameter in dict.fromkeys((skeleton.input_name, skeleton.output_name)):
        for matrix in row_ranges(parameter, tuple(skeleton.parameter(parameter).shape)):
            yield f"table-{parameter}-{matrix.rows[0] if matrix.rows else 0:09d}", matrix


def count_tables(skeleton: Skeleton) -> int:
    """Number of row ranges of the embedding and the head."""
    return sum(1 for _ in table_parts(skeleton))


def compress_outer(
    skeleton: Skeleton,
    statistics: TableStatistics,
    codec: Codec | None,
    work: WorkDirectory,
    progress: Callable[[], None],
) -> None:
    """Finish the parts outside the layers; with no codec the embedding and the head stay dense."""
    tables = {skeleton.input_name, skeleton.output_name} if codec is not None else set()
    if codec is not None:
        _compress_tables(skeleton, statistics, codec, work, progress)
    if work.has(OUTER_PART):
        return
    with work.part(OUTER_PART) as part:
        for name in skeleton.outer_names:
            if name not in tables:
                with skeleton.loaded([name]):
                    add_dense(name, skeleton.parameter(name), skeleton.checkpoint.stored_dtype(name), part)


def _compress_tables(
    skeleton: Skeleton,
    statistics: TableStatistics,
    codec: Codec,
    work: WorkDirectory,
    progress: Callable[[], None],
) -> None:
    for parameter in dict.fromkeys((skeleton.input_name, skeleton.output_name)):
        parts = [(part, matrix) for part, matrix in table_parts(skeleton) if matrix.parameter == parameter]
        if all(work.has(part) for part, _ in parts):
            continue
        with skeleton.loaded([parameter]):
            weight = skeleton.parameter(parameter)
            moment, sensitivity = statistics.of(skeleton, parameter, tuple(weight.shape))
            for part_name, matrix in parts:
                if not work.has(part_name):
                    rows = slice(*matrix.rows) if matrix.rows else slice(None)
                    with work.part(part_name) as part:
                        encode(
                            Matrix(str(matrix), weight[rows], moment, statistics.tokens, sensitivity[rows]),
                            codec, part,
                        )
                progress()


def add_files(skeleton: Skeleton, work: WorkDirectory) -> bool:
    """Pack configuration and tokenizer files; return whether there is a tokenizer."""
    folder: Path = work.scratch()
    checkpoint = skeleton.checkpoint
    names = checkpoint.export_tokenizer(folder)
    (folder / "config.json").write_text(checkpoint.config.to_json_string(use_diff=True), encoding="utf-8")
    with work.part(FILES_PART) as part:
        for name in sorted({*names, "config.json"}):
            if data := (folder / name).read_bytes():
                part.add(data, name=name, kind=bstk.FILE)
    return "tokenizer_config.json" in names
