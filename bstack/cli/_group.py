"""The top-level command: finds subcommands without importing them, and ends every failure with a message and an exit code."""

from __future__ import annotations

import importlib
import os
import select
import sys
import traceback
from typing import Any

import click

from bstack.errors import one_line, printable, user_message
from bstk.errors import BstkError, Interrupted

# Parameter that an error names as its `option` -> what a user of the command line can do: "Use ...".
OPTIONS = {
    "overwrite": "Use --force to replace it.",
    "work_dir": "Use --work-dir for another folder.",
    "trust_remote_code": "Use --trust-remote-code to allow it.",
    "code": "Use --code to name it.",
    "text": "Use --text for another text.",
    "calibration": "Use --calibration for another text.",
    "windows": "Use --windows for fewer.",
    "sequence_length": "Use --sequence-length for another length.",
    "tokenizer": "Use --no-tokenizer to leave it out.",
    "engine": "Use --engine transformers.",
    "exact": "Leave --exact out.",
    "device": "Use --device cpu to compress on the CPU.",
    "kind": "Use --type bf16 or f32.",
    "api_key": "Use --api-key, or the variable BSTACK_API_KEY.",
    "port": "Use --port for another one.",
    "quality": "Use --no-quality to measure speed alone.",
}


class LazyGroup(click.Group):
    """A group whose subcommands are modules of `package`, each with its click command as ``command``, imported when called.

    `summaries` maps the names to the lines of the group's help, in order.
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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # click takes each for a closed standard output and ends in silence
            if _stdout_is_closed():
                raise
            raise BstkError(f"a pipe or connection was closed at its other end: {one_line(error)}.") from error

    def main(self, *args: Any, **settings: Any) -> None:  # type: ignore[override]
        """Run, and leave the process with an exit code of ``docs/guide.md``."""
        try:
            settings["standalone_mode"] = False
            code = super().main(*args, **settings)
            sys.stdout.flush()  # here, where a closed pipe is still handled, not while the interpreter shuts down
        except click.Abort:
            code = _report("Interrupted. Give the same command again to continue.", Interrupted.exit_code)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except Exception as error:  # users never see a traceback
            if os.environ.get("BSTACK_DEBUG"):
                traceback.print_exc()
            code = _report_exception(error)
        sys.exit(code if isinstance(code, int) else 0)


def _stdout_is_closed() -> bool:
    """Return whether the reader of standard output is gone (``| head``), not that of another pipe or socket."""
    try:
        sys.stdout.flush()
        readers = select.poll()
        readers.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLNVAL) for _, event in readers.poll(0))
    except (OSError, ValueError, AttributeError):  # Windows has no poll
        return True


def _report_exception(error: Exception) -> int:
    if isinstance(error, BstkError) and (advice := OPTIONS.get(error.option or "")):
        error.hint = f"{error.hint} {advice}" if error.hint else advice
    message, code = user_message(error) or (
        f"unexpected {type(error).__name__}: {error}. This is a bug in bstack; set BSTACK_DEBUG=1 for the traceback.",
        1,
    )
    return _report(f"Error: {message}", code)


def _report(message: str, code: int) -> int:
    click.echo(printable(message), err=True)
    return code
