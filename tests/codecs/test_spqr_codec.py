"""The SpQR codec: layout against the specification, and the promises of the contract."""

import numpy as np
import pytest
import spqr_oracle
import torch
from codec_inputs import blocks_of, correlated_hessian, gaussian, hessian, outlier_count, rebuilt
from hypothesis import given, settings
from hypothesis import strategies as st

import bstk
from bstack.codecs.spqr import SpqrCodec
from bstack.codecs.trellis import TrellisCodec
from bstack.numerics.hessian import output_errors

# Layout


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("m", "n", "group"), [(1, 2, 16), (16, 16, 16), (17, 33, 16), (5, 70, 32), (40, 130, 64), (3, 100, 128)]
)
def test_blocks_are_what_the_specification_says(m, n, group, bits):
    weight = gaussian(m, n, m * n)
    blocks = blocks_of(SpqrCodec(bits, group, outliers=0.5 if m * n < 20 else 0.05, planes=1), weight, hessian(n))
    assert [b.kind for b in blocks] == [bstk.SPQR, bstk.OUTLIERS, bstk.TRELLIS]
    assert [b.rank for b in blocks] == [group + bits, 0, 2]
    for block in blocks:
        length = block.kind.rule((m, n), "f16", block.rank)
        assert len(block.payload) == length if isinstance(length, int) else len(block.payload) in length
        if block.kind.check is not None:
            block.kind.check(block.payload, (m, n))
    dense = spqr_oracle.dense(blocks[0].payload, (m, n), group + bits)
    assert (rebuilt(blocks, (m, n), 1).numpy() == dense).all()
    both = dense + spqr_oracle.outliers(blocks[1].payload, (m, n))
    assert (rebuilt(blocks, (m, n), 2).numpy() == both).all()
    above = TrellisCodec.rebuild([blocks[2].payload], [bstk.TRELLIS], [2], (m, n)).numpy()
    assert np.abs(rebuilt(blocks, (m, n)).numpy() - both - above).max() <= 1e-5 * np.abs(both).max()


def test_columns_are_taken_by_falling_second_hessian():
    h = torch.diag(torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6]))
    payload = blocks_of(SpqrCodec(planes=0), gaussian(4, 8), h)[0].payload
    assert np.frombuffer(payload, "<u2", 8).tolist() == [5, 7, 4, 2, 0, 6, 1, 3]


# The contract


@given(
    m=st.integers(1, 50),
    n=st.integers(1, 70),
    bits=st.sampled_from([3, 4]),
    group=st.sampled_from([16, 32]),
    planes=st.integers(0, 2),
    fraction=st.sampled_from([0, 0.01, 0.2, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_every_block_reports_its_error_and_outliers_and_planes_lower_it(m, n, bits, group, planes, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = gaussian(m, n, seed) * torch.rand(m, 1, generator=generator)
    h = hessian(n, seed % 1000)
    blocks = blocks_of(SpqrCodec(bits, group, fraction, planes=planes), weight, h, torch.rand(m, generator=generator))
    outliers = [bstk.OUTLIERS] if outlier_count(blocks, m) else []
    assert [b.kind for b in blocks] == [bstk.SPQR, *outliers, *[bstk.TRELLIS] * planes]
    assert bool(outliers) <= bool(fraction)
    scale = float(output_errors(weight, h).sum())
    before = scale
    for depth, block in enumerate(blocks, 1):
        error = output_errors(weight - rebuilt(blocks, (m, n), depth), h)
        assert torch.allclose(error, block.row_errors, rtol=2e-2, atol=1e-5 * scale)
        # An outlier of the whole may make the sum larger: the dense part's feedback counts on all of them.
        assert float(error.sum()) <= before + 1e-5 * scale
        before = float(error.sum())
    assert before < (0.2 if bits == 3 else 0.1) * scale + 1e-12


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(8, 12), torch.full((8, 12), 3.0), torch.eye(16), torch.randn(8, 12) * 1e-20, torch.randn(8, 12) * 1e4],
    ids=["zeros", "constant", "identity", "tiny", "huge"],
)
@pytest.mark.parametrize("h", ["plain", "zero", "one channel"])
@pytest.mark.parametrize("fraction", [0, 0.1])
def test_degenerate_input_gives_finite_blocks(weight, h, fraction):
    n = weight.shape[1]
    matrix = {"plain": hessian(n), "zero": torch.zeros(n, n), "one channel": torch.diag(torch.eye(n)[0])}[h]
    codec = SpqrCodec(outliers=fraction, planes=1)
    blocks = blocks_of(codec, weight, matrix, torch.zeros(weight.shape[0]))
    values = rebuilt(blocks, weight.shape)
    assert values.isfinite().all()
    assert all(b.row_errors.isfinite().all() and (b.row_errors >= 0).all() for b in blocks)
    if h == "plain":
        assert float((rebuilt(blocks, weight.shape, 2) - weight).abs().max()) <= 0.4 * float(weight.abs().max()) + 1e-6


def test_zero_tokens_and_an_empty_hessian():
    blocks = blocks_of(SpqrCodec(planes=1), gaussian(4, 20), torch.zeros(20, 20), tokens=0)
    assert rebuilt(blocks, (4, 20)).isfinite().all()


def test_weight_and_hessian_stay_as_they_are_and_the_bytes_are_the_same():
    weight, h = gaussian(40, 48), hessian(48)
    kept = weight.clone(), h.clone()
    one, two = ([b.payload for b in blocks_of(SpqrCodec(), weight, h)] for _ in range(2))
    assert one == two
    assert torch.equal(weight, kept[0]) and torch.equal(h, kept[1])


def test_a_group_is_quantised_far_better_than_one_scale_for_all():
    """Gaussian weights, white inputs, no outliers: at least 22 dB with 4 bits and 15.5 dB with 3."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    for bits, decibels in ((4, 22), (3, 15.5)):
        block = blocks_of(SpqrCodec(bits, outliers=0, planes=0), weight, torch.eye(256))[0]
        assert 10 * np.log10(float(weight.square().sum() / block.row_errors.sum())) > decibels


def test_feedback_pays_where_inputs_are_correlated():
    n = 64
    h = correlated_hessian(n)
    weight = torch.randn(256, n, generator=torch.Generator().manual_seed(4))
    codec = SpqrCodec(outliers=0, planes=0)
    with_feedback = blocks_of(codec, weight, h)[0].row_errors.sum()
    plain = weight - rebuilt(blocks_of(codec, weight, torch.diag(h.diagonal())), (256, n), 1)
    assert float(with_feedback) < 0.75 * float(output_errors(plain, h).sum())


def test_outliers_pay_where_weights_stick_out_and_the_dense_part_alone_stays_usable():
    weight, h = gaussian(128, 128), hessian(128)
    none = float(blocks_of(SpqrCodec(outliers=0, planes=0), weight, h)[0].row_errors.sum())
    dense, both = (float(b.row_errors.sum()) for b in blocks_of(SpqrCodec(outliers=0.02, planes=0), weight, h))
    assert both < 0.7 * none
    assert dense < 0.1 * float(output_errors(weight, h).sum())


def test_a_weight_that_alone_decides_is_not_clipped():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[5, 7] = 60
    h = torch.diag(torch.where(torch.arange(64) == 7, 1e6, 1.0))
    blocks = blocks_of(SpqrCodec(outliers=0.02, planes=0), weight, h)
    dense = rebuilt(blocks, weight.shape, 1)
    assert abs(float(dense[5, 7]) - 60) < 6
    assert abs(float(rebuilt(blocks, weight.shape, 2)[5, 7]) - 60) < 0.02
