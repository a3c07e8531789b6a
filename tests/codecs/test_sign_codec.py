"""The sign codec against the paper, written out plainly in float64 with full singular value decompositions."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import bstk
from bstack.codecs import codec_of_kind, make_codec
from bstack.codecs.sign import RANKS, SignCodec, channel_norms, choose_rank
from bstack.numerics.hessian import output_errors
from bstack.settings import PRESETS, Settings
from bstk.errors import UsageError


def gram(inputs: int, seed: int = 0, tokens: int = 64) -> torch.Tensor:
    """X^T X of uneven channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    return x.t() @ x


def blocks_of(codec: SignCodec, weight: torch.Tensor, hessian: torch.Tensor):
    return list(codec.encode(weight, hessian, 10**6, torch.ones(weight.shape[0])))


def rebuilt(blocks, shape, depth) -> torch.Tensor:
    chosen = blocks[:depth]
    if not chosen:
        return torch.zeros(shape)
    return SignCodec.rebuild([b.payload for b in chosen], [b.kind for b in chosen], [b.rank for b in chosen], shape)


def oracle(weight: np.ndarray, scale: np.ndarray, rank: int, planes: int) -> list[np.ndarray]:
    """The approximation after each plane: BitStack (arXiv 2410.23918), section 3, equations of the decomposition."""
    residual, total, result = weight.copy(), np.zeros_like(weight), []
    for _ in range(planes):
        signs = np.where(residual >= 0, 1.0, -1.0)
        u, s, vt = np.linalg.svd(np.abs(residual * scale), full_matrices=False)
        # Half precision where the paper stores it; the singular values are shared evenly between both factors.
        root = np.sqrt(s[:rank])
        u16 = (u[:, :rank] * root).astype(np.float16).astype(np.float64)
        v16 = (vt[:rank].T * root / scale[:, None]).astype(np.float16).astype(np.float64)
        total = total + signs * (u16 @ v16.T)
        residual = weight - total
        result.append(total)
    return result


@pytest.mark.parametrize("shape", [(96, 64), (48, 130), (65, 65)])
def test_paper_preset_agrees_with_the_oracle(shape):
    """Rank 16, 16 planes."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) * 0.02 * (1 + torch.rand(shape[0], 1, generator=generator))
    hessian = gram(shape[1])
    scale = channel_norms(hessian)
    codec = make_codec(PRESETS["paper"])
    assert (codec.rank, codec.planes) == (16, 16)
    blocks = blocks_of(codec, weight, hessian)
    wanted = oracle(weight.double().numpy(), scale.double().numpy(), 16, 16)
    whole = (weight * scale).double().norm()

    # The first plane's signs are the weight's own, so the products can be compared number by number. Half precision
    # rounds each factor by up to 2^-11 of its size, two factors by 2^-10, about 1e-3; block iteration leaves the last of
    # the 16 directions turned by a few percent where neighbouring singular values are nearly equal. What both together
    # move is 1 % of the matrix at most.
    first = rebuilt(blocks, shape, 1).double() * scale
    assert (first - torch.from_numpy(wanted[0]) * scale).norm() < 0.01 * whole

    # Later planes see residuals whose smallest numbers have either sign by rounding, so only what is left is compared.
    # Each plane is within 0.5 % of the best one (the next tests), which compounds, and the luck of the signs comes on
    # top: 1 % is allowed for each plane so far, measured about .4 %; and 1e-7 of the matrix, for the codec works in float32.
    for depth, approximation in enumerate(wanted, 1):
        ours = float(((weight - rebuilt(blocks, shape, depth)) * scale).double().norm() / whole)
        best = np.linalg.norm((weight.double().numpy() - approximation) * scale.double().numpy()) / float(whole)
        assert ours == pytest.approx(best, rel=0.01 * depth, abs=1e-7), depth
    assert ours < 1e-3


def check_each_block(weight: torch.Tensor, hessian: torch.Tensor, rank: int, planes: int) -> None:
    """Every block removes what the best block of its rank would, within 0.5 % of the norm that stays."""
    scale = channel_norms(hessian).double()
    blocks = blocks_of(SignCodec(planes=planes, rank=rank), weight, hessian)
    assert len(blocks) == planes
    whole = (weight.double() * scale).norm()
    for depth in range(planes):
        before = (weight.double() - rebuilt(blocks, weight.shape, depth).double()) * scale
        after = (weight.double() - rebuilt(blocks, weight.shape, depth + 1).double()) * scale
        k = blocks[depth].rank
        assert k == min(rank, *weight.shape)
        exact = torch.linalg.svdvals(before.abs())[k:].norm()
        # Beside the 0.5 %: the rounding of the half-precision factors, 2^-10 of what was there; its steps of 2^-24 where a
        # factor is tiny, times the other factor, which is about the square root of the product; and float32, in which
        # the codec works, 1e-6 of the matrix.
        steps = 2.0**-24 * 2 * k * (before / scale).abs().max().sqrt() * len(weight) ** 0.5 * scale.norm()
        rounding = 2.0**-10 * before.norm() + steps + 1e-6 * whole
        assert after.norm() <= 1.005 * exact + rounding
        # Nobody can do better but by luck of the rounding.
        assert after.norm() >= exact - rounding


def structured(kind: str, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    m, n = shape
    noise = torch.randn(shape, generator=generator)
    match kind:
        case "random":
            return noise
        case "heavy tails":
            return noise**3
        case "low rank":
            return torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator) + 0.01 * noise
        case "row and column scales":
            return noise * torch.logspace(-2, 2, m)[:, None] * torch.logspace(2, -2, n)
        case "mostly zero columns":
            return noise * (torch.arange(n) % 7 == 3)
        case "blocks":
            return noise * ((torch.arange(m)[:, None] * 4 // m) == (torch.arange(n) * 4 // n))
        case "diagonal":
            return torch.eye(m, n) * noise
        case "steps":
            return (torch.arange(m)[:, None] + torch.arange(n)).float() % 5 - 2
        case "constant":
            return torch.full(shape, -0.37)
        case "zeros":
            return torch.zeros(shape)


KINDS = [
    "random",
    "heavy tails",
    "low rank",
    "row and column scales",
    "mostly zero columns",
    "blocks",
    "diagonal",
    "steps",
    "constant",
    "zeros",
]


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    rank=st.sampled_from([1, 2, 5, 16]),
    exponent=st.sampled_from([-6, -3, 0, 3]),
    seed=st.integers(0, 2**20),
)
def test_blocks_are_near_the_best_of_their_rank(kind, m, n, rank, exponent, seed):
    weight = structured(kind, (m, n), torch.Generator().manual_seed(seed)) * 10.0**exponent
    check_each_block(weight, gram(n, seed), rank, planes=3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (1, 7), (9, 1), (2, 65)])
@pytest.mark.parametrize("rank", [1, 16, "auto"])
def test_thin_matrices(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    hessian = gram(shape[1])
    blocks = blocks_of(SignCodec(planes=4, rank=rank), weight, hessian)
    assert all(1 <= b.rank <= min(shape) for b in blocks)
    # One row or column: its magnitudes are of rank 1, so a block is exact but for half precision.
    if min(shape) == 1:
        assert (rebuilt(blocks, shape, 2) - weight).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [4, "auto"])
def test_a_larger_matrix_of_a_slow_spectrum(rank):
    """As in real layers: |W| is one large direction and a long flat tail, the hardest for block iteration."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(300, 200, generator=generator)
    hessian = gram(200)
    rank = choose_rank(weight * channel_norms(hessian)) if rank == "auto" else rank
    check_each_block(weight, hessian, rank, planes=3)


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_row_errors_are_those_of_what_rebuild_gives(kind, m, n, seed):
    weight = structured(kind, (m, n), torch.Generator().manual_seed(seed))
    hessian = gram(n, seed)
    blocks = blocks_of(SignCodec(planes=5, rank="auto"), weight, hessian)
    whole = output_errors(weight, hessian).double().sqrt()
    for depth, block in enumerate(blocks, 1):
        residual = weight.double() - rebuilt(blocks, weight.shape, depth).double()
        exact = ((residual @ hessian.double()) * residual).sum(1).clamp_min(0).sqrt()
        # Both sums are made in float32, in another order: 1e-5 of what the row was, as an error of the square root.
        assert block.row_errors.shape == (m,) and (block.row_errors >= 0).all()
        assert ((block.row_errors.double().sqrt() - exact).abs() <= 1e-3 * exact + 1e-5 * (whole.max() + 1e-30)).all()


def test_errors_fall_with_every_block():
    weight, hessian = torch.randn(60, 44, generator=torch.Generator().manual_seed(2)), gram(44)
    errors = [float(b.row_errors.sum()) for b in blocks_of(SignCodec(planes=10), weight, hessian)]
    # The more a residual looks like noise, the less one plane can say of it: factors of .35 at first, .77 at last.
    assert all(b < 0.85 * a for a, b in itertools.pairwise(errors))
    assert errors[2] < 0.2 * errors[0]


def test_an_encoder_repeats_itself_and_leaves_its_arguments_alone():
    weight, hessian = torch.randn(30, 20, generator=torch.Generator().manual_seed(2)), gram(20)
    before = weight.clone(), hessian.clone()
    first, second = (blocks_of(SignCodec(planes=3), weight, hessian) for _ in range(2))
    assert [b.payload for b in first] == [b.payload for b in second]
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_payload_layout():
    """Read by hand as format/SPEC.md draws it: signs row by row, least significant bit first, then U, then V."""
    weight = torch.randn(5, 11, generator=torch.Generator().manual_seed(4))
    block = blocks_of(SignCodec(planes=1, rank=2), weight, gram(11))[0]
    assert (block.kind, block.rank) == (bstk.SIGN, 2)
    assert len(block.payload) == 5 * 2 + 2 * 2 * (5 + 11)
    for i in range(5):
        for j in range(16):
            bit = block.payload[2 * i + j // 8] >> (j % 8) & 1
            assert bit == (weight[i, j] >= 0 if j < 11 else 0)
    u = np.frombuffer(block.payload, "<f2", 10, offset=10).reshape(5, 2).astype(np.float64)
    v = np.frombuffer(block.payload, "<f2", 22, offset=30).reshape(11, 2).astype(np.float64)
    by_hand = np.where(weight.numpy() >= 0, 1, -1) * (u @ v.T)
    assert np.allclose(rebuilt([block], (5, 11), 1).numpy(), by_hand, rtol=1e-6, atol=1e-7)


def test_zero_counts_as_plus():
    weight = torch.tensor([[0.0, -0.0, -1.0], [1.0, 0.0, 0.0]])
    block = blocks_of(SignCodec(planes=1, rank=1), weight, torch.eye(3))[0]
    assert list(block.payload[:2]) == [0b011, 0b111]


def test_a_matrix_of_zeros_stays_zero():
    blocks = blocks_of(SignCodec(planes=3), torch.zeros(20, 17), gram(17))
    assert all(b.rank == 1 for b in blocks)
    assert torch.equal(rebuilt(blocks, (20, 17), 3), torch.zeros(20, 17))


def test_channels_that_calibration_never_saw_keep_their_weights():
    """Coarse, not nothing: another text may use them."""
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(6))
    hessian = gram(30)
    hessian[7] = hessian[:, 7] = 0
    blocks = blocks_of(SignCodec(planes=8, rank=4), weight, hessian)
    column = rebuilt(blocks, weight.shape, 8)[:, 7]
    assert (column - weight[:, 7]).norm() < 0.5 * weight[:, 7].norm()
    # And with no calibration at all, every channel counts the same.
    assert torch.equal(channel_norms(torch.zeros(4, 4)), torch.ones(4))


def test_blocks_do_not_depend_on_the_unit_of_the_inputs():
    weight, hessian = torch.randn(32, 24, generator=torch.Generator().manual_seed(8)), gram(24)
    reference = rebuilt(blocks_of(SignCodec(planes=3, rank=3), weight, hessian), weight.shape, 3)
    for factor in (1e-8, 1e8):
        other = rebuilt(blocks_of(SignCodec(planes=3, rank=3), weight, hessian * factor), weight.shape, 3)
        # Equal but for rounding, which may turn the sign of a number next to nothing in the second and third plane.
        assert (other - reference).norm() < 0.01 * weight.norm()


# The rank that is chosen.


def brute_force(scaled: torch.Tensor) -> dict[int, float]:
    """Fall of the logarithm of the squared error per bit, for each rank."""
    m, n = scaled.shape
    squares = torch.linalg.svdvals(scaled.double().abs()).square()
    left = {k: float(squares[k:].sum() / squares.sum()) for k in RANKS if k <= min(m, n)}
    return {k: -np.log(max(rest, 2**-22)) / (m * n + 16 * k * (m + n)) for k, rest in left.items()}


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS[:-1]), m=st.integers(2, 90), n=st.integers(2, 90), seed=st.integers(0, 2**20))
def test_auto_rank_is_the_best_by_brute_force(kind, m, n, seed):
    scaled = structured(kind, (m, n), torch.Generator().manual_seed(seed))
    if not scaled.any():
        return
    scores = brute_force(scaled)
    # Block iteration sees the residual norm within 0.5 %: its choice may be another one that is as good within 3 %.
    assert scores[choose_rank(scaled)] >= 0.97 * max(scores.values())


def test_auto_rank_of_cases_that_are_clear():
    generator = torch.Generator().manual_seed(0)
    # The magnitudes of independent numbers are one direction and noise: more rank buys next to nothing.
    assert choose_rank(torch.randn(200, 150, generator=generator)) == 1
    # Magnitudes of exactly rank 4 with four equally strong directions: a fourth halves nothing less than everything.
    blocks = torch.block_diag(*[torch.ones(60, 50)] * 4) + 0.001 * torch.rand(240, 200, generator=generator)
    assert choose_rank(blocks) == 4
    assert choose_rank(torch.zeros(8, 8)) == 1


@pytest.mark.parametrize("rank", [0, -1, 257, "often", 2.5, None])
def test_ranks_that_are_none(rank):
    with pytest.raises(UsageError, match="1 to 256, or auto"):
        SignCodec(rank=rank)


@pytest.mark.parametrize("planes", [0, -3, 65])
def test_planes_that_are_none(planes):
    with pytest.raises(UsageError, match="1 to 64"):
        SignCodec(planes=planes)


def test_the_bounds_themselves_are_allowed():
    assert SignCodec(planes=64, rank=256).settings() == {"codec": "sign", "planes": 64, "rank": 256}
    assert SignCodec(planes=1, rank=1).settings() == {"codec": "sign", "planes": 1, "rank": 1}


def test_registry():
    assert codec_of_kind(bstk.SIGN) is SignCodec
    with pytest.raises(UsageError, match=r"codec is .zip.; allowed are .*sign"):
        make_codec(Settings(codec="zip"))
