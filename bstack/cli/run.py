"""``bstack run``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click

import bstk
from bstack.cli import _common, _progress
from bstack.cli._forecast import forecast
from bstack.cli._text import megabytes
from bstk.errors import Interrupted

AUTO = "auto"
_WRITTEN = ("text", "prompt_tokens", "new_tokens", "prompt_seconds", "tokens_per_second")


def _budget_or_auto(value: str) -> int | str:
    if value.strip().lower() == AUTO:
        return AUTO
    try:
        return bstk.budget_bytes(value)
    except bstk.UsageError as error:
        raise ValueError(f"{error} Or auto, to follow what the machine has free.") from error


class Finite(click.FloatRange):
    """A range of numbers without NaN and infinity, which click lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


@click.command("run")
@_common.place_argument
@click.option("-p", "--prompt", required=True, help="The text to continue; - reads it from standard input.")
@click.option(
    "--mb",
    "budget",
    type=_common.Parsed("MB|auto", _budget_or_auto),
    help="Megabytes of memory for weights; auto follows what the machine has free. Default: what is free at the start.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template, as a user's message.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Maximum of new tokens.")
@click.option(
    "--do-sample",
    is_flag=True,
    help="Sample tokens instead of taking the likeliest; the next four options turn this on, too.",
)
@click.option(
    "--temperature", type=Finite(0, min_open=True), help="Above 1: flatten the distribution; below 1: sharpen it."
)
@click.option("--top-k", type=click.IntRange(1), help="Sample only from the k likeliest tokens.")
@click.option(
    "--top-p",
    type=Finite(0, 1, min_open=True),
    help="Sample only from the likeliest tokens with this total probability.",
)
@click.option(
    "--min-p",
    type=Finite(0, 1),
    help="Sample only from tokens with at least this fraction of the likeliest token's probability.",
)
@click.option("--repetition-penalty", type=Finite(0, min_open=True), help="Above 1: avoid tokens that occurred.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Random seed for sampling."
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "native", "transformers"]),
    default="auto",
    show_default=True,
    help="What runs the model: native loads no torch and knows usual architectures; auto takes it where it can.",
)
@_common.trust_option
@_common.code_option
@_common.strict_option
@_common.json_option
@_common.quiet_option
def command(
    file: str,
    prompt: str,
    budget: int | str | None,
    chat: bool,
    max_new_tokens: int,
    do_sample: bool,
    seed: int,
    engine: str,
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

    Of a URL only what fits is fetched, and kept in ~/.cache/bstack/models.

    \b
    Example:
      bstack run model.bstk --mb 80 --chat -p "What is a prime number?"
      bstack run hf://owner/repository -p "What is a prime number?"
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    options = {name: value for name, value in sampling.items() if value is not None}
    drawing = do_sample or bool(options.keys() - {"repetition_penalty"})

    def log(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    allowed = {"trust_remote_code": trust_remote_code, "code": code}
    with _common.model_warnings(quiet):
        model, tokenizer, native = _load(file, budget, quiet, log, engine, strict, allowed)
    from bstack.packed.autosize import following
    from bstack.packed.store import store_of

    if native:
        from bstack.engine.native.generate import encode_prompt, write_text
    else:
        from bstack.engine.generate import encode_prompt, write_text  # type: ignore[assignment]
    if tokenizer is None:
        raise bstk.UsageError(
            f"{file} has no tokenizer, so it cannot read text. bstack.load in Python loads the model alone."
        )
    ids = encode_prompt(tokenizer, prompt, chat)
    if not native and model.bstack_unfused is not None:
        log(f"Tokens are decoded by {type(model).__name__}'s own code, without the fused step: {model.bstack_unfused}.")
    try:
        with _common.model_warnings(quiet), following(model, warn=log) if budget == AUTO else nullcontext():
            written = write_text(
                model,
                tokenizer,
                ids,
                (lambda _text: None) if as_json else _print,  # inside JSON the text is printed at the end
                seed=seed,
                max_new_tokens=max_new_tokens,
                do_sample=drawing,
                **options,
            )
    finally:
        store_of(model).close()
    state = store_of(model).state
    if as_json:
        _common.print_json(
            "bstack.run/1",
            {
                "file": file,
                "engine": "native" if native else "transformers",
                **{key: getattr(written, key) for key in _WRITTEN},
                "weight_bytes": state.weight_bytes,
                "bits_per_weight": state.bits_per_weight,
                "interrupted": written.interrupted,
            },
        )
    else:
        click.echo()
    speed = written.tokens_per_second
    log(
        f"{written.prompt_tokens} + {written.new_tokens} tokens, first after {written.prompt_seconds:.2f} s"
        + (f", then {speed:.1f} tokens/s" if speed else "")
        + f"; {megabytes(state.weight_bytes)} of weights, {state.bits_per_weight or 0:.2f} bits per weight"
    )
    if written.interrupted:
        raise Interrupted("Interrupted: the text ends here.")


def _load(
    file: str,
    budget: int | str | None,
    quiet: bool,
    log: Callable[[str], None],
    engine: str,
    strict: bool,
    allowed: dict[str, Any],
) -> tuple[Any, Any, bool]:
    """Load the model within the budget, or without one within what is free; return whether the native engine runs it."""
    from bstack.packed.autosize import free_budget

    with _common.open_file(file, strict, quiet) as reader:  # warns of or refuses a partial file before anything heavy
        base = reader.base.budget
        first = budget if isinstance(budget, int) else free_budget()[0]
        if bstk.is_url(file) and not quiet and (first is None or first > 0):
            log(forecast(reader, first))
    settings: dict[str, Any] = {
        "strict": strict,
        "warn": False,
        "notify": _common.retries(file, quiet),
        "progress": lambda what, total: _progress.copied(total, what, quiet),
    }

    def load_native(budget: int | None) -> tuple[Any, Any]:
        from bstack.engine.native.load import load

        return load(file, budget=budget, **settings)

    def load_transformers(budget: int | None) -> tuple[Any, Any]:
        from bstack.engine.load import load

        return load(file, budget=budget, mode="packed", **allowed, **settings)

    def run(load: Callable[[int | None], tuple[Any, Any]]) -> tuple[Any, Any]:
        return _load_within(load, file, budget, base, log)

    if engine == "transformers" or (engine == "auto" and any(allowed.values())):
        return *run(load_transformers), False
    from bstack.engine.native.architecture import NotNativeError

    try:
        loaded = run(load_native)
    except NotNativeError as error:
        if engine == "native":
            raise
        log(click.style(f"The transformers engine runs it: {error.reason}.", dim=True))
        return *run(load_transformers), False
    log(click.style("The native engine runs it.", dim=True))
    return *loaded, True


def _load_within(
    load: Callable[[int | None], tuple[Any, Any]],
    file: str,
    budget: int | str | None,
    base: int,
    log: Callable[[str], None],
) -> tuple[Any, Any]:
    """Load a model with `load`, which takes bytes, within the budget; without one, within what is free."""
    from bstack.packed.autosize import free_budget
    from bstack.packed.store import store_of

    if isinstance(budget, int):
        return load(budget)
    free, words = free_budget()
    if free is None:
        if budget == AUTO:
            raise bstk.UsageError(f"--mb auto does not work here: {words}. Give a budget, such as --mb 500.")
        log(f"Using the whole file: {words}.")
        return load(None)
    if free <= 0:
        raise bstk.ResourceError(f"No memory for a model: {words}. End other programs, or give a budget with --mb.")
    if bstk.is_url(file):
        model, tokenizer = load(free)
    else:
        # The base model first, so that what is free no longer counts libraries, tokenizer and modules.
        model, tokenizer = load(base)
        free, words = free_budget()
        store_of(model).resize(max(free or 0, 0) + base)
    log(f"Using {megabytes(store_of(model).state.weight_bytes)} for weights: {words}.")
    return model, tokenizer


def _print(text: str) -> None:
    """Write text without control characters; joiners and marks that `printable` escapes stay."""
    import unicodedata

    clean = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)
    sys.stdout.write("".join(clean))
    sys.stdout.flush()
