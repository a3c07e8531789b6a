"""Grammars of answers: where they begin, and what does not fit them."""

import numpy as np
import pytest

from bstack.engine.native.load import load
from bstack.serve.grammar import Grammars

pytest.importorskip("llguidance", reason="holds texts to schemas")


@pytest.fixture(scope="module")
def made(served_model):
    model, tokenizer = load(served_model)
    grammars = Grammars(tokenizer, model.architecture.vocabulary, model.generation.ends)
    return grammars, tokenizer, np.zeros(model.architecture.vocabulary, np.float32)


def test_a_grammar_begins_after_a_token(made):
    grammars, tokenizer, logits = made
    (brace,) = tokenizer.encode("{", special=False)
    grammar = grammars.of_schema({"type": "object"}).copy(after=9).copy()
    for token in (5, brace, 7, 9):
        assert np.isfinite(grammar.allow(logits)).all() and not grammar.take(token)
    allowed = np.isfinite(grammar.allow(logits))
    assert allowed[brace] and not allowed.all()


def test_a_token_that_does_not_fit_is_an_error(made):
    """Not the end of a whole text."""
    grammars, tokenizer, logits = made
    grammar = grammars.of_schema({"type": "object"})
    (letter,) = tokenizer.encode("x", special=False)
    with pytest.raises(ValueError, match="cannot be held"):
        grammar.take(letter)
    with pytest.raises(ValueError, match="no token fits"):
        grammar.allow(logits)
