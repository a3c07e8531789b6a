"""The mathematics of SpQR against float64 written out."""

import numpy as np
import pytest
import torch
from codec_inputs import gaussian, hessian
from hypothesis import given, settings
from hypothesis import strategies as st

from bstack.codecs.spqr_columns import damp
from bstack.numerics.feedback import factorise
from bstack.numerics.groups import LEVELS, code_group, fit_groups, fit_levels, outlier_scores


def test_factorise_is_the_decomposition():
    h = hessian(30)
    factor, cost, _ = factorise(h.clone, 2.0)
    again = factor.double() @ torch.diag(cost.double()) @ factor.double().t()
    assert torch.allclose(again, h.double() + 2 * torch.eye(30).double(), rtol=1e-5, atol=1e-3)
    # GPTQ's form: the cost of a column is one over the square of the inverse's Cholesky diagonal.
    inverse = torch.linalg.cholesky(torch.linalg.inv(h.double() + 2 * torch.eye(30)), upper=True)
    assert torch.allclose(cost.double(), inverse.diagonal() ** -2, rtol=1e-4)


def test_groups_are_coded_as_written_out():
    """One row and candidate at a time, in float64, with GPTQ's own updates of the columns that follow."""
    rng = np.random.default_rng(0)
    g, rows, candidates, max_code = 7, 5, 3, 7
    h = hessian(g, 1)
    factor, cost, _ = factorise(h.clone, 0.1)
    weight = torch.from_numpy(rng.standard_normal((g, rows))).float()
    kept = torch.where(torch.from_numpy(rng.random((g, rows))) < 0.2, 0.02, 1.0).float()
    scale = torch.from_numpy(rng.uniform(0.2, 0.6, (candidates, rows))).float()
    zero = torch.from_numpy(rng.uniform(2, 5, (candidates, rows))).float()
    found = code_group(weight, weight, factor, cost, kept, scale, zero, max_code)
    damped_h = h.double() + 0.1 * torch.eye(g)
    for c in range(candidates):
        for r in range(rows):
            wanted, total = weight[:, r].double().numpy().copy(), 0.0
            for j in range(g):
                code = np.clip(np.round(wanted[j] / float(scale[c, r]) + float(zero[c, r])), 0, max_code)
                dense = float(scale[c, r]) * (code - float(zero[c, r]))
                assert found.codes[j, c, r] == code
                is_outlier = float(kept[j, r]) < 1
                stored = dense + (float(np.float16(wanted[j] - dense)) if is_outlier else 0.0)
                total += float(cost[j]) * float(kept[j, r]) * (wanted[j] - dense) ** 2
                assert float(found.dense[j, c, r] + found.added[j, c, r]) == pytest.approx(stored, abs=2e-3)
                # The error of column j, spread over the later ones by the inverse of what they share.
                rest = torch.linalg.inv(damped_h[j:, j:]).numpy()
                wanted[j:] -= (wanted[j] - stored) / rest[0, 0] * rest[0]
            assert float(found.cost[c, r]) == pytest.approx(total, rel=2e-2, abs=1e-4)


def test_chosen_takes_one_candidate_a_row():
    g, rows = 4, 6
    weight = torch.randn(g, rows)
    scale = torch.rand(3, rows) + 0.1
    found = code_group(
        weight, weight, torch.eye(g), torch.ones(g), torch.ones(g, rows), scale, torch.full((3, rows), 7.0), 15
    )
    choice = torch.tensor([0, 1, 2, 2, 1, 0])
    one = found.chosen(choice)
    for r, c in enumerate(choice):
        assert torch.equal(one.dense[:, r], found.dense[:, c, r]) and one.cost[r] == found.cost[c, r]


@given(seed=st.integers(0, 2**32 - 1), positions=st.integers(1, 20), max_code=st.sampled_from([7, 15]))
@settings(max_examples=40, deadline=None)
def test_a_fit_is_no_worse_than_rounding_the_whole_range(seed, positions, max_code):
    generator = torch.Generator().manual_seed(seed)
    target, cost = torch.randn(positions, 16, generator=generator), torch.rand(positions, generator=generator) + 0.1
    scale, zero = fit_groups(target, cost, torch.ones_like(target), max_code)

    def error(scale, zero):
        codes = (target / scale + zero).round().clamp(0, max_code)
        return (cost[:, None] * (target - scale * (codes - zero)) ** 2).sum(0)

    high, low = target.amax(0), target.amin(0)
    plain = ((high - low) / max_code).clamp_min(torch.maximum(high.abs(), low.abs()) / (2 * max_code))
    assert (scale > 0).all()
    assert (error(scale, zero) <= error(plain, max_code / 2 - (high + low) / 2 / plain) * 1.001 + 1e-9).all()


@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
@settings(max_examples=40, deadline=None)
def test_levels_reach_what_evenly_spaced_ones_do(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    values = 1 + spread * torch.rand(5, 16, generator=generator)
    weight = torch.rand(5, 16, generator=generator) + 0.01
    base, step = fit_levels(values, weight)
    assert base.dtype == step.dtype == torch.float16

    def error(base, step):
        levels = base[:, None, None] + step[:, None, None] * torch.arange(LEVELS)
        return (weight * (values[..., None] - levels).abs().amin(-1) ** 2).sum(1)

    low, high = values.amin(1), values.amax(1)
    rounding = weight.sum(1) * (2.0**-10 * high) ** 2
    assert (error(base.float(), step.float()) <= error(low, (high - low) / (LEVELS - 1)) * 1.01 + 4 * rounding).all()


def test_scores_against_leaving_weights_out_one_by_one():
    generator = torch.Generator().manual_seed(2)
    weight = gaussian(12, 40, 5)
    cost = torch.rand(40, generator=generator) + 0.2
    group, max_code = 16, 15
    scores = outlier_scores(weight, cost, group, max_code)

    def error(values, costs):
        return (max(values) - min(values)) ** 2 * sum(costs) / 12 / max_code**2 if len(values) else 0.0

    for row in range(12):
        for start in range(0, 40, group):
            places = list(range(start, min(start + group, 40)))
            values = {p: float(weight[row, p]) for p in places}
            costs = {p: float(cost[p]) for p in places}
            gains, order = [], []
            for _ in range(3):
                before = error(list(values.values()), list(costs.values()))
                ends = (min(values, key=values.get), max(values, key=values.get))
                fall = {
                    end: before
                    - error([v for p, v in values.items() if p != end], [c for p, c in costs.items() if p != end])
                    for end in ends
                }
                end = max(fall, key=fall.get)
                gains.append(fall[end])
                order.append(end)
                del values[end], costs[end]
            # The least concave curve above the sums, by its corners.
            sums, at, slopes = np.cumsum([0, *gains]), 0, []
            while at < 3:
                best = max(range(at + 1, 4), key=lambda to: (sums[to] - sums[at]) / (to - at))
                slopes += [(sums[best] - sums[at]) / (best - at)] * (best - at)
                at = best
            expected = dict(zip(order, slopes, strict=True))
            for place in places:
                assert float(scores[row, place]) == pytest.approx(expected.get(place, 0.0), rel=1e-3, abs=1e-6)


def test_damping_of_an_empty_hessian_is_positive():
    prepared = damp(torch.zeros(5, 5), 10)
    assert torch.equal(prepared.factor, torch.eye(5)) and (prepared.cost > 0).all()
