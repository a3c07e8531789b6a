"""``bstack chat``."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, suppress
from typing import Any

import click

import bstk
from bstack.cli import _common, _model
from bstack.errors import DeviceError, printable

# Tokens of an answer that nothing but the model's context bounds.
MANY = 2**20
_HELP = """\
  /mb N        change the size of the model to N megabytes; auto follows what the machine has free
  /mb          show its size
  /system TEXT give the model instructions, and begin anew; /system alone shows them
  /reset       forget the conversation
  /exit        end, as Ctrl-D
  /help        show this
Ctrl-C stops an answer, Ctrl-D ends."""


@click.command("chat")
@_common.place_argument
@_model.budget_option
@click.option("--system", metavar="TEXT", help="Instructions for the model, before the conversation.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Maximum of new tokens of an answer. Default: what the model reads.",
)
@_model.sampling_options
@_model.engine_option
@_model.device_option
@_common.trust_option
@_common.code_option
@_common.strict_option
@_common.quiet_option
def command(
    file: str,
    budget: int | str | None,
    system: str | None,
    max_new_tokens: int | None,
    engine: str,
    device: str,
    trust_remote_code: bool,
    code: str | None,
    strict: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Talk with the model in FILE, with at most N megabytes of memory for its weights.

    Each line is a message. /help lists what else can be given, such as /mb 60 for another size. Ctrl-C stops an answer, Ctrl-D
    ends the conversation, which is kept nowhere. What the model has read it does not read again.

    \b
    Example:
      bstack chat model.bstk --mb 80 --temperature 0.7
    """
    log = _model.logger(quiet)
    options = {**_model.sampling(sampling), "max_new_tokens": max_new_tokens}
    allowed = {"trust_remote_code": trust_remote_code, "code": code}
    with _common.model_warnings(quiet):
        converse(_model.load_model(file, budget, quiet, log, engine, strict, allowed, device), budget, system, options)


def converse(loaded: _model.Loaded, budget: int | str | None, system: str | None, options: dict[str, Any]) -> None:
    """Read messages from standard input and answer them, until its end."""
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise bstk.UsageError(f"{loaded.file} has no chat template. bstack run -p continues a text without one.")
    chat = _Chat(loaded, system, {name: value for name, value in options.items() if value is not None})
    asking = sys.stdin.isatty()
    if asking:
        with suppress(ImportError):
            import readline  # noqa: F401 - lets `input` edit its line and go back to earlier ones
        loaded.log(click.style(f"{_model.size(loaded.store)}. /help shows the commands, Ctrl-D ends.", dim=True))
    try:
        if budget == _model.AUTO:
            chat.follow()
        while (line := _read(asking)) is not None:
            if line.strip() in ("/exit", "/quit"):
                break
            try:
                chat.take(line)
            except DeviceError:
                raise
            except bstk.BstkError as error:
                click.echo(f"{printable(error)}", err=True)
            except KeyboardInterrupt:  # while the size changes
                click.echo(err=True)
    finally:
        chat.fix()
        loaded.store.close()


def _read(asking: bool) -> str | None:
    """Return the next line; None at the end. Ctrl-C drops what was typed."""
    while True:
        try:
            return input("> " if asking else "")
        except EOFError:
            if asking:
                click.echo()
            return None
        except KeyboardInterrupt:
            if not asking:
                raise
            click.echo()
        except UnicodeDecodeError:
            raise bstk.UsageError("the message is not UTF-8 text.", hint="Convert it first.") from None


class _Chat:
    """A conversation: its messages, what the model has read of them, and the size of the model."""

    def __init__(self, loaded: _model.Loaded, system: str | None, options: dict[str, Any]):
        self._loaded, self._options = loaded, options
        self._text = loaded.model.sequence() if loaded.native else None
        self._seed: int = options.pop("seed")
        self._following: AbstractContextManager[Any] | None = None
        self._begin(system)

    def take(self, line: str) -> None:
        """Answer a message, or carry out a command."""
        name, _, rest = line.strip().partition(" ")
        known = {"/mb": self._resize, "/reset": self._reset, "/system": self._instruct, "/help": self._help}
        if name in known:
            known[name](rest.strip())
        elif name.startswith("/") and name[1:].isalpha():
            self._loaded.log(f"{printable(name)} is no command. /help lists them.")
        elif line.strip():
            self._answer(line)

    def follow(self) -> None:
        """Give the model the size that the machine has free, from now on."""
        self.fix()
        following = self._loaded.following()
        following.__enter__()
        self._following = following

    def fix(self) -> None:
        """Let the model keep its size."""
        if self._following is not None:
            self._following.__exit__(None, None, None)
            self._following = None

    def _begin(self, system: str | None) -> None:
        self._system = system
        self._messages = [{"role": "system", "content": system}] if system else []

    def _instruct(self, system: str) -> None:
        if system:
            self._begin(system)
            self._loaded.log("The conversation begins anew.")
        else:
            click.echo(printable(self._system or "There are no instructions."), err=True)

    def _reset(self, _rest: str) -> None:
        self._begin(self._system)
        self._loaded.log("The conversation is forgotten.")

    def _help(self, _rest: str) -> None:
        click.echo(_HELP, err=True)

    def _resize(self, size: str) -> None:
        if size.lower() == _model.AUTO:
            self.follow()
        elif size:
            budget = bstk.budget_bytes(size)
            self.fix()
            self._loaded.store.resize(budget)
        click.echo(f"{_model.size(self._loaded.store)}{', following the machine' if self._following else ''}", err=True)

    def _answer(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        kept = {} if self._text is None else {"text": self._text}
        written = None
        try:
            ids = self._loaded.encode(messages, chat=True)
            options = {**kept, "max_new_tokens": MANY, **self._options, "seed": self._seed + len(messages)}
            written = self._loaded.write(ids, _model.write, **options)
        except KeyboardInterrupt:  # before the model began
            pass
        except DeviceError:
            raise
        except bstk.BstkError as error:
            error.hint = "The message is left out; /reset begins anew."
            raise
        if written is None or (written.interrupted and not written.new_tokens):
            click.echo("\nThe message is left out.", err=True)
            return
        self._messages = [*messages, {"role": "assistant", "content": written.text}]
        click.echo()
        stopped = "stopped; " if written.interrupted else ""
        self._loaded.log(click.style(f"{stopped}{_model.speed(written)}", dim=True))
