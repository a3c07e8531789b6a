"""What this machine can hold of a model behind a URL, said before it is fetched."""

from __future__ import annotations

import bstk
from bstack.cli._text import megabytes, number, rounded
from bstack.errors import printable
from bstack.hub.curve import divergence_at


def forecast(reader: bstk.Reader, budget: int | None, speed: bool) -> str:
    """Return a line on the cut of a file within a budget in bytes: its size, quality and speed on the CPU, and what is to be fetched."""
    from bstack.engine.url_cache import kept_path
    from bstack.packed.speed import expected_speeds

    cut = min(reader.fit(budget=budget), reader.model)
    whole = cut == reader.model
    words = [
        f"all {megabytes(cut.file_bytes)}" if whole else f"{megabytes(cut.file_bytes)} of {megabytes(reader.length)}"
    ]
    if (kld := divergence_at(reader.metadata, cut.file_bytes)) is not None:
        words.append(f"KLD about {number(kld, 2)}")
    if speed and (rate := expected_speeds(reader, [cut])[0]) is not None:
        words.append(f"about {rounded(rate)} tokens/s or less")
    kept = kept_path(reader.root)
    there = min(kept.stat().st_size, cut.file_bytes) if kept.is_file() else 0
    fetched = (
        "Nothing is left to fetch." if there == cut.file_bytes else f"Fetching {megabytes(cut.file_bytes - there)}."
    )
    return f"{printable(reader.source.name)}: {', '.join(words)}. {fetched}"
