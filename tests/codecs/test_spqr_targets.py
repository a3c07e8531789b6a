"""How many outliers SpQR takes: shares and targets of a layer, what shapes allow, and settings that make no sense."""

import math
import re
from contextlib import nullcontext

import pytest
import torch
from codec_inputs import gaussian, hessian, outlier_count

import bstk
from bstack.codecs import make_codec
from bstack.codecs.spqr import SpqrCodec, range_of
from bstack.settings import Settings
from bstk.errors import UsageError

# A layer together


def layer(seeds=(1, 2, 3)):
    shapes = [(48, 64), (96, 64), (64, 112)]
    return [
        (gaussian(m, n, seed), hessian(n, seed), 1000, torch.full((m,), 10.0**-seed))
        for seed, (m, n) in zip(seeds, shapes, strict=True)
    ]


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
    low = bits_used([list(SpqrCodec(outliers=0, planes=0).encode(*task)) for task in tasks], weights)
    codec = SpqrCodec(bpw=low, planes=1).for_layer(tasks)
    blocks = [list(codec.encode(*task)) for task in tasks]
    assert (
        all([b.kind for b in some] == [bstk.SPQR, bstk.TRELLIS] for some in blocks)
        and bits_used(blocks, weights) == low
    )
    codec = SpqrCodec(bpw=low + 0.15, planes=0).for_layer(tasks)
    blocks = [list(codec.encode(*task)) for task in tasks]
    assert [len(some) for some in blocks] == [2, 1, 1]
    assert low + 0.1 < bits_used(blocks, weights) <= low + 0.15


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
    tasks = [*layer(), (torch.full((32, 64), 0.5), hessian(64), 1000, torch.ones(32))]
    codec = SpqrCodec(planes=1).for_layer(tasks)
    kinds = [[b.kind for b in codec.encode(*task)] for task in tasks]
    assert kinds[0] == [bstk.SPQR, bstk.OUTLIERS, bstk.TRELLIS] and kinds[3] == [bstk.SPQR, bstk.TRELLIS]


def test_a_budget_below_what_a_layer_takes_is_refused_with_the_least():
    with pytest.raises(UsageError, match=r"take 4\.8750 bits per weight without any outlier.*or take 3 bits"):
        SpqrCodec(4, bpw=4.7).for_layer(layer())


# What shapes allow


def encoded_range(bits, group, shapes):
    """Bits per weight without outliers and with as many as there can be, of what the encoder writes."""
    found = []
    for fraction in (0, 0.5):
        blocks = [
            list(SpqrCodec(bits, group, fraction, planes=0).encode(gaussian(m, n, m), hessian(n), 1000, torch.ones(m)))
            for m, n in shapes
        ]
        found.append(bits_used(blocks, sum(m * n for m, n in shapes)))
    return found


@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 32)])
@pytest.mark.parametrize("shapes", [[(48, 64), (16, 80)], [(97, 81)], [(112, 48)]])
def test_the_range_is_that_of_what_is_encoded(bits, group, shapes):
    low, high = range_of(shapes, bits, group)
    found = encoded_range(bits, group, shapes)
    assert found[0] == pytest.approx(low) and low < found[1] <= high
    if not any(n % group for _, n in shapes):
        assert found[1] > 0.98 * high  # an outlier that adds nothing is left out
    layers = [[[shape] for shape in shapes]]
    for bpw in (low, (low + high) / 2):
        SpqrCodec(bits, group, bpw=bpw).check_shapes(layers)
    for bpw in (low - 0.001, high + 0.001):
        with pytest.raises(UsageError, match=rf"at least {math.ceil(1000 * low) / 1000:g} bits.*Allowed is"):
            SpqrCodec(bits, group, bpw=bpw).check_shapes(layers)


def test_the_range_named_is_good_for_every_layer_and_every_reading_of_the_shapes():
    layers = [[[(64, 64)], [(64, 256), (256, 64)]], [[(32, 64)]]]
    with pytest.raises(UsageError, match="Allowed is ") as refused:
        SpqrCodec(bpw=4.7).check_shapes(layers)
    low, high = re.search(r"Allowed is ([\d.]+) to ([\d.]+)\.", str(refused.value)).groups()
    for bpw in (float(low), float(high)):
        SpqrCodec(bpw=bpw).check_shapes(layers)
        for shapes in ([(64, 64), (64, 256)], [(64, 64), (256, 64)], [(32, 64)]):
            low, high = range_of(shapes, 4, 16)
            assert low <= bpw <= high
    # What only one of the readings rules out is left to the layer.
    low, likely = (range_of([(64, 64), shape], 4, 16).min for shape in ((256, 64), (64, 256)))
    SpqrCodec(bpw=(low + likely) / 2).check_shapes(layers[:1])


def test_a_layer_without_matrices_rules_nothing_out():
    codec = SpqrCodec(bpw=5.0)
    codec.check_shapes([])
    codec.check_shapes([[], [[(64, 64)]]])
    assert codec.for_layer([]).bpw == 5.0
    assert SpqrCodec().for_layer([]).outliers == "auto"


def test_matrices_too_small_for_any_target():
    with pytest.raises(UsageError, match="No value is possible: leave it out, or choose another group"):
        SpqrCodec(group=128, bpw=12).check_shapes([[[(16, 16)]]])


@pytest.mark.parametrize(("group", "bpw", "advised"), [(128, 4.09, False), (16, 4.65, True)])
def test_fewer_bits_are_advised_where_they_can_have_the_target(group, bpw, advised):
    layers = [[[(512, 512)]]]
    with pytest.raises(UsageError, match=r"Allowed is [\d.]+ to [\d.]+\." + (" Or take 3 bits.$" if advised else "$")):
        SpqrCodec(group=group, bpw=bpw).check_shapes(layers)
    with nullcontext() if advised else pytest.raises(UsageError):
        SpqrCodec(3, group=group, bpw=bpw).check_shapes(layers)


def test_widths_that_16_bits_do_not_reach_are_refused_by_shape():
    SpqrCodec().check_shapes([[[(70000, 64), (64, 70000)]]])  # it may be the outputs that are so many
    with pytest.raises(UsageError, match="70000 inputs"):
        SpqrCodec().check_shapes([[[(64, 70000)]]])


# Settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bits": 2}, "3 or 4"),
        ({"group": 20}, "16, 32, 64 or 128"),
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
        (
            {"bits": 3, "group": 128, "bpw": 100.0},
            r"with 3 bits in groups of 128.*more than 3.07812, up to about 3.82812.$",
        ),
        ({"bpw": 5.0, "outliers": 0.01}, "outliers is 0.01 and bpw is 5.0; give one"),
        ({"bpw": 5.0, "outliers": 0}, "give one"),
        ({"rank": 4}, "belongs to the sign codec"),
    ],
)
def test_settings_out_of_range_are_refused(given, words):
    with pytest.raises(UsageError, match=words):
        make_codec(Settings(codec="spqr", **given)).check_shapes([])


@pytest.mark.parametrize("codec", ["trellis", "sign"])
@pytest.mark.parametrize("given", [{"bits": 4}, {"group": 16}, {"outliers": "auto"}, {"bpw": 5.0}])
def test_other_codecs_refuse_its_settings(codec, given):
    with pytest.raises(UsageError, match=f"{codec} codec has none; it belongs to the spqr codec"):
        make_codec(Settings(codec=codec, **given))


def test_settings_are_recorded():
    assert make_codec(Settings(codec="spqr")).settings() == {
        "codec": "spqr",
        "bits": 4,
        "group": 16,
        "outliers": "auto",
        "bpw": None,
        "planes": 2,
    }
    assert make_codec(Settings(codec="spqr", bits=3, bpw=4.0, planes=0)).settings() == {
        "codec": "spqr",
        "bits": 3,
        "group": 16,
        "outliers": None,
        "bpw": 4.0,
        "planes": 0,
    }


def test_auto_outliers_are_those_of_the_target():
    tasks = layer()
    said, unsaid = (make_codec(Settings(codec="spqr", bpw=5.9, planes=0, outliers=given)) for given in ("auto", None))
    assert said.settings() == unsaid.settings()
    assert (
        said.for_layer(tasks).threshold == unsaid.for_layer(tasks).threshold != SpqrCodec().for_layer(tasks).threshold
    )


def test_more_inputs_than_16_bits_reach_are_refused():
    wide = torch.zeros(1, 65536)
    with pytest.raises(UsageError, match=r"65536 inputs.*Use the trellis codec"):
        next(SpqrCodec().encode(wide, torch.zeros(1, 1), 1, torch.ones(1)))
