"""Names of matrices: a whole parameter, one slice of a three-dimensional one, or a range of rows.

``model.layers.0.mlp.up_proj.weight``, ``model.layers.0.mlp.experts.down_proj[3]``,
``model.embed_tokens.weight[0:16384]``: the convention of format/SPEC.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = ["MatrixName", "row_ranges"]

_PATTERN = re.compile(
    r"(?P<parameter>[^\[\]]+)(?:\[(?P<index>N)\]|\[(?P<start>N):(?P<stop>N)\])?".replace("N", "(?:0|[1-9][0-9]*)")
)

# Rows of embeddings are coded in ranges, each a stack of its own: frequent tokens have small ids, and the first few
# thousand matter far more than the rest (docs/research/notebook.md). So ranges start small and double, up to a size at which
# blocks are as small as those of linears.
FIRST_ROWS = 2048
RANGE_WEIGHTS = 2**22


class MatrixName(NamedTuple):
    """A parsed matrix name: the parameter, and a slice along the first of three dimensions or a range of rows."""

    parameter: str
    index: int | None = None  # type: ignore[assignment]  # hides tuple.index
    rows: tuple[int, int] | None = None

    @classmethod
    def parse(cls, name: str) -> MatrixName:
        """Read a name; raises ValueError for one that does not follow the convention."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not the name of a matrix")
        index, start, stop = match["index"], match["start"], match["stop"]
        return cls(match["parameter"], int(index) if index else None, (int(start), int(stop)) if start else None)

    def __str__(self) -> str:
        if self.index is not None:
            return f"{self.parameter}[{self.index}]"
        if self.rows is not None:
            return f"{self.parameter}[{self.rows[0]}:{self.rows[1]}]"
        return self.parameter

    def view(self, parameter: Any, transposed: bool) -> Any:
        """Return a view of the named part of a parameter, a tensor or an array, as (outputs, inputs)."""
        part = parameter if self.index is None else parameter[self.index]
        part = part if self.rows is None else part[self.rows[0] : self.rows[1]]
        return part.swapaxes(0, 1) if transposed else part


def row_ranges(parameter: str, shape: Sequence[int]) -> list[MatrixName]:
    """Split an embedding or head into ranges of rows; one with few rows stays whole."""
    rows, columns = shape
    if rows <= FIRST_ROWS:
        return [MatrixName(parameter)]
    bounds = [0, FIRST_ROWS]
    while bounds[-1] < rows:
        step = min(bounds[-1], max(RANGE_WEIGHTS // columns, FIRST_ROWS))
        bounds.append(min(bounds[-1] + step, rows))
    return [MatrixName(parameter, rows=(a, b)) for a, b in pairwise(bounds)]
