"""``bstack grow``."""

from __future__ import annotations

from typing import Any

import click

import bstk
from bstack.cli import _common, _progress
from bstack.cli._text import megabytes
from bstack.errors import printable


@click.command("grow")
@_common.file_argument
@_common.mb_option(
    required=True, help="The maximum size of the file, and of its weights in memory. Decimals are allowed."
)
@click.option("--from", "source", type=_common.PlaceType(), required=True, help="A larger file of the same model.")
@_common.json_option
@_common.quiet_option
def command(file: str, mb: str, source: str, as_json: bool, quiet: bool) -> None:
    """Grow FILE, a cut of a model, to at most N megabytes (1 MB is 2**20 bytes).

    The blocks that come next are appended from a larger file of the same model, on disk or behind a URL. Only those are read
    there, and each is checked. The root digests of the two files must be equal; otherwise FILE is not touched.

    If this fails or is stopped, FILE is a valid partial model, at least as large as before, and the same command continues.

    \b
    Example:
      bstack grow small.bstk --mb 5000 --from model.bstk
      bstack grow small.bstk --mb 5000 --from https://example.org/model.bstk
    """
    with _common.open_file(file, quiet=quiet, warn=False) as small:
        before = small.length
    with _common.open_file(source, quiet=quiet) as larger:
        cut = bstk.plan_growth(small, mb, larger)
        with _progress.transferred(larger, cut.file_bytes - before, "grow", quiet) as advance:
            cut = bstk.grow(file, mb, larger, progress=advance)
        blocks = [chunk.is_block for chunk in larger.all_chunks]
        result: dict[str, Any] = {
            "file": file,
            "from": larger.source.name,
            "file_bytes": cut.file_bytes,
            "memory_bytes": cut.memory_bytes,
            "added_bytes": cut.file_bytes - before,
            "chunks": cut.chunks,
            "blocks": sum(blocks[: cut.chunks]),
            "blocks_total": sum(blocks),
            "bits_per_weight": larger.bits_per_weight(cut),
        }
    if as_json:
        _common.print_json("bstack.grow/1", result)
        return
    click.echo(
        f"{printable(file)}: is {megabytes(result['file_bytes'])} as a file and {megabytes(result['memory_bytes'])} of "
        f"weights in memory\n  added {megabytes(result['added_bytes'])}; has {result['blocks']:,} of "
        f"{result['blocks_total']:,} blocks of the complete file"
    )
    if result["bits_per_weight"] is not None:
        click.echo(f"  {result['bits_per_weight']:.3f} bits per weight of the linears")
