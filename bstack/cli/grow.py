"""``bstack grow``."""

from __future__ import annotations

import click

import bstk
from bstack.cli import _common, _progress
from bstack.cli._text import megabytes


@click.command("grow")
@_common.file_argument
@_common.mb_option(
    required=True, help="The maximum size of the file, and of its weights in memory. Decimals are allowed."
)
@click.option("--from", "source", type=_common.PlaceType(), required=True, help="A larger file of the same model.")
@click.option("--in-place", is_flag=True, hidden=True)  # of 0.1.0
@_common.json_option
@_common.quiet_option
def command(file: str, budget: int, source: str, in_place: bool, as_json: bool, quiet: bool) -> None:
    """Grow FILE, a cut of a model, to at most N megabytes (1 MB is 2**20 bytes).

    The blocks that come next are appended from a larger file of the same model, on disk or behind a URL. Only those are read
    there, and each is checked. The root digests of the two files must be equal; otherwise FILE is not touched.

    If this fails or is stopped, FILE is a valid partial model, at least as large as before, and the same command continues.

    \b
    Example:
      bstack grow small.bstk --mb 5000 --from model.bstk
      bstack grow small.bstk --mb 5000 --from https://example.org/model.bstk
    """
    if in_place and not quiet:
        click.echo("Note: grow always changes FILE itself, so --in-place has no effect.", err=True)
    with _common.open_file(file, quiet=quiet, warn=False) as small:
        before = small.length
    with _common.open_file(source, quiet=quiet) as larger:
        cut = bstk.plan_growth(small, larger, budget=budget)
        with _progress.transferred(larger, cut.file_bytes - before, "grow", quiet) as advance:
            cut = bstk.grow(file, None, larger, advance, budget=budget)
        result = _common.describe(larger, cut) | {"file": file, "from": larger.source.name}
        result["added_bytes"] = cut.file_bytes - before
    if as_json:
        _common.print_json("bstack.grow/1", result)
        return
    click.echo(_common.report(result, f"{file}:", f"added {megabytes(result['added_bytes'])}; has"))
