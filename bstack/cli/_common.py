"""Options and helpers of several subcommands: opening a file, warnings, JSON."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

import bstk
from bstack.cli._text import megabytes
from bstack.errors import ModelWarning, printable
from bstk.http import shown

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no warnings.")
strict_option = click.option("--strict", is_flag=True, help="Refuse a partial file (exit code 3).")


trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that the model needs and transformers does not have."
)
code_option = click.option(
    "--code",
    metavar="FOLDER|HUB-ID",
    help="Where that code is; by default the hub id that FILE was made from. FILE itself has no code.",
)


class FileType(click.Path):
    """An existing file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in value and not os.path.exists(value):
            self.fail(
                "this takes a file on disk, not a URL. Fetch it first: bstack truncate URL --mb N -o OUT.", param, ctx
            )
        if _is_model(value):
            self.fail(
                f"{value} is a model, not a .bstk file. Compress it first: bstack compress {value} -o "
                f"{os.path.basename(os.path.abspath(value))}.bstk",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def _is_model(value: str) -> bool:
    """Tell whether `value` names a model, as for ``bstack compress``, instead of a .bstk file."""
    if os.path.exists(value):
        return os.path.exists(os.path.join(value, "config.json"))
    from bstack.models.files import DEFAULT_MODEL

    return value == DEFAULT_MODEL


FILE = FileType(exists=True, dir_okay=False)


class PlaceType(click.ParamType):
    """An existing file, or a URL."""

    name = "FILE|URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if bstk.is_url(value):
            return value
        scheme, separator, rest = value.partition("://")
        if separator and not os.path.exists(value):
            allowed = "URLs begin with https://, http:// or hf://."
            hint = f"Give the path alone, {rest}." if scheme.lower() == "file" else allowed
            self.fail(f"{scheme}:// is not read. {hint}", param, ctx)
        return FILE.convert(value, param, ctx)


file_argument = click.argument("file", type=FILE, metavar="FILE")
place_argument = click.argument("file", type=PlaceType(), metavar="FILE|URL")


class Parsed(click.ParamType):
    """What a function reads from the text; its errors are those of the option."""

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value)
        except (ValueError, bstk.UsageError) as error:
            self.fail(str(error), param, ctx)


def mb_option(required: bool, help: str) -> Callable[..., Any]:
    """Return the ``--mb`` option: the parameter `budget`, in bytes."""
    return click.option("--mb", "budget", type=Parsed("MB", bstk.budget_bytes), required=required, help=help)


def open_file(path: str, strict: bool = False, quiet: bool = False, warn: bool = True) -> bstk.Reader:
    """Open a .bstk file or URL; warn on stderr about a partial one, or raise with `strict`."""
    source: Any = bstk.HttpSource(path, retries(path, quiet)) if bstk.is_url(path) else path
    reader = bstk.open(source, strict=strict, warn=False)
    if reader.state == "partial" and warn and not quiet:
        click.echo(printable(f"Warning: {reader.source.name}: {reader.partial_message()}"), err=True)
    return reader


def retries(url: str, quiet: bool) -> Callable[[str], None] | None:
    """Return a function that logs each retry of a URL on stderr: a server that does not answer may take minutes."""
    return None if quiet else lambda text: click.echo(printable(f"{shown(url)}: {text}"), err=True)


def describe(reader: bstk.Reader, cut: bstk.Cut) -> dict[str, Any]:
    """Return what a cut holds, as ``truncate`` and ``grow`` print it."""
    blocks = [chunk.is_block for chunk in reader.all_chunks]
    sizes = {"file_bytes": cut.file_bytes, "memory_bytes": cut.memory_bytes, "chunks": cut.chunks}
    exact = [chunk.kind.restores for chunk in reader.all_chunks]
    found = {"blocks": sum(blocks[: cut.chunks]), "blocks_total": sum(blocks)}
    found |= {"exact_chunks": sum(exact[: cut.chunks]), "exact_chunks_total": sum(exact)}
    return {**sizes, **found, "bits_per_weight": reader.bits_per_weight(cut)}


def report(result: dict[str, Any], begin: str, kept: str) -> str:
    """Return the lines about a cut from `describe`, such as "FILE: ..." and "kept ..."."""
    sizes = f"{megabytes(result['file_bytes'])} as a file and {megabytes(result['memory_bytes'])} of weights in memory"
    blocks = f"{result['blocks']:,} of {result['blocks_total']:,} blocks of the complete file"
    bits = result["bits_per_weight"]
    last = "" if bits is None else f"\n  {bits:.3f} bits per weight of the linears"
    here, total = result["exact_chunks"], result["exact_chunks_total"]
    if 0 < here < total:
        last += f"\n  {here:,} of {total:,} chunks of the exact top, of no use without the rest"
    elif total:
        last += "\n  the exact top: gives back the original" if here else "\n  without the exact top"
    return f"{printable(begin)} {sizes}\n  {kept} {blocks}{last}"


def print_json(schema: str, result: dict[str, Any]) -> None:
    """Print a result as JSON; the schema's number grows when a field changes its meaning or goes away."""
    click.echo(json.dumps({"schema": schema, **result}, indent=2))


@contextmanager
def model_warnings(quiet: bool) -> Iterator[None]:
    """Print warnings about a model on stderr, such as Python code that is about to run, or files left out."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, ModelWarning):
                show(message, category, *where, **more)
            elif not quiet:
                click.echo(printable(f"Warning: {message}"), err=True)

        warnings.showwarning = warn
        warnings.simplefilter("always", ModelWarning)
        yield
