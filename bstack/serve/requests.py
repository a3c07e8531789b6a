"""Read the requests of OpenAI's API: JSON -> texts to write, or an error in that API's form."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from bstack.engine.native.generate import encode_prompt
from bstack.engine.native.sampling import Sampling
from bstack.engine.text import Message
from bstack.errors import one_line
from bstack.serve.answers import THINK
from bstack.serve.grammar import Grammar
from bstack.serve.scheduler import Ask, Scheduler
from bstk.errors import BstkError

__all__ = ["ApiError", "Request", "parse", "read_chat", "read_completion"]

# New tokens of a text that names no number, and texts of a request.
USUAL, TEXTS = 2048, 8
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
    top = _integer(body, "top_logprobs", 0, 20, 0) if _flag(body, "logprobs") else None
    field = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    tools = _tools(body)
    with _prompt_errors("messages"):
        ids = encode_prompt(scheduler.tokenizer, messages, chat=True, tools=tools)
    found = _request(body, [ids], top, field, USUAL, "messages", scheduler)
    thinking = scheduler.tokenizer.decode(ids[-8:], special=True).rstrip().endswith(THINK)
    return replace(found, tools=tuple(tool["function"]["name"] for tool in tools or ()), thinking=thinking)


def read_completion(body: Mapping[str, Any], name: str, scheduler: Scheduler) -> Request:
    """Read a body of /v1/completions for the model `name`."""
    _check_model(body, name)
    for field in ("suffix", "echo"):
        if body.get(field):
            raise ApiError(400, f"This server does not know {field}.", param=field, code="unsupported_parameter")
    top = None if body.get("logprobs") in (None, False) else _integer(body, "logprobs", 0, 20, 0)
    prompts = [_prompt_ids(prompt, scheduler) for prompt in _prompts(body)]
    return _request(body, prompts, top, "max_tokens", 16, "prompt", scheduler)


def _request(
    body: Mapping[str, Any],
    prompts: list[list[int]],
    top: int | None,
    limit: str,
    usual: int,
    param: str,
    scheduler: Scheduler,
) -> Request:
    count = _integer(body, "n", 1, TEXTS, 1)
    if len(prompts) * count > TEXTS:
        raise ApiError(400, f"A request may ask for {TEXTS} texts at most.", param="n")
    vocabulary = scheduler.model.architecture.vocabulary
    wanted = _integer(body, limit, 1, 2**31, usual)
    sampling = _sampling(body, scheduler.model.generation.sampling, vocabulary)
    seed = _integer(body, "seed", -(2**63), 2**64, None)
    grammar = _grammar(body, scheduler)
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
                f"The text has {len(ids)} tokens, and this server reads at most {scheduler.longest - 1}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        if max(ids) >= vocabulary or min(ids) < 0:
            raise ApiError(400, f"Tokens are from 0 to {vocabulary - 1}.", param=param)
        for number in range(count):
            own = grammar.copy() if grammar else None
            asks.append(Ask(ids, min(wanted, room), sampling, seed + number, stop, top, own))
    return Request(asks, _flag(body, "stream"), bool((options or {}).get("include_usage")))


def _check_model(body: Mapping[str, Any], name: str) -> None:
    asked = body.get("model")
    if asked is not None and asked != name:
        raise ApiError(
            404, f"The model {str(asked)[:100]!r} does not exist; this server has {name!r}.", param="model",
            code="model_not_found",
        )  # fmt: skip


def _grammar(body: Mapping[str, Any], scheduler: Scheduler) -> Grammar | None:
    """Return what the answer has to be, besides text."""
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
    try:
        return scheduler.grammars.of_schema(schema)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"The schema cannot be held: {one_line(error)}.", param="response_format", code="invalid_value"
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
        kept = {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)} | calls
        found.append({"role": "system" if role == "developer" else role, "content": content, **kept})
    return found


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools as templates take them; None for none."""
    given, choice = body.get("tools"), body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise ApiError(
            400, "This server cannot make a model call a tool.", param="tool_choice", code="unsupported_parameter"
        )
    if not given or choice == "none":
        return None
    for tool in given if isinstance(given, list) else [{}]:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong("tools", "a list of functions with names")
    return given


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


def _sampling(body: Mapping[str, Any], own: Sampling, vocabulary: int) -> Sampling:
    """Return how tokens are chosen: what is not given is the model's own; a temperature or top_p draws, temperature 0 does not."""
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
    draw = own.do_sample if temperature is None and not found else temperature != 0
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
