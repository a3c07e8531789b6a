"""``bstack run``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import click

from bstack.cli import _common, _model
from bstack.cli._text import megabytes
from bstk.errors import Interrupted

_WRITTEN = ("text", "prompt_tokens", "new_tokens", "prompt_seconds", "tokens_per_second")


@click.command("run")
@_common.place_argument
@click.option(
    "-p",
    "--prompt",
    help="The text to continue; - reads it from standard input. Without it, on a terminal, this is bstack chat.",
)
@_model.budget_option
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template, as a user's message.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Maximum of new tokens.  [default: 128; in a chat what the model reads]",
)
@_model.sampling_options
@_model.engine_option
@_model.device_option
@_common.trust_option
@_common.code_option
@_common.strict_option
@_common.json_option
@_common.quiet_option
def command(
    file: str,
    prompt: str | None,
    budget: int | str | None,
    chat: bool,
    max_new_tokens: int | None,
    engine: str,
    device: str,
    trust_remote_code: bool,
    code: str | None,
    strict: bool,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Write text with the model in FILE, with at most N megabytes of memory for its weights.

    The weights stay packed in memory: a budget of 80 MB takes 80 MB, and a little more for activations. The text goes to
    standard output as it is written, everything else to standard error. Ctrl-C ends the text (exit code 75).

    Of a URL only what fits is fetched, and kept in ~/.cache/bstack/models. The text begins when the smallest model has arrived,
    and the model grows while the rest does.

    \b
    Example:
      bstack run model.bstk --mb 80 --chat -p "What is a prime number?"
      bstack run hf://owner/repository -p "What is a prime number?"
    """
    log = _model.logger(quiet)
    options = {**_model.sampling(sampling), "max_new_tokens": max_new_tokens}
    allowed = {"trust_remote_code": trust_remote_code, "code": code}
    if prompt is None:
        if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise click.UsageError("there is no prompt. Give one with -p, or -p - to read it from standard input.")
        from bstack.cli.chat import converse

        with _common.model_warnings(quiet):
            converse(
                _model.load_model(file, budget, quiet, log, engine, strict, allowed, device), budget, None, options
            )
        return
    if prompt == "-":
        prompt = sys.stdin.read()
    with _common.model_warnings(quiet):
        loaded = _model.load_model(file, budget, quiet, log, engine, strict, allowed, device)
    model, store = loaded.model, loaded.store
    ids = loaded.encode(prompt, chat)
    if not loaded.native and model.bstack_unfused is not None:
        log(f"Tokens are decoded by {type(model).__name__}'s own code, without the fused step: {model.bstack_unfused}.")
    try:
        with _common.model_warnings(quiet), loaded.following() if budget == _model.AUTO else nullcontext():
            # Inside JSON the text is printed at the end.
            show = (lambda _text: None) if as_json else _model.write
            written = loaded.write(ids, show, **{**options, "max_new_tokens": max_new_tokens or 128})
    finally:
        coming = loaded.coming
        store.close()
    state = store.state
    if as_json:
        _common.print_json(
            "bstack.run/1",
            {
                "file": file,
                "engine": "native" if loaded.native else "transformers",
                **{key: getattr(written, key) for key in _WRITTEN},
                "weight_bytes": state.weight_bytes,
                "bits_per_weight": state.bits_per_weight,
                "interrupted": written.interrupted,
            },
        )
    else:
        click.echo()
    log(f"{_model.speed(written)}; {_model.size(store)}")
    if coming:
        log(f"{megabytes(coming)} of weights had not arrived. The next run fetches on.")
    if written.interrupted:
        raise Interrupted("Interrupted: the text ends here.")
