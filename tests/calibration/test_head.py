"""Logits from hidden states, some positions at a time."""

import pytest
import tiny_models
import torch
from passes import IDS

from bstack.calibration.head import Head


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "phi3", "gpt2", "gpt-neox", "falcon", "olmo2", "mixtral", "gpt-oss"]
)
def test_logits_are_those_of_the_whole_model(name):
    model = tiny_models.make(name)
    head = Head(model)
    with torch.no_grad():
        hidden = head.hidden(IDS)
        expected = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
        assert hidden.shape[1] != expected.shape[1], "the body is not found"
        for part in (slice(0, 1), slice(3, 8), slice(0, len(hidden))):
            assert torch.allclose(head.logits(hidden[part]), expected[part], rtol=1e-5, atol=1e-6)


def test_a_model_without_a_body_of_its_own_gives_logits_at_once():
    model = tiny_models.make("opt")  # calls a part of its body, not the body
    head = Head(model)
    with torch.no_grad():
        hidden = head.hidden(IDS)
        assert torch.equal(head.logits(hidden), model(input_ids=IDS, use_cache=False).logits.flatten(0, 1))


def test_parts_are_all_positions_in_order(monkeypatch):
    head = Head(tiny_models.make("llama"))
    vocabulary = head._model.config.vocab_size
    for most, steps in ((vocabulary * 3, 3), (vocabulary - 1, 1), (vocabulary * 100, 7)):
        monkeypatch.setattr("bstack.calibration.head.LOGITS_TOGETHER", most)
        parts = [list(range(7))[part] for part in head.parts(7)]
        assert [i for part in parts for i in part] == list(range(7)) and max(map(len, parts)) == steps
