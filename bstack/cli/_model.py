"""What commands that write text share: options for the size and for sampling, loading a model, printing its text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import click

import bstk
from bstack.cli import _common, _progress
from bstack.cli._forecast import forecast
from bstack.cli._text import megabytes
from bstack.errors import require

AUTO = "auto"


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


budget_option = click.option(
    "--mb",
    "budget",
    type=_common.Parsed("MB|auto", _budget_or_auto),
    help="Megabytes of memory for weights; auto follows what the machine has free. Default: what is free at the start.",
)

device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda|cuda:N",
    help="Where the model runs; cuda is a GPU, whose memory --mb then bounds.",
)

engine_option = click.option(
    "--engine",
    type=click.Choice(["auto", "native", "transformers"]),
    default="auto",
    show_default=True,
    help="What runs the model: native loads no torch and knows usual architectures; auto takes it where it can.",
)

_SAMPLING = [
    click.option(
        "--do-sample",
        is_flag=True,
        help="Sample tokens instead of taking the likeliest; the next four options turn this on, too.",
    ),
    click.option(
        "--temperature",
        type=Finite(0),
        help="Above 1: flatten the distribution; below 1: sharpen it; 0: take the likeliest.",
    ),
    click.option("--top-k", type=click.IntRange(1), help="Sample only from the k likeliest tokens."),
    click.option(
        "--top-p",
        type=Finite(0, 1, min_open=True),
        help="Sample only from the likeliest tokens with this total probability.",
    ),
    click.option(
        "--min-p",
        type=Finite(0, 1),
        help="Sample only from tokens with at least this fraction of the likeliest token's probability.",
    ),
    click.option("--repetition-penalty", type=Finite(0, min_open=True), help="Above 1: avoid tokens that occurred."),
    click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Random seed for sampling."
    ),
]


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how tokens are chosen; `sampling` reads them."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `write_text` for what was given."""
    seed = given.pop("seed")
    drawing = given.pop("do_sample")
    options = {name: value for name, value in given.items() if value is not None}
    if options.get("temperature") == 0:  # what is for drawing has no use then
        return {"seed": seed, "do_sample": False, **{k: v for k, v in options.items() if k == "repetition_penalty"}}
    return {"seed": seed, "do_sample": drawing or bool(options.keys() - {"repetition_penalty"}), **options}


@dataclass(frozen=True)
class Loaded:
    """A model in memory, its tokenizer, and the engine that runs it."""

    file: str
    model: Any
    tokenizer: Any
    native: bool
    log: Callable[[str], None]

    @property
    def store(self) -> Any:
        """The blocks in memory."""
        return self.model.bstack_store

    @property
    def coming(self) -> int:
        """Bytes of weights that are still to be loaded."""
        state = self.store.state
        return state.target_bytes - state.weight_bytes

    def encode(self, prompt: Any, chat: bool) -> Any:
        """Return the tokens of a prompt, as `encode_prompt` of the engine does."""
        return self._engine().encode_prompt(self.tokenizer, prompt, chat)

    def write(self, ids: Any, write: Callable[[str], None], **options: Any) -> Any:
        """Write a text, as `write_text` of the engine does."""
        return self._engine().write_text(self.model, self.tokenizer, ids, write, **options)

    def following(self) -> AbstractContextManager[Any]:
        """Give the model the size that the machine has free, for the length of a `with` block."""
        from bstack.packed.autosize import following

        return following(self.model, warn=self.log)

    def _engine(self) -> Any:
        from importlib import import_module

        return import_module("bstack.engine.native.generate" if self.native else "bstack.engine.generate")


def speed(written: Any) -> str:
    """Return the tokens and times of a text in words."""
    found = f"{written.prompt_tokens} + {written.new_tokens} tokens, first after {written.prompt_seconds:.2f} s"
    return found + (f", then {written.tokens_per_second:.1f} tokens/s" if written.tokens_per_second else "")


def size(store: Any) -> str:
    """Return the size of the model in memory in words."""
    state = store.state
    return f"{megabytes(state.weight_bytes)} of weights, {state.bits_per_weight or 0:.2f} bits per weight"


def logger(quiet: bool) -> Callable[[str], None]:
    """Return a function that writes a line to standard error, or nothing."""

    def log(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    return log


def load_model(
    file: str,
    budget: int | str | None,
    quiet: bool,
    log: Callable[[str], None],
    engine: str,
    strict: bool,
    allowed: dict[str, Any],
    device: str = "cpu",
) -> Loaded:
    """Load a model that writes text, within the budget, or without one within what is free, for one of the engines."""
    from bstack.packed.autosize import free_budget

    read, where = None, ""
    if device != "cpu":
        require("Running on a GPU", "cuda", ("torch",))
        from bstack.packed.backends import device_memory, device_of

        found = device_of(device, packed=True)  # before anything is read or fetched
        read, where = lambda: device_memory(found), f" on {found}"

    needs_transformers = engine == "transformers" or (engine == "auto" and any(allowed.values()))
    if needs_transformers:
        require("The transformers engine")
    with _common.open_file(file, strict, quiet) as reader:  # warns of or refuses a partial file before anything heavy
        base = reader.base.budget
        if bstk.is_url(file) and not quiet:
            first = budget if isinstance(budget, int) else free_budget(read)[0]
            if first is None or first > 0:
                log(forecast(reader, first, speed=device == "cpu"))
    settings: dict[str, Any] = {
        "strict": strict,
        "device": device,
        "warn": False,
        "notify": _common.retries(file, quiet),
        "progress": lambda what, total: _progress.copied(total, what, quiet),
    }

    def load_native(budget: int | None) -> tuple[Any, Any]:
        from bstack.engine.native.load import load

        return load(file, budget=budget, wait=False, **settings)

    def load_transformers(budget: int | None) -> tuple[Any, Any]:
        from bstack.engine.load import load

        return load(file, budget=budget, mode="packed", **allowed, **settings)

    def run(load: Callable[[int | None], tuple[Any, Any]], native: bool) -> Loaded:
        model, tokenizer = _load_within(load, file, budget, base, log, read)
        if tokenizer is None:
            raise bstk.UsageError(
                f"{file} has no tokenizer, so it cannot read text. bstack.load in Python loads the model alone."
            )
        return Loaded(file, model, tokenizer, native, log)

    if needs_transformers:
        return run(load_transformers, native=False)
    from bstack.engine.native.architecture import NotNativeError

    try:
        loaded = run(load_native, native=True)
    except NotNativeError as error:
        if engine == "native":
            raise
        require(f"{file}: the native engine does not run it ({error.reason}), and the transformers engine")
        log(click.style(f"The transformers engine runs it{where}: {error.reason}.", dim=True))
        return run(load_transformers, native=False)
    log(click.style(f"The native engine runs it{where}.", dim=True))
    if coming := loaded.coming:
        log(
            f"It begins with {megabytes(loaded.store.state.weight_bytes)} of weights, while {megabytes(coming)} more arrive."
        )
    return loaded


def _load_within(
    load: Callable[[int | None], tuple[Any, Any]],
    file: str,
    budget: int | str | None,
    base: int,
    log: Callable[[str], None],
    read: Callable[[], Any] | None,
) -> tuple[Any, Any]:
    """Load a model with `load`, which takes bytes, within the budget; without one, within what is free, which `read` tells."""
    from bstack.packed.autosize import free_budget
    from bstack.packed.store import store_of

    if isinstance(budget, int):
        return load(budget)
    free, words = free_budget(read)
    if free is None:
        if budget == AUTO:
            raise bstk.UsageError(f"--mb auto does not work here: {words}.", hint="Give a budget, such as --mb 500.")
        log(f"Using the whole file: {words}.")
        return load(None)
    if free <= 0:
        raise bstk.ResourceError(
            f"No memory for a model: {words}.", hint="End other programs, or give a budget with --mb."
        )
    if bstk.is_url(file):
        model, tokenizer = load(free)
    else:
        # The base model first, so that what is free no longer counts libraries, tokenizer and modules.
        model, tokenizer = load(base)
        free, words = free_budget(read)
        store_of(model).resize(max(free or 0, 0) + base)
    log(f"Using {megabytes(store_of(model).state.target_bytes)} for weights: {words}.")
    return model, tokenizer


def write(text: str) -> None:
    """Write text without control characters; joiners and marks that `printable` escapes stay."""
    import unicodedata

    clean = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)
    sys.stdout.write("".join(clean))
    sys.stdout.flush()
