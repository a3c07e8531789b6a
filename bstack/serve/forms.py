"""The forms in which OpenAI's API hands out texts, as a whole and in a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from bstack.serve.answers import Answer
from bstack.serve.requests import Request
from bstack.serve.scheduler import Chosen, Piece

__all__ = ["Chat", "Completion"]


class Chat:
    """The form of /v1/chat/completions."""

    id, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, token: Callable[[int], bytes], asked: Request):
        self._token = token
        self._answers = [Answer(asked.tools, asked.thinking) for _ in asked.asks]

    def first(self, index: int) -> dict[str, Any] | None:
        """Return what begins the stream of a text."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Return what a piece adds to the stream."""
        answer = self._answers[index]
        deltas: list[dict[str, Any]] = answer.add(piece.text, last=piece.end is not None)
        if not deltas and (piece.end or piece.chosen):
            deltas = [{}]
        found: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if found:
            found[0]["logprobs"] = self._chances(piece.chosen)
            found[-1]["finish_reason"] = self._end(answer, piece.end)
        return found

    def whole(self, index: int, text: str, chosen: Sequence[Chosen], end: str | None) -> dict[str, Any]:
        """Return a text that was not streamed."""
        answer = self._answers[index]
        parts = answer.add(text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": _joined(parts, "content"), "refusal": None}
        if thoughts := _joined(parts, "reasoning_content"):
            message["reasoning_content"] = thoughts
        if answer.called:
            message["content"] = message["content"] or None
            calls = [call for part in parts for call in part.get("tool_calls", ())]
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
        end = self._end(answer, end)
        return {"index": index, "message": message, "logprobs": self._chances(chosen), "finish_reason": end}

    def _end(self, answer: Answer, end: str | None) -> str | None:
        return "tool_calls" if end == "stop" and answer.called else end

    def _chances(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not chosen:
            return None

        def entry(token: int, chance: float) -> dict[str, Any]:
            raw = self._token(token)
            return {"token": raw.decode(errors="replace"), "logprob": chance, "bytes": list(raw)}

        return {
            "content": [
                {**entry(one.token, one.chance), "top_logprobs": [entry(*other) for other in one.likeliest]}
                for one in chosen
            ],
            "refusal": None,
        }


class Completion:
    """The form of /v1/completions."""

    id, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, token: Callable[[int], bytes], _asked: Request):
        self._token = token
        self._lengths: Counter[int] = Counter()

    def first(self, _index: int) -> dict[str, Any] | None:
        """Return nothing; see `Chat`, as for the others."""
        return None

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        return [self.whole(index, piece.text, piece.chosen, piece.end)]

    def whole(self, index: int, text: str, chosen: Sequence[Chosen], end: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._chances(index, chosen), "finish_reason": end}

    def _chances(self, index: int, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not chosen:
            return None
        tokens = [self._token(one.token).decode(errors="replace") for one in chosen]
        offsets = []
        for text in tokens:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [one.chance for one in chosen],
            "top_logprobs": [{self._name(token): chance for token, chance in one.likeliest} for one in chosen],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """Return what only this token has, also where it is a part of a letter."""
        raw = self._token(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _joined(parts: Sequence[dict[str, Any]], field: str) -> str:
    return "".join(part.get(field, "") for part in parts)
