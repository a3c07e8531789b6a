"""``bstack inspect``."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import click

import bstk
from bstack.cli import _common
from bstack.cli._text import curve_table, fields, megabytes, number, original_fields, rounded, table
from bstack.errors import printable
from bstack.hub.curve import curve
from bstk.kinds import outlier_count, spqr_form, spqr_parts

_SIZES = 8  # rows of the table of cuts
_SHOWN_FILES = 6
_SPQR_PARTS = ("codes", "statistics", "permutation", "outliers", "planes")
_MODEL_FIRST = ("name", "architecture", "parameters")
# Shown in one line.
_ORIGINAL = {"original_bytes", "original_dtype", "original_dtype_bytes", "source_quantisation"}


@click.command("inspect")
@_common.place_argument
@click.option("--blocks", "show_blocks", is_flag=True, help="List every block of the stack, in order.")
@click.option("--root", "root_only", is_flag=True, help="Print the root digest alone: it authenticates every cut.")
@_common.strict_option
@_common.json_option
@_common.quiet_option
def command(file: str, show_blocks: bool, root_only: bool, strict: bool, as_json: bool, quiet: bool) -> None:
    """Show what is inside FILE: the model, its sizes, its stack of blocks, what cuts of it keep.

    Only the head of FILE is read or, with a URL, fetched; to check all of it, use bstack verify.

    \b
    Example:
      bstack inspect model.bstk
      bstack inspect model.bstk --blocks | head -20
      bstack inspect model.bstk --json
      bstack inspect https://example.org/model.bstk --root
    """
    if root_only and (show_blocks or as_json):
        raise click.UsageError("--root prints the root digest alone, without --blocks; --json has it too.")
    with _common.open_file(file, strict=strict, quiet=quiet) as reader:
        if root_only:
            click.echo(reader.root.hex())
        elif as_json:
            _common.print_json("bstack.inspect/2", _as_json(reader, show_blocks))
        else:
            click.echo(_page(reader))
            if show_blocks:
                click.echo(f"\nBlocks (* in the base model)\n{_block_table(reader)}")


def _page(reader: bstk.Reader) -> str:
    sections = [
        ("Model", _model_fields(reader)),
        ("Sizes", _size_fields(reader)),
        ("Stack", _stack_fields(reader)),
        ("Made with", _provenance_fields(reader.metadata)),
    ]
    parts = [f"{title}\n{fields(pairs)}" for title, pairs in sections if pairs]
    parts.insert(3, _cut_table(reader))
    spqr = _spqr_summary(reader)
    if spqr is not None:
        parts.insert(3, f"SpQR linears here\n{_spqr_table(spqr)}")
    points = curve(reader.metadata)
    if points:
        more = any(point["file_bytes"] > reader.length for point in points)
        title = "Quality measured when the model was compressed" + (" (-: larger than this file)" if more else "")
        parts.insert(len(parts) - 1, f"{title}\n{curve_table(points, here=reader.length)}")
    return "\n\n".join([printable(reader.source.name), *parts])


def _model_fields(reader: bstk.Reader) -> list[tuple[str, str]]:
    model = reader.metadata.get("model")
    if not isinstance(model, dict):
        return [("name", "not recorded in the metadata")]
    pairs = []
    for key in dict.fromkeys([*_MODEL_FIRST, *model]):
        value = model.get(key)
        if key not in _ORIGINAL and value is not None and not isinstance(value, (dict, list)):
            pairs.append((printable(key.replace("_", " ")), number(value)))
    return [*pairs, *original_fields(model)]


def _size_fields(reader: bstk.Reader) -> list[tuple[str, str]]:
    state = {
        "whole": "whole: nothing is cut off",
        "sealed": "sealed: cut to this length on purpose",
        "partial": "partial: shorter than the complete file, and not sealed",
    }[reader.state]
    sizes = [
        ("this file", megabytes(reader.length), megabytes(reader.memory_bytes)),
        ("base model", megabytes(reader.base.file_bytes), megabytes(reader.base.memory_bytes)),
        ("complete file", megabytes(reader.complete.file_bytes), megabytes(reader.complete.memory_bytes)),
    ]
    width = max(len(cell) for _, *cells in sizes for cell in cells)
    pairs = [
        (what, f"{file.rjust(width)} as a file, {memory.rjust(width)} of weights in memory")
        for what, file, memory in sizes
    ]
    if exact := [chunk for chunk in reader.all_chunks if chunk.kind.restores]:
        here = sum(chunk.end <= reader.length for chunk in exact)
        words = (
            "gives back the original bit for bit" if reader.restores else "would give back the original, but is cut off"
        )
        pairs.append(("exact top", f"{here:,} of {len(exact):,} chunks, {megabytes(_stored(exact))}: {words}"))
    return [*pairs, ("state", state), ("root digest", reader.root.hex())]


def _stored(chunks: list[bstk.Chunk]) -> int:
    return sum(chunk.stored_length for chunk in chunks)


def _stack_fields(reader: bstk.Reader) -> list[tuple[str, str]]:
    here = [chunk for chunk in reader.chunks if chunk.is_block]
    base = [chunk for chunk in reader.chunks[: reader.base_count] if chunk.is_block]
    total = sum(chunk.is_block for chunk in reader.all_chunks)
    weights = sum(math.prod(chunk.shape) for chunk in base if chunk.level == 0)
    tensors = [chunk for chunk in reader.chunks if chunk.is_weight and not chunk.is_block]
    pairs = []
    if here:
        levels = Counter(chunk.name for chunk in here).values()
        pairs += [
            ("linears", f"{len(levels):,} with {weights:,} weights"),
            ("blocks", f"{len(here):,} here; {len(base):,} in the base model, {total:,} in the complete file"),
            ("blocks a linear", f"{min(levels)} to {max(levels)} here"),
            ("kinds", ", ".join(_kind_summary(here))),
            ("bits per weight", f"{reader.bits_per_weight():.3f} of the linears here"),
        ]
    pairs.append(("other tensors", f"{len(tensors):,}, {megabytes(sum(c.raw_length for c in tensors))} in memory"))
    names = [printable(name) for name in reader.files]
    more = f" and {len(names) - _SHOWN_FILES} more" if len(names) > _SHOWN_FILES else ""
    pairs.append(("embedded files", f"{len(names)}: {', '.join(names[:_SHOWN_FILES])}{more}" if names else "none"))
    return pairs


def _kind_summary(blocks: list[bstk.Chunk]) -> list[str]:
    ranks: dict[bstk.Kind, set[int]] = {}
    for chunk in blocks:
        ranks.setdefault(chunk.kind, set()).add(chunk.rank)
    return [f"{kind}{_rank_words(kind, min(found), max(found))}" for kind, found in ranks.items()]


def _rank_words(kind: bstk.Kind, low: int, high: int) -> str:
    """Describe the index's field called rank in the words of the kind."""
    span = f"{low}" if low == high else f"{low} to {high}"
    if kind is bstk.OUTLIERS:
        return ""
    if kind is bstk.SPQR and low == high:
        return " ({} bits in groups of {})".format(*spqr_form(high))
    return f" ({span} bits per weight)" if kind in (bstk.TRELLIS, bstk.TRELLIS5) else f" (rank {span})"


def _provenance_fields(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for key, value in metadata.items():
        if key in ("model", "quality"):
            continue
        if isinstance(value, dict):
            plain = {inner: item for inner, item in value.items() if not isinstance(item, (dict, list))}
            value = ", ".join(f"{inner} {number(item)}" for inner, item in plain.items())
        elif isinstance(value, list):
            value = f"{len(value)} entries (see --json)"
        pairs.append((printable(key.replace("_", " ")), printable(number(value))))
    return pairs


def _spqr_summary(reader: bstk.Reader) -> dict[str, Any] | None:
    """Return the bytes in memory of the parts of all stacks with a dense SpQR part in this file; None without any.

    ``bytes`` names the codes, the statistics (scale and zero codes and their second level), the order of the inputs, the
    outliers (row pointers, columns, values), and the blocks above. ``bits_per_weight`` counts all of them, and
    ``level_bits_per_weight`` all but the blocks above.
    """
    names = {chunk.name for chunk in reader.chunks if chunk.kind is bstk.SPQR}
    if not names:
        return None
    parts = dict.fromkeys(_SPQR_PARTS, 0)
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
        "outlier_fraction": outliers / weights,
        "bytes": parts,
    }


def _spqr_table(found: dict[str, Any]) -> str:
    """Return a summary as a table."""
    weights = found["weights"]
    count = f"{found['outliers']:,} outliers, {100 * found['outlier_fraction']:.3f} % of {weights:,} weights"
    words = {"outliers": count if found["outliers"] else "none here", "planes": "blocks above dense part and outliers"}
    sizes = found["bytes"].items()
    rows = [[part, megabytes(size), f"{8 * size / weights:.4f}", words.get(part, "")] for part, size in sizes]
    level, total = found["level_bits_per_weight"], found["bits_per_weight"]
    planes = found["bytes"]["planes"]
    all_ = sum(found["bytes"].values())
    rows.append(["dense + outliers", megabytes(all_ - planes), f"{level:.4f}", f"of {found['linears']} linears"])
    rows.append(["all", megabytes(all_), f"{total:.4f}", ""])
    return table(["part", "in memory", "bits/weight", ""], rows, left=[0, 3])


def _cut_table(reader: bstk.Reader) -> str:
    from bstack.kernels.native import instructions
    from bstack.packed.speed import expected_speeds

    cuts = list(reader.even_cuts(_SIZES))
    speeds = expected_speeds(reader, cuts)
    here = f"; tokens/s: what {instructions()} kernels allow here at most" if any(speeds) else ""
    rows = []
    for cut, speed in zip(cuts, speeds, strict=True):
        blocks = sum(chunk.is_block for chunk in reader.all_chunks[: cut.chunks])
        bits = reader.bits_per_weight(cut)
        sizes = [f"{bstk.mb_ceil(cut.budget)}", megabytes(cut.file_bytes), megabytes(cut.memory_bytes)]
        row = [*sizes, f"{blocks:,}", "-" if bits is None else f"{bits:.3f}"]
        rows.append([*row, "-" if speed is None else rounded(speed)])
    head = ["--mb", "file", "in memory", "blocks", "bits/weight", "tokens/s"]
    return f"Cuts of this file (bstack truncate --mb N{here})\n{table(head, rows)}"


def _block_table(reader: bstk.Reader) -> str:
    rows = []
    for position, chunk in enumerate(reader.chunks):
        if not chunk.is_block:
            continue
        base = "*" if position < reader.base_count else ""
        about = [f"{chunk.offset}", printable(chunk.name), f"{chunk.level}", chunk.kind.name, f"{chunk.rank}"]
        sizes = [f"{chunk.stored_length:,}", f"{chunk.raw_length:,}"]
        rows.append([base, *about, *sizes, f"{chunk.importance:.4g}", f"{chunk.error:.4f}"])
    head = ["", "offset", "linear", "level", "kind", "rank", "bytes in file", "in memory", "importance", "error left"]
    return table(head, rows, left=[0, 2, 4], indent="")


def _as_json(reader: bstk.Reader, with_blocks: bool) -> dict[str, Any]:
    from bstack.packed.speed import expected_speeds

    blocks = [chunk for chunk in reader.chunks if chunk.is_block]
    cuts = list(reader.even_cuts(_SIZES))
    result = {
        "file": reader.source.name,
        "state": reader.state,
        "root": reader.root.hex(),
        "file_bytes": reader.length,
        "memory_bytes": reader.memory_bytes,
        "base": reader.base._asdict(),
        "complete": reader.complete._asdict(),
        "chunks": len(reader.chunks),
        "blocks": len(blocks),
        "linears": len({chunk.name for chunk in blocks}),
        "bits_per_weight": reader.bits_per_weight(),
        "restores_original": reader.restores,
        "exact_bytes": _stored([chunk for chunk in reader.all_chunks if chunk.kind.restores]),
        "files": {name: chunk.raw_length for name, chunk in reader.files.items()},
        "cuts": [
            {**cut._asdict(), "bits_per_weight": reader.bits_per_weight(cut), "tokens_per_second": speed}
            for cut, speed in zip(cuts, expected_speeds(reader, cuts), strict=True)
        ],
        "metadata": reader.metadata,
    }
    if (spqr := _spqr_summary(reader)) is not None:
        result["spqr"] = spqr
    if with_blocks:
        result["stack"] = [
            _chunk_as_json(chunk, position < reader.base_count)
            for position, chunk in enumerate(reader.chunks)
            if chunk.is_block
        ]
    return result


def _chunk_as_json(chunk: bstk.Chunk, in_base: bool) -> dict[str, Any]:
    named = {"name": chunk.name, "level": chunk.level, "kind": chunk.kind.name, "in_base": in_base}
    plain = ("offset", "stored_length", "raw_length", "shape", "rank", "transposed", "importance", "error")
    return {**named, **{key: getattr(chunk, key) for key in plain}, "digest": chunk.digest.hex()}
