"""Take an answer apart as it comes: what the model thinks, what it says, and the tools that it calls."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["Answer", "overlap"]

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
# Those of Mistral, to the end of the answer or the next such mark; since version 11 with name and arguments apart.
CALLS, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
# Marks that a tokenizer may have as special tokens, of thoughts and of calls.
THOUGHT_MARKS, CALL_MARKS = (THINK, THOUGHT), (CALL, CALLED, CALLS, CALL_ID, ARGUMENTS)
# How an answer begins that is a call as a whole, without spaces.
_BEGINNINGS = [f"{begin}{{{field}" for begin in ("", "[") for field in ('"name":"', '"type":"function"')]
_LETTERS = string.ascii_letters + string.digits


def overlap(text: str, stop: str) -> int:
    """Return how many letters at the end of a text begin a longer string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """An answer in pieces -> the fields of OpenAI's messages.

    Calls are known in the forms of Hermes and Qwen (``<tool_call>{...}</tool_call>``), of Mistral (``[TOOL_CALLS][{...}]`` or
    ``[TOOL_CALLS]name[ARGS]{...}``), and of Llama 3: the whole answer is a JSON object, an array of such, or some with
    semicolons between them. What is no call of one of the tools stays text.

    Parameters
    ----------
    tools : collection of str
        Names of the tools that may be called.
    thinking : bool
        The prompt has begun the model's thoughts.
    """

    def __init__(self, tools: Collection[str] = (), thinking: bool = False):
        self._tools = tools
        self._mode = THINK if thinking else ""  # within thoughts, a call, or neither
        self._held, self._begun, self._calls = "", thinking, 0
        self._trim = False  # spaces that begin what is held
        self._said = False  # some text that is neither a thought nor a call

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._calls > 0

    def add(self, text: str, last: bool = False) -> list[dict[str, Any]]:
        """Take a piece; return what is certain: fields with the next part of their text, or a call."""
        self._held += text
        found: list[dict[str, Any]] = []
        while self._next(found, last):
            pass
        return found

    def _next(self, found: list[dict[str, Any]], last: bool) -> bool:
        """Move what is certain of the text that is held to `found`; return whether there may be more."""
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held
        if not self._begun:
            start = self._held.lstrip()
            if start.startswith(THINK):
                self._held, self._mode, self._begun, self._trim = start[len(THINK) :], THINK, True, True
                return True
            if not last and (not start or THINK.startswith(start)):
                return False
            self._begun = True
        if self._mode == THINK:
            return self._until({THOUGHT: ""}, "reasoning_content", found, last)
        if self._mode:
            text, closed, rest = self._held.partition(CALLED if self._mode == CALL else CALLS)
            if not closed and not last:
                return False
            if not self._call(text, found):
                found.append({"content": self._mode + text + (closed if self._mode == CALL else "")})
            self._held, self._mode = rest, CALLS if closed == CALLS else ""
            return bool(rest)
        if not self._tools:
            return self._until({}, "content", found, last)
        if not (self._said or self._calls) and _may_be_call(self._held):
            if not last:
                return False
            if self._call(self._held, found):
                self._held = ""
        return self._until({CALL: CALL, CALLS: CALLS}, "content", found, last)

    def _until(self, marks: Mapping[str, str], field: str, found: list[dict[str, Any]], last: bool) -> bool:
        """Pass text on as `field` up to the first of some marks, after which its mode begins."""
        at, mark = min(((self._held.find(mark), mark) for mark in marks if mark in self._held), default=(-1, ""))
        if mark:
            text, self._held, self._mode = self._held[:at], self._held[at + len(mark) :], marks[mark]
            self._trim = mark == THOUGHT
        else:
            held = 0 if last else max((overlap(self._held, mark) for mark in marks), default=0)
            text, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        if text and not (text.isspace() and self._calls):
            found.append({field: text})
            self._said = self._said or (field == "content" and not text.isspace())
        return bool(mark)

    def _call(self, text: str, found: list[dict[str, Any]]) -> bool:
        """Pass calls on; return whether the text is nothing else."""
        try:
            calls = [self._function(entry) for entry in _entries(text)]
        except (ValueError, RecursionError):
            return False
        for function in calls:
            # Templates of Mistral take such names alone.
            name = "".join(secrets.choice(_LETTERS) for _ in range(9))
            call = {"index": self._calls, "id": name, "type": "function", "function": function}
            found.append({"tool_calls": [call]})
            self._calls += 1
        return bool(calls)

    def _function(self, entry: Any) -> dict[str, str]:
        """Return a call as OpenAI writes it; ValueError for what is none."""
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in self._tools:
            raise ValueError
        arguments = entry.get("arguments", entry.get("parameters"))
        if isinstance(arguments, str):
            arguments = _JSON.decode(arguments)
        if not isinstance(arguments, dict | None):
            raise ValueError
        written = json.dumps(arguments or {}, ensure_ascii=False)
        if not written.isascii() and any("\ud800" <= letter <= "\udfff" for letter in written):
            written = json.dumps(arguments)  # halves of a letter are no UTF-8
        return {"name": name, "arguments": written}


def _may_be_call(text: str) -> bool:
    """Return whether a text begins as a call does."""
    text = "".join(text[:200].split())
    return any(text.startswith(begin) or begin.startswith(text) for begin in _BEGINNINGS)


def _entries(text: str) -> list[Any]:
    """Return what may be calls; ValueError for other text."""
    name, arguments, rest = text.partition(ARGUMENTS)
    if arguments:
        return [{"name": name.partition(CALL_ID)[0].strip(), "arguments": _JSON.decode(rest.strip())}]
    text, at = text.strip(), 0
    found: list[Any] = []
    while not found or text[at : at + 1] == ";":
        at += bool(found)
        at += len(text[at:]) - len(text[at:].lstrip())
        entry, at = _JSON.raw_decode(text, at)
        found += entry if isinstance(entry, list) else [entry]
        at += len(text[at:]) - len(text[at:].lstrip())
    if at < len(text):
        raise ValueError
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)


_JSON = json.JSONDecoder(parse_constant=_no_constant)
