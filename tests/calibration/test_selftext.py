"""Texts that the model writes itself."""

import pytest
import tiny_models
import torch

import bstack.calibration.selftext as selftext
from bstack.calibration.selftext import draw, token_steps, write_windows
from bstack.memory.free import Memory
from bstk.errors import ResourceError


def test_a_model_writes_its_own_text(skeletons):
    skeleton = skeletons("llama")
    state = torch.get_rng_state()
    windows = write_windows(skeleton, 3, 20, seed=4)
    assert windows.shape == (3, 20) and windows.dtype == torch.int64
    assert (windows[:, 0] == 1).all(), "the start token"
    assert windows.min() >= 0 and windows.max() < tiny_models.VOCABULARY
    assert torch.equal(write_windows(skeleton, 3, 20, seed=4), windows)
    assert not torch.equal(write_windows(skeleton, 3, 20, seed=5), windows)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are the caller's"


def test_long_windows_are_made_of_several_texts(skeletons):
    windows = write_windows(skeletons("llama"), 2, 300, seed=0)
    assert windows.shape == (2, 300)
    assert (windows[:, [0, 100, 200]] == 1).all(), "three texts of 100 tokens, each with its start token"
    steps = []
    write_windows(skeletons("llama"), 140, 3, seed=0, progress=lambda: steps.append(1))
    assert len(steps) == token_steps(140, 3) == 4


def test_an_ended_text_is_followed_by_another(skeletons):
    windows = write_windows(skeletons("llama"), 64, 100, seed=0)
    ends = (windows[:, :-1] == 2).nonzero()
    assert len(ends) > 10, "a model of 211 words ends often"
    assert (windows == 0).sum() < 200, "no padding after an end"
    assert all(windows[row, at + 1] == 1 for row, at in ends), "the start token after each end"


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 2.0, -1.0, -torch.inf, 1.0]).expand(20000, 5)
    counts = torch.bincount(draw(logits, generator).squeeze(1), minlength=5)
    expected = 20000 * logits[0].softmax(0)
    assert counts[3] == 0
    # Each count within five standard deviations.
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()
    assert draw(torch.tensor([[-torch.inf, -torch.inf, 0.0]] * 100), generator).eq(2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_much_memory_is_asked_for_as_the_type_takes(skeletons, monkeypatch, dtype):
    skeleton = skeletons("llama")
    needed = dtype.itemsize * sum(p.numel() for p in skeleton.model.parameters())
    monkeypatch.setattr(selftext, "_dtype", lambda skeleton: dtype)
    monkeypatch.setattr("bstack.memory.free.free_memory", lambda: Memory(int(needed / 0.8) + 1, needed, "a machine"))
    assert write_windows(skeleton, 1, 8, seed=0).shape == (1, 8)
    monkeypatch.setattr("bstack.memory.free.free_memory", lambda: Memory(int(needed / 0.8) - 2, needed, "a machine"))
    with pytest.raises(ResourceError, match=f"as {str(dtype).removeprefix('torch.')}, .* free of a machine"):
        write_windows(skeleton, 1, 8, seed=0)
