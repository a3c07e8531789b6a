"""The ``bstack`` command: one file for each subcommand, imported when it is used.

A subcommand's module has an attribute ``command``. It raises; `bstack.cli._group` alone turns exceptions into
messages and exit codes.
"""

from __future__ import annotations

import click

from bstack.cli._group import LazyGroup

# Commands and their help lines, here so that `bstack --help` imports none of the modules.
COMMANDS = {
    "compress": "Compress a model into one .bstk file.",
    "truncate": "Cut a .bstk file to at most N megabytes.",
    "grow": "Add the next blocks to a cut, from a larger file.",
    "inspect": "Show what is inside a .bstk file.",
    "export": "Write a model for other programs.",
    "push": "Upload a .bstk file to the hub, with a model card.",
    "verify": "Check every digest of a .bstk file.",
    "run": "Write text in at most N megabytes.",
    "chat": "Talk with a model in the terminal.",
    "serve": "Serve a model over HTTP, with a page.",
    "bench": "Measure quality, speed and memory at several sizes.",
}


def _print_versions(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    # From the installed metadata, because importing torch takes seconds.
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from bstack.kernels.native import describe
    from bstk.preamble import SPECIFICATION

    parts = f"reads and writes format {SPECIFICATION}, Python {platform.python_version()}, kernels: {describe()}"
    click.echo(f"bstack {version('bstack')} ({parts})")
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            click.echo(f"  {package} {version(package)}")
        except PackageNotFoundError:
            click.echo(f"  {package} is not installed")
    context.exit()


@click.group(
    cls=LazyGroup, package=__name__, summaries=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Show the versions of bstack and what it uses.",
)
def main() -> None:
    """Compress a language model once, cut it to any megabyte.

    1 MB is 2**20 bytes.

    \b
    Example:
      bstack compress path/to/model -o model.bstk
      bstack inspect model.bstk
      bstack truncate model.bstk --mb 3000 -o small.bstk
    """
