"""Hold texts to a JSON schema: which tokens may come next, through llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from bstack.engine.native.generate import TextTokenizer
from bstack.errors import one_line

__all__ = ["Grammar", "Grammars"]

# How JSON is written: as models do, and without spaces that never end.
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """Where a text stands in its grammar, which begins after the token `after` (None: at once)."""

    def __init__(self, matcher: Any, vocabulary: int, after: int | None = None):
        self._matcher, self._after = matcher, after
        self._bits = np.zeros((1, -(-vocabulary // 32)), np.int32)

    def copy(self, after: int | None = None) -> Grammar:
        """Return another at the same place, for another text."""
        return Grammar(self._matcher.deep_copy(), self._bits.size * 32, self._after if after is None else after)

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """Return logits that are minus infinity for tokens that may not come."""
        from llguidance.numpy import fill_next_token_bitmask

        if self._after is not None:
            return logits
        fill_next_token_bitmask(self._matcher, self._bits)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        if self._matcher.is_error() or not allowed.any():
            raise ValueError(f"no token fits the schema: {_problem(self._matcher)}")
        return np.where(allowed, logits, np.float32(-np.inf))

    def take(self, token: int) -> bool:
        """Go on by a token; return whether the text is whole."""
        if self._after is not None:
            self._after = None if token == self._after else self._after
            return False
        if not self._matcher.consume_token(token):
            raise ValueError(f"the schema cannot be held: {_problem(self._matcher)}")
        return bool(self._matcher.is_stopped())


def _problem(matcher: Any) -> str:
    """Return what is wrong with a matcher."""
    return one_line(ValueError(matcher.get_error()))


class Grammars:
    """Makes grammars for the tokens of a model; building the first takes a second."""

    def __init__(self, tokenizer: TextTokenizer, vocabulary: int, ends: frozenset[int]):
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends
        self._lock = threading.Lock()
        self._tokens: Any = None

    def of_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """Return the grammar of a JSON schema; ValueError, with the reason, for one that cannot be held."""
        import llguidance

        with self._lock:
            if self._tokens is None:
                ends = sorted(self._ends) or None
                self._tokens = llguidance.LLTokenizer(self._tokenizer.json(), n_vocab=self._vocabulary, eos_token=ends)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_STYLE)
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(_problem(matcher))
        return Grammar(matcher, self._vocabulary)
