"""Compressing on a GPU, on a pretended card: nothing crosses from it to the CPU unasked, and the file is the CPU's."""

import cuda_on_cpu
import pretend_card
import pytest
import tiny_models
import torch

import bstack
import bstk

SETTINGS = {"planes": 2, "samples": 2, "sequence_length": 16}
needs_compiler = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="there is no g++")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("card") / "model", num_hidden_layers=1)


@needs_compiler
def test_a_whole_compression(model, tmp_path, monkeypatch):
    on_cpu = bstack.compress(model, tmp_path / "cpu.bstk", settings=bstack.Settings(**SETTINGS))
    plans = []
    with pretend_card.card_there(monkeypatch):
        settings = bstack.Settings(**SETTINGS, device="cuda")
        for name in ("one.bstk", "two.bstk"):
            on_card = bstack.compress(model, tmp_path / name, settings=settings, on_plan=plans.append)
    assert on_card.file_bytes == pytest.approx(on_cpu.file_bytes, rel=0.02)
