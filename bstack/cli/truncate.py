"""``bstack truncate``."""

from __future__ import annotations

import click

import bstk
from bstack.cli import _common, _progress
from bstack.cli._text import curve_table
from bstack.hub.curve import curve
from bstk.atomic import require_free


@click.command("truncate")
@click.argument("source", type=_common.PlaceType(), metavar="IN|URL")
@_common.mb_option(
    required=True, help="The maximum size of the file, and of its weights in memory. Decimals are allowed."
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), metavar="OUT", help="Where to write the cut.")
@click.option("--in-place", is_flag=True, help="Shorten IN itself. What is cut off is lost.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--no-seal", is_flag=True, help="Do not seal the cut: readers will call it partial.")
@click.option("--dry-run", is_flag=True, help="Only show what would be kept.")
@_common.json_option
@_common.quiet_option
def command(
    source: str,
    budget: int,
    output: str | None,
    in_place: bool,
    force: bool,
    no_seal: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Cut IN to the best model of at most N megabytes (1 MB is 2**20 bytes).

    The cut is the first part of IN; nothing is computed. It is sealed: its length is written into it, which distinguishes
    a cut from a transfer that broke off. With --no-seal, an unsealed IN is cut as "head -c" does.

    From a URL (https:// or hf://OWNER/REPO[/FILE]) only the cut is fetched. What has arrived is kept in OUT.part, and the
    same command continues there. A budget above the size of the file fetches all of it.

    An existing OUT is replaced only with --force. This is checked when the command starts and when all is written.

    Each block is checked while it is copied; --in-place copies and checks nothing.

    \b
    Example:
      bstack truncate model.bstk --mb 3000 -o small.bstk
      bstack truncate model.bstk --mb 62.5 --dry-run
      bstack truncate model.bstk --mb 3000 --in-place
      bstack truncate https://example.org/model.bstk --mb 3000 -o small.bstk
    """
    if output is not None and in_place:
        raise click.UsageError("-o OUT and --in-place exclude each other.")
    if output is None and not in_place and not dry_run:
        raise click.UsageError("no output is named. Use -o OUT, or --in-place to shorten IN itself.")
    if output is not None and not force and not dry_run:
        require_free(output)
    if in_place and bstk.is_url(source):
        raise click.UsageError("a file on a server cannot be cut in place. Name an output with -o OUT.")

    target = source if in_place else output
    # No warning about a partial file: cutting repairs it.
    with _common.open_file(source, quiet=quiet, warn=False) as reader:
        name = reader.source.name
        if dry_run:
            cut = bstk.plan(reader, budget=budget)
            result = _common.describe(reader, cut) | {"sealed": not no_seal and cut.file_bytes < reader.full_length}
            points = curve(reader.metadata)
        elif not in_place:
            doing = "fetch" if bstk.is_url(source) else "copy"
            with _progress.transferred(reader, bstk.plan(reader, budget=budget).file_bytes, doing, quiet) as advance:
                bstk.truncate(reader, output, budget=budget, seal=not no_seal, progress=advance, overwrite=force)
    if not dry_run:
        if in_place:
            bstk.truncate(source, None, budget=budget, seal=not no_seal)
        with _common.open_file(target or source, quiet=quiet, warn=False) as reader:
            result = _common.describe(reader, reader.fit()) | {"sealed": reader.state == "sealed"}
            points = curve(reader.metadata)
    if as_json:
        result |= {"input": name, "output": target, "dry_run": dry_run, "quality": points}
        _common.print_json("bstack.truncate/1", result)
        return
    click.echo(
        _common.report(
            result, f"{target or name}:{' would be' if dry_run else ''}", "would keep" if dry_run else "kept"
        )
    )
    if not dry_run and not result["sealed"] and result["blocks"] < result["blocks_total"]:
        click.echo("  not sealed: readers will call it partial")
    if dry_run and points:
        click.echo("\nMeasured when the model was compressed (> is the nearest size below):")
        click.echo(curve_table(points, cut=result["file_bytes"]))
