"""Take an answer apart as it comes: what the model thinks, what it says, and the tools that it calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from typing import Any

__all__ = ["Answer", "overlap"]

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"


def overlap(text: str, stop: str) -> int:
    """Return how many letters at the end of a text begin a longer string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """An answer in pieces -> the fields of OpenAI's messages.

    Calls are known in the forms of Hermes and Qwen (``<tool_call>{...}</tool_call>``), and of Llama 3 and Mistral: the whole
    answer is a JSON object, or an array of such. What is no call of one of the tools stays text.

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
            return self._until(THOUGHT, "reasoning_content", "", found, last)
        if self._mode == CALL:
            text, closed, rest = self._held.partition(CALLED)
            if not closed and not last:
                return False
            if not self._call(text, found):
                found.append({"content": CALL + text + closed})
            self._held, self._mode = rest, ""
            return bool(rest)
        if not self._tools:
            return self._until(None, "content", "", found, last)
        if self._held.lstrip()[:1] in ("{", "[") and not self._calls:
            if last and not self._call(self._held, found):
                found.append({"content": self._held})
            return False
        return self._until(CALL, "content", CALL, found, last)

    def _until(self, mark: str | None, field: str, mode: str, found: list[dict[str, Any]], last: bool) -> bool:
        """Pass text on as `field` up to a mark, after which `mode` begins."""
        at = self._held.find(mark) if mark else -1
        if mark and at >= 0:
            text, self._held, self._mode = self._held[:at], self._held[at + len(mark) :], mode
            self._trim = mark == THOUGHT
        else:
            held = overlap(self._held, mark) if mark and not last else 0
            text, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        if text and not (text.isspace() and self._calls):
            found.append({field: text})
        return at >= 0

    def _call(self, text: str, found: list[dict[str, Any]]) -> bool:
        """Pass calls on; return whether the text is nothing else."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return False
        calls = []
        for entry in given if isinstance(given, list) else [given]:
            if not isinstance(entry, dict) or entry.get("name") not in self._tools:
                return False
            arguments = entry.get("arguments", entry.get("parameters", {}))
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append({"name": entry["name"], "arguments": arguments})
        for function in calls:
            call = {"index": self._calls, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
            found.append({"tool_calls": [{**call, "function": function}]})
            self._calls += 1
        return bool(calls)
