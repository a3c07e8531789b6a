"""Read the requests of OpenAI's API: JSON -> texts to write, or an error in that API's form."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from bstack.engine.native.generate import encode_prompt
from bstack.engine.native.sampling import Generation, Sampling
from bstack.engine.text import Message
from bstack.errors import one_line
from bstack.serve.answers import CALL_MARKS, THINK, THOUGHT, THOUGHT_MARKS
from bstack.serve.grammar import Grammar
from bstack.serve.scheduler import Ask, Scheduler
from bstk.errors import BstkError

__all__ = ["ApiError", "Request", "parse", "read_chat", "read_completion"]

# New tokens of a text that names no number, and texts of a request.
USUAL, TEXTS = 2048, 8
_WHY = " (whoever runs it can give it more memory for keys and values)"
_REFUSED_CHAT = {"functions": "functions; it has tools", "audio": "audio"}


class ApiError(Exception):
    """What a client reads: a status, a message, and OpenAI's words for the kind of error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Request:
    """The texts of a request, and how they are handed out."""

    asks: list[Ask]
    stream: bool
    usage: bool  # in a stream
    tools: tuple[str, ...] = ()  # their names
    thinking: bool = False  # the prompt has begun the model's thoughts


def parse(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a body."""
    try:
        found = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not JSON in UTF-8.") from None
    if not isinstance(found, dict):
        raise ApiError(400, "The body is no JSON object.")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def read_chat(body: Mapping[str, Any], name: str, scheduler: Scheduler) -> Request:
    """Read a body of /v1/chat/completions for the model `name`."""
    _check_model(body, name)
    for field, what in _REFUSED_CHAT.items():
        if body.get(field):
            raise ApiError(400, f"This server has no {what}.", param=field, code="unsupported_parameter")
    messages = _messages(body)
    top: int | None = _integer(body, "top_logprobs", 0, 20, 0)
    if not _flag(body, "logprobs"):
        if top:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        top = None
    field = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    tokenizer = scheduler.tokenizer
    tools = _tools(body)
    # Its name is in every template that takes tools.
    if tools and "tools" not in (tokenizer.chat_template or ""):
        raise ApiError(400, "This model's template takes no tools.", param="tools", code="unsupported_parameter")
    forced, schema = _forced(body, tools or []), _schema(body)
    if forced and schema:
        raise ApiError(400, "An answer is a call or has a response_format, not both.", param="tool_choice")
    options = body.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise _wrong("chat_template_kwargs", "an object")
    with _prompt_errors("messages"):
        ids = encode_prompt(tokenizer, messages, chat=True, tools=tools, options=options)
    thinking = tokenizer.decode(ids[-8:], special=True).rstrip().endswith(THINK)
    grammar = None
    if wanted := forced or schema:
        grammar = _grammar(wanted, "tool_choice" if forced else "response_format", scheduler)
        end = tokenizer.encode(THOUGHT, special=False) if thinking else []
        grammar = grammar.copy(after=end[0] if len(end) == 1 else None)  # what is held comes after the thoughts
        thinking = len(end) == 1
    names = () if schema else tuple(tool["function"]["name"] for tool in tools or ())
    marks = (*THOUGHT_MARKS, *(CALL_MARKS if names else ()))
    kept = frozenset(tokenizer.marks[mark] for mark in marks if mark in tokenizer.marks)
    found = _request(body, [ids], top, field, USUAL, "messages", scheduler, grammar, kept)
    return replace(found, tools=names, thinking=thinking)


def read_completion(body: Mapping[str, Any], name: str, scheduler: Scheduler) -> Request:
    """Read a body of /v1/completions for the model `name`."""
    _check_model(body, name)
    for field in ("suffix", "echo"):
        if body.get(field):
            raise ApiError(400, f"This server does not know {field}.", param=field, code="unsupported_parameter")
    count = _integer(body, "n", 1, TEXTS, 1)
    if _integer(body, "best_of", 1, TEXTS, count) != count:
        raise ApiError(400, "This server does not know best_of.", param="best_of", code="unsupported_parameter")
    top = None if body.get("logprobs") in (None, False) else _integer(body, "logprobs", 0, 20, 0)
    given = _prompts(body)
    _check_count(len(given) * count, scheduler)
    schema = _schema(body)
    grammar = _grammar(schema, "response_format", scheduler) if schema else None
    prompts = [_prompt_ids(prompt, scheduler) for prompt in given]
    return _request(body, prompts, top, "max_tokens", 16, "prompt", scheduler, grammar)


def _request(
    body: Mapping[str, Any],
    prompts: list[list[int]],
    top: int | None,
    limit: str,
    usual: int,
    param: str,
    scheduler: Scheduler,
    grammar: Grammar | None = None,
    marks: frozenset[int] = frozenset(),
) -> Request:
    count = _integer(body, "n", 1, TEXTS, 1)
    _check_count(len(prompts) * count, scheduler)
    vocabulary = scheduler.model.architecture.vocabulary
    wanted = _integer(body, limit, 1, 2**31, usual)
    sampling = _sampling(body, scheduler.model.generation, vocabulary)
    seed = _integer(body, "seed", -(2**63), 2**64, None)
    seed = secrets.randbits(63) if seed is None else seed % 2**64
    stop = _stop(body)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "an object")
    asks = []
    for ids in prompts:
        room = scheduler.longest - len(ids)
        if room < 1:
            raise ApiError(
                400,
                f"The text has {len(ids)} tokens, and this server reads at most {scheduler.longest - 1}"
                f"{_WHY if scheduler.longest < scheduler.model.architecture.context else ''}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        if max(ids) >= vocabulary or min(ids) < 0:
            raise ApiError(400, f"Tokens are from 0 to {vocabulary - 1}.", param=param)
        for number in range(count):
            own = grammar.copy() if grammar else None
            asks.append(Ask(ids, min(wanted, room), sampling, seed + number, stop, top, own, marks))
    return Request(asks, _flag(body, "stream"), bool((options or {}).get("include_usage")))


def _check_count(texts: int, scheduler: Scheduler) -> None:
    if texts > (most := min(TEXTS, scheduler.parallel + scheduler.queue)):
        raise ApiError(400, f"A request may ask for {most} texts at most.", param="n")


def _check_model(body: Mapping[str, Any], name: str) -> None:
    asked = body.get("model")
    if asked is not None and asked != name:
        raise ApiError(
            404, f"The model {str(asked)[:100]!r} does not exist; this server has {name!r}.", param="model",
            code="model_not_found",
        )  # fmt: skip


def _schema(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the answer has to be; None for any text."""
    given = body.get("response_format")
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        schema = given.get("json_schema")
        schema = schema.get("schema") if isinstance(schema, dict) else None
    if kind not in ("json_object", "json_schema") or not isinstance(schema, dict):
        raise _wrong("response_format", "of type text, json_object, or json_schema with a schema")
    return schema


def _grammar(schema: Mapping[str, Any], param: str, scheduler: Scheduler) -> Grammar:
    try:
        return scheduler.grammars.of_schema(schema)
    except ImportError:
        raise ApiError(501, "The server lacks the package llguidance.", kind="server_error", param=param) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"The schema cannot be held: {one_line(error)}.", param=param, code="invalid_value"
        ) from None


def _messages(body: Mapping[str, Any]) -> list[Message]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise _wrong("messages", "a list with at least one message")
    found = []
    for number, message in enumerate(given):
        where = f"messages.{number}"
        if not isinstance(message, dict):
            raise _wrong(where, "an object")
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise _wrong(f"{where}.role", "system, developer, user, assistant or tool")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise _wrong(f"{where}.content", "a text, or parts of type text")
            content = "".join(part["text"] for part in content)
        calls = _calls(message, where) if role == "assistant" and message.get("tool_calls") else {}
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise _wrong(f"{where}.content", "a text")
        kept = {
            key: message[key]
            for key in ("name", "tool_call_id", "reasoning_content")
            if isinstance(message.get(key), str)
        } | calls
        found.append({"role": "system" if role == "developer" else role, "content": content, **kept})
    return found


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools as templates take them; None for none."""
    given = body.get("tools")
    if not given or body.get("tool_choice") == "none":
        return None
    for tool in given if isinstance(given, list) else [{}]:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong("tools", "a list of functions with names")
    return given


def _forced(body: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the schema of a call that tool_choice demands; None where it demands none."""
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none"):
        return None
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = named.get("name") if isinstance(named, dict) else None
        functions = [function for function in functions if function["name"] == name]
    if not functions:
        raise _wrong("tool_choice", "auto, none, required, or one of the tools")
    calls: list[Any] = []
    shared: dict[str, dict[str, Any]] = {}
    for function in functions:
        given = function.get("parameters") or {}
        if not isinstance(given, dict):
            raise _wrong("tools", "a list of functions with schemas")
        arguments = {"type": "object", **given}
        for field in ("$defs", "definitions"):  # references to them begin at the root
            own = arguments.pop(field, {})
            known = shared.setdefault(field, {})
            if not isinstance(own, dict) or any(known.get(name, own[name]) != own[name] for name in own):
                raise ApiError(400, f"These tools differ in their {field}. Demand one of them.", param="tool_choice")
            known.update(own)
        if re.search(r'"\$ref": "(?!#/(\$defs|definitions)/)', json.dumps(arguments)):
            raise ApiError(400, "A tool's schema refers to a part that is not in its $defs.", param="tools")
        fields = {"name": {"const": function["name"]}, "arguments": arguments}
        calls.append({"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False})
    return {"anyOf": calls, **{field: known for field, known in shared.items() if known}}


def _calls(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the calls of an earlier answer as templates take them: with arguments as objects."""
    found = []
    for call in message["tool_calls"] if isinstance(message["tool_calls"], list) else [{}]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"{where}.tool_calls", "a list of calls of functions")
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        named = {"name": function["name"], "arguments": arguments}
        found.append({"id": str(call.get("id", "")), "type": "function", "function": named})
    return {"tool_calls": found}


def _prompts(body: Mapping[str, Any]) -> Sequence[Any]:
    given = body.get("prompt")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(part, str) for part in given):
            return given
        if all(_is_integer(part) for part in given):
            return [given]
        if all(isinstance(part, list) and part and all(map(_is_integer, part)) for part in given):
            return given
    raise _wrong("prompt", "a text, a list of tokens, or a list of such")


def _prompt_ids(prompt: Any, scheduler: Scheduler) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    with _prompt_errors("prompt"):
        return encode_prompt(scheduler.tokenizer, prompt, chat=False)


@contextmanager
def _prompt_errors(param: str) -> Iterator[None]:
    """Turn the errors of a prompt into the client's."""
    try:
        yield
    except BstkError as error:
        words = str(error)
        raise ApiError(400, words[:1].upper() + words[1:], param=param) from None


def _sampling(body: Mapping[str, Any], generation: Generation, vocabulary: int) -> Sampling:
    """Return how tokens are chosen: what is not given is the model's own; a temperature or top_p draws, temperature 0 does not.

    Drawing is from all tokens where neither the request nor the model's files say how many.
    """
    own = generation.sampling
    temperature = _number(body, "temperature", 0, 2, None)
    given: dict[str, Any] = {
        "top_p": _number(body, "top_p", 0, 1, None),
        "min_p": _number(body, "min_p", 0, 1, None),
        "top_k": _integer(body, "top_k", -1, 2**31, None),
    }
    found = {name: value for name, value in given.items() if value is not None}
    if found.get("top_k") == -1:  # as other servers write it
        found["top_k"] = 0
    if found.get("top_p") == 0:
        found["top_p"] = 1e-9
    # Clients send values that change nothing without meaning anything.
    asks = any(value != {"top_p": 1}.get(name, 0) for name, value in found.items())
    draw = temperature != 0 if temperature is not None or asks else own.do_sample
    if "top_k" not in generation.said and (temperature or asks):
        found.setdefault("top_k", 0)
    penalties: dict[str, Any] = {
        name: _number(body, name, -2, 2, 0.0) or 0.0 for name in ("presence_penalty", "frequency_penalty")
    }
    penalties["repetition_penalty"] = _number(body, "repetition_penalty", 0.01, 10, own.repetition_penalty) or 1.0
    if temperature:
        found["temperature"] = max(temperature, 1e-4)
    return replace(own, do_sample=draw, bias=_bias(body, vocabulary), **found, **penalties)


def _bias(body: Mapping[str, Any], vocabulary: int) -> dict[int, float]:
    given = body.get("logit_bias") or {}
    if not isinstance(given, dict) or len(given) > 1024:
        raise _wrong("logit_bias", "an object of at most 1024 tokens")
    found = {}
    for token in given:
        if not token.isascii() or not token.isdigit() or len(token) > 9 or int(token) >= vocabulary:
            raise _wrong("logit_bias", f"an object of tokens from 0 to {vocabulary - 1}")
        found[int(token)] = _number(given, token, -100, 100, 0.0, "logit_bias") or 0.0
    return found


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    given = body.get("stop")
    given = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(given, list) or len(given) > 16 or not all(isinstance(stop, str) and stop for stop in given):
        raise _wrong("stop", "a text, or at most 16 of them")
    return tuple(given)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    given = body.get(name)
    if given is not None and not isinstance(given, bool):
        raise _wrong(name, "true or false")
    return bool(given)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(body: Mapping[str, Any], name: str, low: int, high: int, usual: int | None) -> Any:
    given = body.get(name)
    if given is None:
        return usual
    if not _is_integer(given) or not low <= given <= high:
        raise _wrong(name, f"a whole number from {low} to {high}")
    return given


def _number(
    body: Mapping[str, Any], name: str, low: float, high: float, usual: float | None, param: str | None = None
) -> float | None:
    given = body.get(name)
    if given is None:
        return usual
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not low <= given <= high:
        raise _wrong(param or name, f"a number from {low:g} to {high:g}")
    return float(given) if math.isfinite(given) else usual


def _wrong(name: str, expected: str) -> ApiError:
    return ApiError(400, f"{name} has to be {expected}.", param=name, code="invalid_value")
