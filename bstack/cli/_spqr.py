"""What SpQR stacks take, part by part, from the index alone."""

from __future__ import annotations

import math
from typing import Any

import bstk
from bstack.cli._text import megabytes, table
from bstk.kinds import outlier_count, spqr_parts

_PARTS = ("codes", "statistics", "permutation", "outliers", "planes")


def summary(reader: bstk.Reader) -> dict[str, Any] | None:
    """Bytes in memory of the parts of all stacks with a dense SpQR part that this file has; None without any.

    ``bytes`` names the codes, the statistics (scale and zero codes and their second level), the order of the inputs, the
    outliers (row pointers, columns, values), and the blocks above. ``bits_per_weight`` counts all of them, and
    ``level_bits_per_weight`` all but the blocks above.
    """
    names = {chunk.name for chunk in reader.chunks if chunk.kind is bstk.SPQR}
    if not names:
        return None
    parts = dict.fromkeys(_PARTS, 0)
    weights = outliers = 0
    for chunk in reader.chunks:
        if chunk.name not in names:
            continue
        if chunk.kind is bstk.SPQR:
            for part, size in spqr_parts(chunk.shape, chunk.rank)._asdict().items():
                parts[part] += size
            weights += math.prod(chunk.shape)
        elif chunk.kind is bstk.OUTLIERS:
            parts["outliers"] += chunk.raw_length
            outliers += outlier_count(chunk.shape, chunk.raw_length)
        else:
            parts["planes"] += chunk.raw_length
    total = sum(parts.values())
    return {
        "linears": len(names),
        "weights": weights,
        "bits_per_weight": 8 * total / weights,
        "level_bits_per_weight": 8 * (total - parts["planes"]) / weights,
        "outliers": outliers,
        "outlier_share": outliers / weights,
        "bytes": parts,
    }


def render(found: dict[str, Any]) -> str:
    """Return a summary as a table."""
    weights = found["weights"]
    share = f"{found['outliers']:,} outliers, {100 * found['outlier_share']:.3f} % of {weights:,} weights"
    words = {"outliers": share if found["outliers"] else "none here", "planes": "blocks above dense part and outliers"}
    rows = [
        [part, megabytes(size), f"{8 * size / weights:.4f}", words.get(part, "")]
        for part, size in found["bytes"].items()
    ]
    level, total = found["level_bits_per_weight"], found["bits_per_weight"]
    planes = found["bytes"]["planes"]
    all_ = sum(found["bytes"].values())
    rows.append(["dense + outliers", megabytes(all_ - planes), f"{level:.4f}", f"of {found['linears']} linears"])
    rows.append(["all", megabytes(all_), f"{total:.4f}", ""])
    return table(["part", "in memory", "bits/weight", ""], rows, left=[0, 3])
