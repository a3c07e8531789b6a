"""``bstack push``."""

from __future__ import annotations

import click

from bstack.cli import _common, _progress
from bstack.cli._text import fields, megabytes
from bstack.errors import printable, require


@click.command("push")
@_common.file_argument
@click.argument("repository", metavar="OWNER/NAME")
@click.option(
    "--base-model", metavar="HUB-ID", help="The original, for the card; by default the hub id that FILE records."
)
@click.option(
    "--license", "licence", metavar="ID", help="The original's licence; by default what the hub says of the original."
)
@click.option(
    "--private",
    is_flag=True,
    help="Make a new repository private; refuse one that is public. By default the owner's settings decide.",
)
@click.option(
    "--dry-run",
    type=click.Path(),
    metavar="DIR",
    help="Write the card and the files beside FILE into DIR; upload nothing.",
)
@_common.json_option
@_common.quiet_option
def command(
    file: str,
    repository: str,
    base_model: str | None,
    licence: str | None,
    private: bool,
    dry_run: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Upload FILE to a repository on the hub, with a card, and with what transformers needs to load it.

    The card says what the model is, its divergence from the original by size as a picture and a table, how to fetch a cut, the
    root digest, the original and its licence. All goes into one commit; a card that is there is replaced. The login is that of
    huggingface_hub (hf auth login, or HF_TOKEN).

    FILE becomes the repository's only .bstk file, so that hf://OWNER/NAME names it. Each block is checked first.

    \b
    Example:
      bstack push model.bstk owner/name
      bstack push model.bstk owner/name --license apache-2.0 --dry-run card/
    """
    require("Publishing", "hub", ("huggingface_hub", "matplotlib", "safetensors"))
    from bstack.hub.push import push, write_repository

    about = {"base_model": base_model, "licence": licence}
    with _common.open_file(file, quiet=quiet, warn=False) as reader:
        if dry_run is not None:
            done = write_repository(reader, dry_run, repository, **about)
        else:
            with _progress.copied(sum(chunk.stored_length for chunk in reader.chunks), "verify", quiet) as advance:
                reader.verify(lambda chunk: advance(chunk.stored_length))
            _bars(quiet)
            done = push(reader, repository, private=private, **about)
    if done.licence is None and not quiet:
        click.echo("Note: the card names no licence. Give the original's with --license.", err=True)
    if as_json:
        result = {"file": file, "repository": repository, "dry_run": dry_run, "url": done.url, "files": done.files}
        _common.print_json("bstack.push/1", {**result, "base_model": done.base_model, "license": done.licence})
        return
    click.echo(
        f"{printable(done.url)}: uploaded" if done.url else f"{printable(dry_run)}: written; nothing was uploaded"
    )
    click.echo(fields([(printable(name), megabytes(size)) for name, size in done.files.items()]))


def _bars(quiet: bool) -> None:
    """Show the hub client's own progress on a terminal alone."""
    from huggingface_hub.utils import disable_progress_bars

    if quiet or not _progress.is_terminal():
        disable_progress_bars()
