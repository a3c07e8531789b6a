"""The SpQR codec: layout against the specification, mathematics against float64 written out, promises of the contract."""

import math
import re
from contextlib import nullcontext

import bstk
import numpy as np
import pytest
import spqr_oracle
import torch
from bstack.codecs import codec_of_kind, make_codec
from bstack.codecs.spqr import SpqrCodec
from bstack.codecs.spqr_columns import damped
from bstack.codecs.spqr_target import range_of
from bstack.codecs.trellis import TrellisCodec
from bstack.errors import CodecError
from bstack.numerics.errors import output_errors
from bstack.numerics.feedback import factorise
from bstack.numerics.groups import LEVELS, code_group, fit_groups, fit_levels
from bstack.numerics.outliers import outlier_scores
from bstack.settings import Settings
from codec_inputs import correlated_moment, moment
from hypothesis import given, settings
from hypothesis import strategies as st


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Weights with a few that stick out."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    return weight * torch.where(torch.rand(m, n, generator=generator) < 0.02, 8.0, 1.0)


def blocks_of(codec, weight, h, importance=None, tokens=10**6):
    importance = torch.ones(weight.shape[0]) if importance is None else importance
    return list(codec.encode(weight, h, tokens, importance))


def rebuilt(blocks, shape, depth=None) -> torch.Tensor:
    some = blocks[:depth]
    return codec_of_kind(some[0].kind).rebuild(
        [b.payload for b in some], [b.kind for b in some], [b.rank for b in some], tuple(shape)
    )


# Layout


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("m", "n", "group"), [(1, 2, 16), (16, 16, 16), (17, 33, 16), (5, 70, 32), (40, 130, 64), (3, 100, 128)])
def test_blocks_are_what_the_specification_says(m, n, group, bits):
    weight = gaussian(m, n, m * n)
    blocks = blocks_of(SpqrCodec(bits, group, outliers=0.5 if m * n < 20 else 0.05, planes=1), weight, moment(n))
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


def test_columns_are_taken_by_falling_second_moment():
    h = torch.diag(torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6]))
    payload = blocks_of(SpqrCodec(planes=0), gaussian(4, 8), h)[0].payload
    assert np.frombuffer(payload, "<u2", 8).tolist() == [5, 7, 4, 2, 0, 6, 1, 3]


# The contract


@given(
    m=st.integers(1, 50), n=st.integers(1, 70), bits=st.sampled_from([3, 4]), group=st.sampled_from([16, 32]),
    planes=st.integers(0, 2), share=st.sampled_from([0, 0.01, 0.2, 0.5]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_block_reports_its_error_and_outliers_and_planes_lower_it(m, n, bits, group, planes, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = gaussian(m, n, seed) * torch.rand(m, 1, generator=generator)
    h = moment(n, seed % 1000)
    blocks = blocks_of(SpqrCodec(bits, group, share, planes=planes), weight, h, torch.rand(m, generator=generator))
    apart = [bstk.OUTLIERS] if outlier_count(blocks, m) else []
    assert [b.kind for b in blocks] == [bstk.SPQR, *apart, *[bstk.TRELLIS] * planes]
    assert bool(apart) <= bool(share)
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
@pytest.mark.parametrize("share", [0, 0.1])
def test_degenerate_input_gives_finite_blocks(weight, h, share):
    n = weight.shape[1]
    matrix = {"plain": moment(n), "zero": torch.zeros(n, n), "one channel": torch.diag(torch.eye(n)[0])}[h]
    codec = SpqrCodec(outliers=share, planes=1)
    blocks = blocks_of(codec, weight, matrix, torch.zeros(weight.shape[0]))
    values = rebuilt(blocks, weight.shape)
    assert values.isfinite().all()
    assert all(b.row_errors.isfinite().all() and (b.row_errors >= 0).all() for b in blocks)
    if h == "plain":
        assert float((rebuilt(blocks, weight.shape, 2) - weight).abs().max()) <= 0.4 * float(weight.abs().max()) + 1e-6


def test_zero_tokens_and_an_empty_moment():
    blocks = blocks_of(SpqrCodec(planes=1), gaussian(4, 20), torch.zeros(20, 20), tokens=0)
    assert rebuilt(blocks, (4, 20)).isfinite().all()


def test_weight_and_moment_stay_as_they_are_and_the_bytes_are_the_same():
    weight, h = gaussian(40, 48), moment(48)
    kept = weight.clone(), h.clone()
    one, two = ([b.payload for b in blocks_of(SpqrCodec(), weight, h)] for _ in range(2))
    assert one == two
    assert torch.equal(weight, kept[0]) and torch.equal(h, kept[1])


def test_a_group_is_quantised_far_better_than_one_scale_for_all():
    """Gaussian weights, white inputs, no outliers: at least 22 dB with 4 bits and 15.5 dB with 3."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    for bits, least in ((4, 22), (3, 15.5)):
        block = blocks_of(SpqrCodec(bits, outliers=0, planes=0), weight, torch.eye(256))[0]
        assert 10 * np.log10(float(weight.square().sum() / block.row_errors.sum())) > least


def test_feedback_pays_where_inputs_are_correlated():
    n = 64
    h = correlated_moment(n)
    weight = torch.randn(256, n, generator=torch.Generator().manual_seed(4))
    codec = SpqrCodec(outliers=0, planes=0)
    with_feedback = blocks_of(codec, weight, h)[0].row_errors.sum()
    plain = weight - rebuilt(blocks_of(codec, weight, torch.diag(h.diagonal())), (256, n), 1)
    assert float(with_feedback) < 0.75 * float(output_errors(plain, h).sum())


def test_outliers_pay_where_weights_stick_out_and_the_dense_part_alone_stays_usable():
    weight, h = gaussian(128, 128), moment(128)
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


# A layer together


def layer(seeds=(1, 2, 3)):
    shapes = [(48, 64), (96, 64), (64, 112)]
    return [
        (gaussian(m, n, seed), moment(n, seed), 1000, torch.full((m,), 10.0**-seed))
        for seed, (m, n) in zip(seeds, shapes, strict=True)
    ]


def outlier_count(blocks, rows):
    return sum(len(b.payload) // 4 - rows - 1 for b in blocks if b.kind is bstk.OUTLIERS)


@pytest.mark.parametrize(("bits", "bpw"), [(4, 5.9), (4, 6.5), (3, 4.9), (3, 8.0)])
def test_bits_per_weight_are_met_from_below_everything_counted(bits, bpw):
    tasks = layer()
    codec = SpqrCodec(bits, bpw=bpw, planes=1).for_layer(iter(tasks))
    blocks = [list(codec.encode(*task)) for task in tasks]
    weights = sum(task[0].numel() for task in tasks)
    assert bpw - 0.05 < bits_used(blocks, weights) <= bpw


def bits_used(blocks, weights):
    return 8 * sum(len(b.payload) for some in blocks for b in some if b.kind is not bstk.TRELLIS) / weights


def test_a_target_buys_no_row_pointers_where_nothing_is_apart():
    """With room for the outliers of one matrix of three, the others have no block."""
    tasks = layer()
    weights = sum(task[0].numel() for task in tasks)
    least = bits_used([list(SpqrCodec(outliers=0, planes=0).encode(*task)) for task in tasks], weights)
    codec = SpqrCodec(bpw=least, planes=1).for_layer(tasks)
    blocks = [list(codec.encode(*task)) for task in tasks]
    assert all([b.kind for b in some] == [bstk.SPQR, bstk.TRELLIS] for some in blocks) and bits_used(blocks, weights) == least
    codec = SpqrCodec(bpw=least + 0.15, planes=0).for_layer(tasks)
    blocks = [list(codec.encode(*task)) for task in tasks]
    assert [len(some) for some in blocks] == [2, 1, 1]
    assert least + 0.1 < bits_used(blocks, weights) <= least + 0.15


def test_the_share_is_that_of_the_layer_and_goes_where_it_matters():
    tasks = layer()
    codec = SpqrCodec(outliers=0.03, planes=0).for_layer(tasks)
    counts = [outlier_count(list(codec.encode(*task)), len(task[0])) for task in tasks]
    weights = [task[0].numel() for task in tasks]
    assert 0.028 < sum(counts) / sum(weights) <= 0.03
    assert counts[0] / weights[0] > counts[1] / weights[1] > counts[2] / weights[2]


def test_without_a_layer_each_matrix_has_the_share():
    for task in layer():
        count = outlier_count(list(SpqrCodec(outliers=0.02, planes=0).encode(*task)), len(task[0]))
        assert 0.018 < count / task[0].numel() <= 0.02


def test_no_outliers_is_none():
    task = layer()[0]
    blocks = list(SpqrCodec(outliers=0, planes=2).encode(*task))
    assert [b.kind for b in blocks] == [bstk.SPQR, bstk.TRELLIS, bstk.TRELLIS]
    errors = [float(b.row_errors.sum()) for b in blocks]
    assert errors[0] > errors[1] > errors[2]


def test_a_matrix_whose_weights_are_all_alike_has_no_outliers_block():
    tasks = [*layer(), (torch.full((32, 64), 0.5), moment(64), 1000, torch.ones(32))]
    codec = SpqrCodec(planes=1).for_layer(tasks)
    kinds = [[b.kind for b in codec.encode(*task)] for task in tasks]
    assert kinds[0] == [bstk.SPQR, bstk.OUTLIERS, bstk.TRELLIS] and kinds[3] == [bstk.SPQR, bstk.TRELLIS]


def test_a_budget_below_what_a_layer_takes_is_refused_with_the_least():
    with pytest.raises(CodecError, match=r"take 4\.8750 bits per weight without any outlier.*or --bits 3"):
        SpqrCodec(4, bpw=4.7).for_layer(layer())


# What shapes allow


def encoded_range(bits, group, shapes):
    """Bits per weight without outliers and with as many as there can be, of what the encoder writes."""
    found = []
    for share in (0, 0.5):
        blocks = [
            list(SpqrCodec(bits, group, share, planes=0).encode(gaussian(m, n, m), moment(n), 1000, torch.ones(m)))
            for m, n in shapes
        ]
        found.append(bits_used(blocks, sum(m * n for m, n in shapes)))
    return found


@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 32)])
@pytest.mark.parametrize("shapes", [[(48, 64), (16, 80)], [(97, 81)], [(112, 48)]])
def test_the_range_is_that_of_what_is_encoded(bits, group, shapes):
    least, most = range_of(shapes, bits, group)
    found = encoded_range(bits, group, shapes)
    assert found[0] == pytest.approx(least) and least < found[1] <= most
    if not any(n % group for _, n in shapes):
        assert found[1] > 0.98 * most  # an outlier that adds nothing is left out
    layers = [[[shape] for shape in shapes]]
    for bpw in (least, (least + most) / 2):
        SpqrCodec(bits, group, bpw=bpw).check_shapes(layers)
    for bpw in (least - 0.001, most + 0.001):
        with pytest.raises(CodecError, match=rf"at least {math.ceil(1000 * least) / 1000:g} bits.*Allowed is"):
            SpqrCodec(bits, group, bpw=bpw).check_shapes(layers)


def test_the_range_named_is_good_for_every_layer_and_every_reading_of_the_shapes():
    layers = [[[(64, 64)], [(64, 256), (256, 64)]], [[(32, 64)]]]
    with pytest.raises(CodecError, match="Allowed is ") as refused:
        SpqrCodec(bpw=4.7).check_shapes(layers)
    low, high = re.search(r"Allowed is ([\d.]+) to ([\d.]+)\.", str(refused.value)).groups()
    for bpw in (float(low), float(high)):
        SpqrCodec(bpw=bpw).check_shapes(layers)
        for shapes in ([(64, 64), (64, 256)], [(64, 64), (256, 64)], [(32, 64)]):
            least, most = range_of(shapes, 4, 16)
            assert least <= bpw <= most
    # What only one of the readings rules out is left to the layer.
    least, likely = (range_of([(64, 64), shape], 4, 16).least for shape in ((256, 64), (64, 256)))
    SpqrCodec(bpw=(least + likely) / 2).check_shapes(layers[:1])


def test_a_layer_without_matrices_rules_nothing_out():
    codec = SpqrCodec(bpw=5.0)
    codec.check_shapes([])
    codec.check_shapes([[], [[(64, 64)]]])
    assert codec.for_layer([]).bpw == 5.0
    assert SpqrCodec().for_layer([]).outliers == "auto"


def test_matrices_too_small_for_any_target():
    with pytest.raises(CodecError, match="none to give: leave it out, or choose another group"):
        SpqrCodec(group=128, bpw=12).check_shapes([[[(16, 16)]]])


@pytest.mark.parametrize(("group", "bpw", "advised"), [(128, 4.09, False), (16, 4.65, True)])
def test_fewer_bits_are_advised_where_they_can_have_the_target(group, bpw, advised):
    layers = [[[(512, 512)]]]
    with pytest.raises(CodecError, match=r"Allowed is [\d.]+ to [\d.]+\." + (" Or take 3 bits.$" if advised else "$")):
        SpqrCodec(group=group, bpw=bpw).check_shapes(layers)
    with nullcontext() if advised else pytest.raises(CodecError):
        SpqrCodec(3, group=group, bpw=bpw).check_shapes(layers)


def test_widths_that_16_bits_do_not_reach_are_refused_by_shape():
    SpqrCodec().check_shapes([[[(70000, 64), (64, 70000)]]])  # it may be the outputs that are so many
    with pytest.raises(CodecError, match="70000 inputs"):
        SpqrCodec().check_shapes([[[(64, 70000)]]])


# Settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bits": 2}, "3 or 4"),
        ({"group": 20}, "16, 32, 64, 128"),
        ({"planes": -1}, "0 to 14"),
        ({"planes": 15}, "0 to 14"),
        ({"outliers": 0.6}, "0 to 0.5, or auto"),
        ({"outliers": -0.1}, "0 to 0.5, or auto"),
        ({"outliers": float("nan")}, "0 to 0.5, or auto"),
        ({"outliers": 0.2}, "with groups of 16 it is at most 0.1875, as at most 3 of a group"),
        ({"outliers": 0.03, "group": 128}, "with groups of 128 it is at most 0.0234375"),
        ({"bpw": 4.6}, r"more than 4.625, up to about 10.625. Or take 3 bits.$"),
        ({"bpw": 3.6}, r"more than 4.625, up to about 10.625.$"),
        ({"group": 128, "bpw": 3.9}, r"more than 4.07812, up to about 4.82812.$"),
        ({"group": 128, "bpw": 3.8}, r"more than 4.07812, up to about 4.82812. Or take 3 bits.$"),
        ({"bits": 3, "bpw": 3.6}, r"more than 3.625, up to about 9.625.$"),
        ({"bpw": float("nan")}, "up to about 10.625.$"),
        ({"bpw": 100.0}, r"bpw is 100.0; with 4 bits in groups of 16.*more than 4.625, up to about 10.625.$"),
        ({"bits": 3, "group": 128, "bpw": 100.0}, r"with 3 bits in groups of 128.*more than 3.07812, up to about 3.82812.$"),
        ({"bpw": 5.0, "outliers": 0.01}, "outliers is 0.01 and bpw is 5.0; give one"),
        ({"bpw": 5.0, "outliers": 0}, "give one"),
        ({"rank": 4}, "--codec sign"),
    ],
)
def test_settings_out_of_range_are_refused(given, words):
    with pytest.raises(CodecError, match=words):
        make_codec(Settings(codec="spqr", **given))


@pytest.mark.parametrize("codec", ["trellis", "sign"])
@pytest.mark.parametrize("given", [{"bits": 4}, {"group": 16}, {"outliers": "auto"}, {"bpw": 5.0}])
def test_other_codecs_refuse_its_settings(codec, given):
    with pytest.raises(CodecError, match=f"{codec} codec has none; it belongs to --codec spqr"):
        make_codec(Settings(codec=codec, **given))


def test_settings_are_recorded():
    assert make_codec(Settings(codec="spqr")).settings() == {
        "codec": "spqr", "bits": 4, "group": 16, "outliers": "auto", "bpw": None, "planes": 2,
    }  # fmt: skip
    assert make_codec(Settings(codec="spqr", bits=3, bpw=4.0, planes=0)).settings() == {
        "codec": "spqr", "bits": 3, "group": 16, "outliers": None, "bpw": 4.0, "planes": 0,
    }  # fmt: skip


def test_auto_outliers_are_those_of_the_target():
    tasks = layer()
    said, unsaid = (make_codec(Settings(codec="spqr", bpw=5.9, planes=0, outliers=given)) for given in ("auto", None))
    assert said.settings() == unsaid.settings()
    assert said.for_layer(tasks).threshold == unsaid.for_layer(tasks).threshold != SpqrCodec().for_layer(tasks).threshold


def test_more_inputs_than_16_bits_reach_are_refused():
    wide = torch.zeros(1, 65536)
    with pytest.raises(CodecError, match="65536 inputs.*--codec trellis"):
        next(SpqrCodec().encode(wide, torch.zeros(1, 1), 1, torch.ones(1)))


# Mathematics


def test_factorise_is_the_decomposition():
    h = moment(30)
    factor, cost = factorise(h.clone, 2.0)
    again = factor.double() @ torch.diag(cost.double()) @ factor.double().t()
    assert torch.allclose(again, h.double() + 2 * torch.eye(30).double(), rtol=1e-5, atol=1e-3)
    # GPTQ's form: the cost of a column is one over the square of the inverse's Cholesky diagonal.
    inverse = torch.linalg.cholesky(torch.linalg.inv(h.double() + 2 * torch.eye(30)), upper=True)
    assert torch.allclose(cost.double(), inverse.diagonal() ** -2, rtol=1e-4)


def test_groups_are_coded_as_written_out():
    """One row and candidate at a time, in float64, with GPTQ's own updates of the columns that follow."""
    rng = np.random.default_rng(0)
    g, rows, candidates, most = 7, 5, 3, 7
    h = moment(g, 1)
    factor, cost = factorise(h.clone, 0.1)
    weight = torch.from_numpy(rng.standard_normal((g, rows))).float()
    kept = torch.where(torch.from_numpy(rng.random((g, rows))) < 0.2, 0.02, 1.0).float()
    scale = torch.from_numpy(rng.uniform(0.2, 0.6, (candidates, rows))).float()
    zero = torch.from_numpy(rng.uniform(2, 5, (candidates, rows))).float()
    found = code_group(weight, weight, factor, cost, kept, scale, zero, most)
    damped_h = h.double() + 0.1 * torch.eye(g)
    for c in range(candidates):
        for r in range(rows):
            wanted, total = weight[:, r].double().numpy().copy(), 0.0
            for j in range(g):
                code = np.clip(np.round(wanted[j] / float(scale[c, r]) + float(zero[c, r])), 0, most)
                dense = float(scale[c, r]) * (code - float(zero[c, r]))
                assert found.codes[j, c, r] == code
                apart = float(kept[j, r]) < 1
                stored = dense + (float(np.float16(wanted[j] - dense)) if apart else 0.0)
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
    found = code_group(weight, weight, torch.eye(g), torch.ones(g), torch.ones(g, rows), scale, torch.full((3, rows), 7.0), 15)
    choice = torch.tensor([0, 1, 2, 2, 1, 0])
    one = found.chosen(choice)
    for r, c in enumerate(choice):
        assert torch.equal(one.dense[:, r], found.dense[:, c, r]) and one.cost[r] == found.cost[c, r]


@given(seed=st.integers(0, 2**32 - 1), positions=st.integers(1, 20), most=st.sampled_from([7, 15]))
@settings(max_examples=40, deadline=None)
def test_a_fit_is_no_worse_than_rounding_the_whole_range(seed, positions, most):
    generator = torch.Generator().manual_seed(seed)
    target, cost = torch.randn(positions, 16, generator=generator), torch.rand(positions, generator=generator) + 0.1
    scale, zero = fit_groups(target, cost, torch.ones_like(target), most)

    def error(scale, zero):
        codes = (target / scale + zero).round().clamp(0, most)
        return (cost[:, None] * (target - scale * (codes - zero)) ** 2).sum(0)

    high, low = target.amax(0), target.amin(0)
    plain = ((high - low) / most).clamp_min(torch.maximum(high.abs(), low.abs()) / (2 * most))
    assert (scale > 0).all()
    assert (error(scale, zero) <= error(plain, most / 2 - (high + low) / 2 / plain) * 1.001 + 1e-9).all()


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
    group, most = 16, 15
    scores = outlier_scores(weight, cost, group, most)

    def error(values, costs):
        return (max(values) - min(values)) ** 2 * sum(costs) / 12 / most**2 if len(values) else 0.0

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
                    end: before - error([v for p, v in values.items() if p != end], [c for p, c in costs.items() if p != end])
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


def test_damping_of_an_empty_moment_is_positive():
    prepared = damped(torch.zeros(5, 5), 10)
    assert torch.equal(prepared.factor, torch.eye(5)) and (prepared.cost > 0).all()
