"""Copies of a .bstk file with other chunks, whose digests fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bstk

_KEPT = ("name", "kind", "level", "shape", "dtype", "rank", "transposed", "importance", "error")


def rewritten(
    file: Path,
    out: Path,
    change: Callable[[dict[str, Any], bytes], bytes | None],
    more: Sequence[tuple[dict[str, Any], bytes]] = (),
) -> Path:
    """Write a copy in which `change` has altered the fields and raw bytes of chunks; return `out`.

    Those for which it gives None are left out. `more` come after them.
    """
    with bstk.open(file) as reader:
        chunks = [({key: getattr(chunk, key) for key in _KEPT}, reader.read(chunk)) for chunk in reader.chunks]
        changed = [(fields, change(fields, raw)) for fields, raw in chunks]
        base = sum(raw is not None for _, raw in changed[: reader.base_count])
        entries = []
        for fields, raw in (*changed, *more):
            if raw is not None:
                frame = bstk.pack(raw)
                lengths = {"raw_length": len(raw), "stored_length": frame.stored_length}
                entries.append(bstk.Entry(**fields, **lengths, digest=frame.digest, stored=frame.stored))
        bstk.write(out, reader.metadata, entries, base)
    return out
