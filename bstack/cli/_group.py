"""The top-level command: finds subcommands without importing them, and ends every failure in words and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import click

from bstack.cli._text import printable
from bstack.errors import user_message
from bstk.errors import Interrupted


class LazyGroup(click.Group):
    """A group whose subcommands are modules of `package`, each imported when it is called.

    Parameters
    ----------
    package : str
        Where the modules are; each has the click command as ``command``.
    summaries : dict
        Command name -> the line that the group's help shows, in order.
    """

    def __init__(self, *args: Any, package: str, summaries: dict[str, str], **settings: Any):
        super().__init__(*args, **settings)
        self._package = package
        self._summaries = summaries

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._summaries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._summaries:
            return None
        return importlib.import_module(f"{self._package}.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._summaries.items()))

    def main(self, *args: Any, **settings: Any) -> None:
        """Run, and leave the process with an exit code of ``docs/exit-codes.md``."""
        settings.pop("standalone_mode", None)
        try:
            code = super().main(*args, standalone_mode=False, **settings)
            # Here, where a reader that has gone away is still dealt with, and not while the interpreter shuts down.
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except click.Abort:
            code = _report("Interrupted. Give the same command again to continue.", Interrupted.exit_code)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except Exception as error:  # the last stop: whatever it is, no traceback for the user
            if os.environ.get("BSTACK_DEBUG"):
                traceback.print_exc()
            code = _report_exception(error)
        sys.exit(code if isinstance(code, int) else 0)


def _report_exception(error: Exception) -> int:
    message, code = user_message(error) or (
        f"unexpected {type(error).__name__}: {error}. This is a bug in bstack; set BSTACK_DEBUG=1 for the traceback.",
        1,
    )
    return _report(f"Error: {message}", code)


def _report(message: str, code: int) -> int:
    click.echo(printable(message), err=True)
    return code
