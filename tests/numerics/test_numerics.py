"""Rotation, feedback and damping against dense float64 algebra."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bstack.numerics.feedback import choose_damping, factorise, spectrum_sample
from bstack.numerics.hessian import shrinkage
from bstack.numerics.rotation import block_size, rotate, rotate_hessian, signs, unrotate


def factor_of(hessian, damping):
    return factorise(hessian, damping)[0]


def dense_rotation(n: int) -> np.ndarray:
    z = n & -n
    h = np.array([[(-1) ** bin(i & j).count("1") for j in range(z)] for i in range(z)]) / math.sqrt(z)
    return np.diag(signs(n).double().numpy()) @ np.kron(np.eye(n // z), h)


@given(n=st.integers(1, 200), m=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_rotation_is_the_dense_one_and_orthogonal(n, m, seed):
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    r = dense_rotation(n)
    assert np.allclose(r @ r.T, np.eye(n), atol=1e-12)
    assert np.allclose(rotate(x).numpy(), x.double().numpy() @ r, atol=1e-4)
    assert torch.allclose(unrotate(rotate(x)), x, atol=1e-5)


def test_rotated_hessian_is_that_of_rotated_inputs():
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate_hessian(x.t() @ x), rotate(x).t() @ rotate(x), atol=1e-3)


@given(n=st.integers(1, 40), together=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_rotated_hessian_a_few_rows_at_a_time(n, together, seed):
    hessian = torch.randn(
        n, n, generator=torch.Generator().manual_seed(seed)
    )  # not symmetric, so that a lost transpose shows
    before = hessian.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bstack.numerics.rotation.TILE", together)
        patch.setattr("bstack.numerics.rotation.NUMBERS_TOGETHER", together * n)
        rotated = rotate_hessian(hessian)
    assert torch.equal(hessian, before) and rotated.is_contiguous()
    assert torch.allclose(rotated, rotate(rotate(hessian).t()), atol=1e-5)


@pytest.mark.parametrize(("width", "size"), [(1, 1), (576, 64), (1536, 512), (4096, 4096), (11008, 256), (7, 1)])
def test_block_size_is_the_largest_power_of_two_that_divides(width, size):
    assert block_size(width) == size


def test_signs_are_balanced_and_do_not_depend_on_the_width():
    assert abs(float(signs(4096).mean())) < 0.05
    assert torch.equal(signs(100), signs(4096)[:100])


@given(n=st.integers(1, 40), piece=st.integers(1, 900), block=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_feedback_factor_in_pieces_and_in_single_precision(n, piece, block, seed):
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(seed))
    h = x.t() @ x
    expected = factor_of(h.clone, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bstack.numerics.feedback.PIECE", piece)
        assert torch.equal(factor_of(h.clone, 1.0), expected)
        patch.setattr("bstack.numerics.feedback.DOUBLE_WIDTH", 0)  # where the hessian's own memory is used
        patch.setattr("bstack.numerics.feedback.BLOCK", block)
        factor = factor_of(h.clone, 1.0)
    assert torch.allclose(factor, expected, atol=1e-3)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("double_width", [0, 100])
def test_feedback_factor_holds_back_where_there_is_none(double_width, monkeypatch):
    """No Cholesky factor of H + d I exists for d of 1 or 10, as the smallest eigenvalue of H is -50; one does for 100."""
    monkeypatch.setattr("bstack.numerics.feedback.DOUBLE_WIDTH", double_width)
    monkeypatch.setattr("bstack.numerics.feedback.BLOCK", 3)
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    h = x.t() @ x
    h -= (torch.linalg.eigvalsh(h)[0] + 50) * torch.eye(7)
    assert torch.allclose(factor_of(h.clone, 1.0), factor_of(h.clone, 100.0))


@pytest.mark.parametrize("double_width", [0, 100])
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (0, 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_without_any_feedback_factor_is_refused(double_width, place, value, monkeypatch):
    monkeypatch.setattr("bstack.numerics.feedback.DOUBLE_WIDTH", double_width)
    monkeypatch.setattr("bstack.numerics.feedback.BLOCK", 2)
    h = torch.eye(3)
    h[place] = h[place[::-1]] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        factor_of(h.clone, 1.0)


@given(n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), damp=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_feedback_factor_is_a_unit_triangular_factor(n, seed, damp):
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(seed))
    h = x.t() @ x
    factor = factor_of(h.clone, damp).double()
    assert torch.equal(factor.triu(), factor)
    assert torch.allclose(factor.diagonal(), torch.ones(n, dtype=torch.float64))
    inverse = torch.linalg.inv(factor)
    middle = inverse @ (h.double() + damp * torch.eye(n)) @ inverse.t()
    off = middle - torch.diag(middle.diagonal())
    assert float(off.abs().max()) <= 1e-4 * float(middle.diagonal().max())


@pytest.mark.parametrize("later", [0.25, 0.5, 1.0, 2.0])
def test_damping_is_the_minimum_it_claims(later):
    values = torch.logspace(-1, 2, 50, dtype=torch.float64)
    weights = torch.full((50,), 0.02, dtype=torch.float64)

    def cost(d: float) -> float:
        n = 1 / (values + d)
        return float((values * n).mean().log() + later * n.mean().log() - (1 + later) * n.log().mean())

    d = choose_damping(values, weights, later)
    grid = [d * 10 ** (k / 20) for k in range(-40, 41)]
    assert cost(d) <= min(cost(other) for other in grid) + 1e-9


def test_damping_of_a_zero_hessian_is_positive():
    assert choose_damping(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64) / 3, 1.0) > 0


@pytest.mark.parametrize("n", [1, 2, 10, 64, 300])
def test_spectrum_sample_serves_the_damping(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3 * n, n, generator=generator) * torch.logspace(-1.5, 1, n)
    h = x.t() @ x
    values, weights = spectrum_sample(h)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert float((values * weights).sum()) == pytest.approx(float(h.trace()) / n, rel=0.15)
    exact = torch.linalg.eigvalsh(h.double())
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    for later in (0.5, 1.0):
        assert choose_damping(values, weights, later) == pytest.approx(choose_damping(exact, uniform, later), rel=0.35)


def shrink(h, tokens):
    keep, ridge = shrinkage(h, tokens)
    return keep * h + ridge * torch.eye(h.shape[0])


def test_shrinkage_pulls_a_small_sample_towards_the_truth():
    """Averaged over samples, the shrunk hessian is closer to the true one, and keeps its trace."""
    n, truth = 40, torch.diag(torch.linspace(0.5, 1.5, 40))
    generator = torch.Generator().manual_seed(0)
    for tokens in (10, 40, 200):
        raw = shrunk = 0.0
        for _ in range(10):
            x = torch.randn(tokens, n, generator=generator) @ truth.sqrt()
            h = x.t() @ x
            better = shrink(h, tokens)
            assert float(better.trace()) == pytest.approx(float(h.trace()), rel=1e-5)
            raw += float((h / tokens - truth).norm())
            shrunk += float((better / tokens - truth).norm())
        assert shrunk < raw


def test_shrinkage_leaves_a_large_sample_of_a_spiky_spectrum_alone():
    x = torch.randn(20000, 30, generator=torch.Generator().manual_seed(1)) * torch.logspace(1, -1, 30)
    h = x.t() @ x
    assert float((shrink(h, 20000) - h).norm() / h.norm()) < 1e-3


def test_shrinkage_of_nothing_is_nothing():
    assert torch.equal(shrink(torch.zeros(4, 4), 10), torch.zeros(4, 4))
