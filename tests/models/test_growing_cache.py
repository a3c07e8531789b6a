"""The cache that grows in place gives what transformers' own cache gives, whatever is done with it."""

import pytest
import tiny_models
import torch
from cache_name import CACHE
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bstack.models.kv_cache import GrowingLayer, growing_cache


def states(tokens, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 3, tokens, 4, generator=generator).unbind()


def same(cache, reference):
    return all(
        torch.equal(ours, theirs)
        for (ours_k, ours_v, _), (k, v, _) in zip(cache, reference, strict=True)
        for ours, theirs in ((ours_k, k), (ours_v, v))
    )


def test_every_operation_between_updates():
    ours, theirs = DynamicCache(), DynamicCache()
    ours.layer_class_to_replicate = GrowingLayer
    operations = [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([3, 0]))),
        lambda cache: None,
        lambda cache: cache.crop(-70),
        lambda cache: cache.reset(),
    ]
    for seed, tokens in enumerate((5, 1, 60, 1, 1, 200)):
        for layer in (0, 1):
            keys, values = states(tokens, 10 * seed + layer)
            returned = ours.update(keys, values, layer)
            expected = theirs.update(keys, values, layer)
            assert all(map(torch.equal, returned, expected))
        assert ours.get_seq_length() == theirs.get_seq_length()
        operations[seed](ours)
        operations[seed](theirs)
        if seed < 5:
            assert same(ours, theirs)
    assert ours.get_seq_length() == theirs.get_seq_length() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_appending_does_not_move_what_is_there(mode):
    with mode():
        layer = GrowingLayer()
        layer.update(*states(10, 0))
        address = layer.keys.data_ptr()
        for seed in range(5):
            layer.update(*states(1, seed))
        assert layer.keys.data_ptr() == address


def test_a_cache_made_under_inference_mode_goes_on_outside():
    with torch.inference_mode():
        ours, theirs = GrowingLayer(), DynamicLayer()
        for layer in (ours, theirs):
            layer.update(*states(10, 0))
    for layer in (ours, theirs):
        layer.update(*states(2, 1))
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("name", list(tiny_models.ARCHITECTURES))
def test_generated_text_is_the_same(name):
    model = tiny_models.make(name).eval()
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]])
    for options in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
        with torch.no_grad():
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), **{CACHE: growing_cache(model)}, **settings
            )
        assert torch.equal(found, expected)
