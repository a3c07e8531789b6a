"""Orders of blocks: what holds for all gains and sizes, and the paper's search on layers that are counted."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bstack.ordering.orders import PrefixCache, by_gain_per_byte, by_level, cut_scores

stacks = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.tuples(st.integers(-5, 50), st.integers(1, 9)), max_size=4), max_size=4
)


def split(blocks):
    return (
        {name: [gain for gain, _ in levels] for name, levels in blocks.items()},
        {name: [size for _, size in levels] for name, levels in blocks.items()},
    )


@given(stacks)
def test_every_block_once_and_after_those_below_it(blocks):
    for order in (by_gain_per_byte(*split(blocks)), by_level(split(blocks)[0])):
        assert sorted((name, level) for name, level, _ in order) == sorted(
            (name, level) for name, levels in blocks.items() for level in range(len(levels))
        )
        for name in blocks:
            levels = [level for of, level, _ in order if of == name]
            assert levels == sorted(levels)


@given(stacks)
def test_the_best_run_of_blocks_comes_first(blocks):
    """At each step the chosen block begins a run whose mean gain per byte no other run that may begin there exceeds."""
    depths = dict.fromkeys(blocks, 0)
    for name, level, score in by_gain_per_byte(*split(blocks)):
        runs = {
            other: max(
                sum(gain for gain, _ in levels[depths[other] : end])
                / sum(size for _, size in levels[depths[other] : end])
                for end in range(depths[other] + 1, len(levels) + 1)
            )
            for other, levels in blocks.items()
            if depths[other] < len(levels)
        }
        assert score == pytest.approx(runs[name]) and score >= max(runs.values()) - 1e-9
        assert level == depths[name]
        depths[name] += 1


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=4), min_size=1, max_size=3))
def test_gains_that_fall_give_the_best_prefix_of_each_length(gains):
    """With falling gains of equal size no other choice of so many blocks has a larger sum."""
    gains = {str(i): sorted(levels, reverse=True) for i, levels in enumerate(gains)}
    order = by_gain_per_byte(gains, {name: [2] * len(levels) for name, levels in gains.items()})
    every = [gain for levels in gains.values() for gain in levels]
    for count in range(len(every) + 1):
        best = sum(sorted(every, reverse=True)[:count])
        assert sum(gains[name][level] for name, level, _ in order[:count]) == best


def test_ties_go_to_the_linear_that_comes_first():
    gains, sizes = {"b": [1, 1], "a": [1, 1]}, {"b": [1, 1], "a": [1, 1]}
    assert [name for name, _, _ in by_gain_per_byte(gains, sizes)] == ["b", "b", "a", "a"]


@given(stacks)
def test_the_papers_order_goes_level_by_level(blocks):
    order = by_level(split(blocks)[0])
    keys = [(level, -score) for _, level, score in order]
    assert keys == sorted(keys)


class Counted(torch.nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def test_layers_in_front_are_not_run_again():
    layers = [Counted(4, 4) for _ in range(3)]
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))

    def measure():
        value = x
        for layer in layers:
            value = layer(value)
        return float(value.sum())

    with torch.no_grad():
        cache = PrefixCache(layers, measure)
        for first in range(3):
            Counted.calls = 0
            with cache.from_layer(first) as again:
                layers[first].weight.mul_(0.5)
                found = again()
            assert Counted.calls == 3 - first
            assert found == measure()
            layers[first].weight.mul_(2)


@pytest.mark.parametrize("fails", [False, True])
def test_a_cut_linear_is_whole_again(fails):
    weight = torch.arange(6.0).view(2, 3)
    whole, seen = weight.clone(), itertools.count()

    def measure():
        if fails and next(seen):
            raise RuntimeError("of the model")
        return float(weight.sum())

    prefixes = (whole * count for count in range(1, 3))
    if fails:
        with pytest.raises(RuntimeError):
            cut_scores(weight, prefixes, measure)
    else:
        assert cut_scores(weight, prefixes, measure) == [15, 30]
    assert torch.equal(weight, whole)
