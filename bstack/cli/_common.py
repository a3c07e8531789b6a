"""What several subcommands share: options, opening a file, JSON, progress."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

import bstk
from bstack.cli._text import printable

file_argument = click.argument("file", type=click.Path(exists=True, dir_okay=False), metavar="FILE")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no warnings.")
strict_option = click.option("--strict", is_flag=True, help="Refuse a partial file (exit code 3).")


class BudgetType(click.ParamType):
    """A positive number of megabytes, kept as the text it was given as, so that decimals stay exact."""

    name = "MB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            bstk.budget_bytes(value)
        except bstk.UsageError as error:
            self.fail(str(error), param, ctx)
        return value


def mb_option(required: bool, help: str):
    """Return the ``--mb`` option."""
    return click.option("--mb", type=BudgetType(), required=required, help=help)


def open_file(path: str, strict: bool = False, quiet: bool = False) -> bstk.Reader:
    """Open a .bstk file; a partial one gives a warning on stderr, or with `strict` an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bstk.PartialWarning)
        reader = bstk.open(path, strict=strict)
    if reader.state == "partial" and not quiet:
        click.echo(printable(f"Warning: {path}: {reader.partial_message()}"), err=True)
    return reader


def print_json(schema: str, result: dict[str, Any]) -> None:
    """Print a result as JSON; the schema's number grows when a field changes its meaning or goes away."""
    click.echo(json.dumps({"schema": schema, **result}, indent=2))


@contextmanager
def progress(total: int, what: str, quiet: bool) -> Iterator[Any]:
    """Yield a function to call with the number of bytes done; draws a bar on stderr if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from tqdm import tqdm  # only where it is drawn: it takes a tenth of a second

    with tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        yield bar.update
