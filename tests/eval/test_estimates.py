"""Figures against float64 oracles that share no code with them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bstack.bench.quality import Scores
from bstack.bench.reference import write_reference
from bstack.bench.tables import with_error
from bstack.eval.divergence import divergence
from bstack.eval.estimates import Estimate, mean_estimate, percentile_estimate, perplexity_estimate

GENERATOR = np.random.default_rng(0)
VALUES = GENERATOR.gamma(0.4, 2.0, size=(12, 50))


def test_mean_and_its_error():
    found = mean_estimate(torch.from_numpy(VALUES).float())
    assert found.value == pytest.approx(VALUES.mean(), rel=1e-6)
    assert found.error == pytest.approx(np.std([row.mean() for row in VALUES], ddof=1) / math.sqrt(12), rel=1e-5)


def test_errors_are_as_large_as_the_spread_of_repeated_samples():
    """400 samples of 12 windows whose tokens hang together: the mean error must tell how far the means spread."""
    samples = GENERATOR.normal(size=(400, 12, 1)) + 0.3 * GENERATOR.normal(size=(400, 12, 30))
    found = [mean_estimate(torch.from_numpy(sample)) for sample in samples]
    assert np.mean([e.error for e in found]) == pytest.approx(np.std([e.value for e in found]), rel=0.12)
    # Tokens taken for independent would claim a fifth of it.
    assert np.std(samples[0]) / math.sqrt(360) < 0.3 * found[0].error


def test_perplexity():
    found = perplexity_estimate(torch.from_numpy(VALUES))
    means = VALUES.mean(1)
    assert found.value == pytest.approx(math.exp(VALUES.mean()))
    assert found.error == pytest.approx(math.exp(VALUES.mean()) * means.std(ddof=1) / math.sqrt(12))
    assert perplexity_estimate(torch.full((2, 3), 1e6)).value == math.inf


def test_percentile():
    found = percentile_estimate(torch.from_numpy(VALUES), 99)
    assert found.value == pytest.approx(np.percentile(VALUES, 99))
    drawn = GENERATOR.integers(0, 12, size=(4000, 12))
    spread = np.std([np.percentile(VALUES[rows], 99) for rows in drawn])
    assert found.error == pytest.approx(spread, rel=0.25)  # 200 resamples against 4000
    assert percentile_estimate(torch.from_numpy(VALUES), 99) == found


def test_one_window_has_no_error():
    one = torch.from_numpy(VALUES[:1])
    assert [e.error for e in (mean_estimate(one), percentile_estimate(one, 99), perplexity_estimate(one))] == [None] * 3
    assert Estimate(math.inf, math.nan).to_json() == {"value": None, "standard_error": None}


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@given(st.integers(0, 10**6), st.floats(0.01, 8), st.floats(0.001, 3))
def test_divergence_is_the_definition(seed, sharpness, distance):
    generator = np.random.default_rng(seed)
    p = generator.normal(size=(5, 40)) * sharpness
    q = p + generator.normal(size=(5, 40)) * distance
    found = divergence(torch.from_numpy(p).log_softmax(-1), torch.from_numpy(q))
    expected = (softmax(p) * np.log(softmax(p) / softmax(q))).sum(-1)
    np.testing.assert_allclose(found.kl.numpy(), expected, rtol=2e-3, atol=3e-6)
    np.testing.assert_array_equal(found.same_top.numpy(), p.argmax(-1) == q.argmax(-1))


def test_scores_of_a_whole_run(tmp_path):
    """From logits to figures, half-precision reference included; the last position of a window predicts nothing."""
    vocabulary, length = 300, 20
    windows = GENERATOR.integers(0, vocabulary, size=(5, length))
    p = GENERATOR.normal(size=(5, length, vocabulary)) * 3
    q = p + 0.3 * GENERATOR.normal(size=p.shape)

    def fill(writer):
        for number, logits in enumerate(p):
            writer.add(number, torch.from_numpy(logits))

    scores = Scores(torch.from_numpy(windows), write_reference(tmp_path / "r", "k", 5, fill))
    for number, logits in enumerate(q):
        scores.add(number, torch.from_numpy(logits))
    found = scores.quality()

    p, q = softmax(p[:, :-1]), softmax(q[:, :-1])
    kl = (p * np.log(p / q)).sum(-1)
    losses = -np.log(np.take_along_axis(q, windows[:, 1:, None], -1))[..., 0]
    # What half precision does is a tenth of a per cent of a small divergence.
    assert found.kld.value == pytest.approx(kl.mean(), rel=2e-3)
    assert found.kld.error == pytest.approx(kl.mean(1).std(ddof=1) / math.sqrt(5), rel=1e-2)
    assert found.kld_99.value == pytest.approx(np.percentile(kl, 99), rel=5e-3)
    assert found.same_top.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.perplexity.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (36.0824, 1.2345, "36.1 ± 1.2"),
        (0.07263, 0.00119, "0.0726 ± 0.0012"),
        (12.5, None, "12.5"),
        (1234.5, 123.4, "1234 ± 123"),
        (math.inf, None, "inf"),
        (2.0, 0.0, "2"),
        (1e9, 3e8, "1e+09 ± 3e+08"),
        (1e-9, 1e-11, "1e-09 ± 1e-11"),
        (5.0, math.inf, "5"),
    ],
)
def test_values_are_written_as_exactly_as_they_are_known(value, error, text):
    assert with_error(value, error) == text
