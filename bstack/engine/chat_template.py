"""Render a model's chat template in Jinja's sandbox, with bounds on its time and on the sizes of what it makes.

The sandbox keeps a template from running code. Bounded are the time, the output, products and powers, the numbers given to
functions and filters, widths in format strings, and what is kept in a namespace. Strings that grow by ``+``, ``~``,
``replace`` or ``join`` are not: they end with the time, or with the memory.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import MappingProxyType
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from bstack.engine.text import Prompt, messages_of
from bstack.errors import UnsupportedModelError, one_line

__all__ = ["render", "render_messages"]

# Those of known models take some milliseconds and have fewer than 20,000 characters.
MAX_SECONDS = 10.0
MAX_TEMPLATE = 2**20
# Characters of the output beside the messages, of products and of values in a namespace; also the largest argument.
MAX_LENGTH = 2**22
# Bits of a number: more than any template needs.
MAX_BITS = 2**14


def render(tokenizer: Any, prompt: Prompt) -> str:
    """Render a prompt, a user's message or some messages, as ``tokenizer.apply_chat_template`` does."""
    from transformers import PreTrainedTokenizerBase

    messages = messages_of(prompt)
    try:
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            # A tokenizer without templates, or with code that the user trusts.
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        template, special_tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    except Exception as error:  # files of strangers cause errors of any class
        raise _failure(one_line(error)) from None
    return render_messages(template, messages, special_tokens)


def render_messages(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    *,
    prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Render messages with a template's text; needs no transformers. `options` are the template's own, such as `enable_thinking`."""
    if len(template) > MAX_TEMPLATE:
        raise _failure(f"it has {len(template)} characters, and at most {MAX_TEMPLATE} are allowed.")
    allowed = MAX_LENGTH + sum(len(str(message)) for message in (*messages, *(tools or ())))
    values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
    pieces: list[str] = []
    length = 0
    try:
        with _deadline(MAX_SECONDS):
            for piece in _compiled(template).generate({**options, **special_tokens, **values}):
                length += len(piece)
                if length > allowed:
                    raise SecurityError(f"it makes more than {allowed} characters.")
                pieces.append(piece)
    except MemoryError:
        raise _failure("it takes too much memory.") from None
    except Exception as error:  # templates can raise any class
        raise _failure(one_line(error).rstrip(".") + ".") from None
    return "".join(pieces)


def _failure(problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model's chat template fails: {problem} Write the prompt as the model expects it, without the template."
    )


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this thread at the first line of Python after so many seconds of its own processor time."""
    end = time.thread_time() + seconds
    events = itertools.count()

    def check(frame: Any, *_event: Any) -> Any:
        # Asking for the time is a system call, which takes longer than most lines.
        if next(events) % 64 == 0 and time.thread_time() > end:
            raise TimeoutError(f"it takes more than {seconds:g} seconds.")
        # Functions of Jinja itself are checked when they are called, not at each line.
        return check if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which refuses operations with huge results."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _is_huge(operator, left, right):
            raise SecurityError(f"the result of {operator} would be too large.")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check(function, *args, **kwargs)
        return super().call(context, function, *args, **kwargs)


def _check(function: Any, /, *args: Any, **kwargs: Any) -> None:
    """Raise SecurityError if a call has a large number as an argument or as the width of a field."""
    if large := [value for value in (*args, *kwargs.values()) if isinstance(value, int) and value > MAX_LENGTH]:
        raise SecurityError(f"the argument {large[0]} is too large.")
    # The string of a method, or the first argument of a filter; a field in a field takes its width from the arguments.
    text = args[0] if function is do_format else getattr(inspect.unwrap(function), "__self__", None)
    if isinstance(text, str) and "format" in function.__name__ and re.search(r"\d{7}|:[^{}]*\{|%\S*\*", text):
        raise SecurityError("a field of a format string would be too large.")


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # also the marks by which Jinja hands over its environment
    def call(*args: Any, **kwargs: Any) -> Any:
        _check(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _is_huge(operator: str, left: Any, right: Any) -> bool:
    if operator == "%":
        # Widths of fields: digits, or an asterisk that takes one from the arguments.
        return isinstance(left, str) and re.search(r"\d{7}|\*", left) is not None
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * (max(right, 0) if operator == "**" else 1) > MAX_BITS
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            return len(sequence) * count > MAX_LENGTH
    return False


class _Generation(Extension):
    """``{% generation %}``, by which training finds the model's own words: renders what it encloses."""

    tags = frozenset(("generation",))  # type: ignore[assignment]

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """``namespace``, without names that begin with an underscore and without huge values."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without names of its own, so that any can be given
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the name {name!r}.")
        if isinstance(value, (str, list, tuple, dict)) and len(value) > MAX_LENGTH:
            raise SecurityError(f"a {type(value).__name__} of length {len(value)} is too large.")
        super().__setitem__(name, value)


@functools.lru_cache(maxsize=2)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _environment() -> _Sandbox:
    """Return what transformers offers to templates."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    # Jinja's own filter escapes HTML.
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _bounded(function) for name, function in environment.filters.items()}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "namespace": _Namespace,
    }
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
