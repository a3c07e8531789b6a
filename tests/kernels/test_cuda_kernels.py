"""The CUDA kernels against the reference: on a GPU, or compiled for the CPU by tests/helpers/cuda_on_cpu.h."""

import cuda_on_cpu
import cuda_on_gpu
import numpy as np
import pytest
import torch

from bstack.kernels import cuda, reference
from bstack.kernels.cuda import selftest
from bstack.kernels.matrix import OUTLIERS, PLAIN, ROTATED, SIGN, SPQR, TRELLIS, TRELLIS5, Matrix
from bstack.kernels.selftest import random_payload
from bstack.kernels.spqr import rank_of
from bstack.kernels.table import DeviceMatrix, MatrixTable, Stacked


def difference(launcher, rows, columns, kinds, tokens, seed, absent=()):
    """Return `selftest.difference` of a matrix of random blocks, all arrays between fences; `absent` are kinds of blocks to come."""
    rng = np.random.default_rng(seed)
    launcher.backwards = bool(seed % 2)
    blocks = []
    for kind, rank in kinds:
        rank = min(rank, rows, columns) if kind == SIGN else rank
        count = int(rows * columns * rng.choice([0, 0.05, 1]))
        blocks.append((kind, rank, random_payload(rng, rows, columns, kind, rank, count)))
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    offset = 4 * (seed % 3)  # inputs are then not aligned for loads of four
    matrix = Matrix.of(rows, columns, blocks)
    return selftest.difference(launcher.kernels, matrix, x, lambda array: launcher.fenced(array, offset), absent)


FORMS = [(SPQR, rank_of(bits, group)) for bits in (3, 4) for group in (16, 32, 64, 128)]
KINDS = [(TRELLIS, 2), (TRELLIS5, 2), (SIGN, 1), (SIGN, 16), (OUTLIERS, 0), *FORMS]


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("kind", KINDS[:5] + FORMS[2:8:3], ids=str)
def test_each_kind(launcher, kind, tokens):
    for seed in range(4):
        rng = np.random.default_rng(100 * tokens + seed)
        rows, columns = (int(n) for n in rng.integers(1, (60, 200)))
        if seed % 2:
            columns = -(-columns // 16) * 16
        assert not difference(launcher, rows, columns, [kind], tokens, seed), (rows, columns, seed)


@pytest.mark.parametrize("seed", range(24))
def test_stacks_of_several_kinds(launcher, seed):
    rng = np.random.default_rng(seed)
    kinds = [KINDS[k] for k in rng.integers(0, len(KINDS), rng.integers(0, 4))]
    rows, columns, tokens = (int(n) for n in rng.integers(1, (40, 150, 12)))
    columns = columns if seed % 3 else -(-columns // 16) * 16
    assert not difference(launcher, rows, columns, kinds, tokens, seed), (rows, columns, kinds, tokens)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("columns", [48, 37])
def test_matrices_one_under_the_other(launcher, columns, tokens):
    """One launch for all of them; each has blocks of its own kinds, or none, and others write nothing of it."""
    rng = np.random.default_rng(columns + tokens)
    table, together, expected, size = MatrixTable(9, launcher.device), [], [], []
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    rotated = reference.rotate(x)
    cases = [
        (7, [KINDS[1]]),
        (1, []),
        (90, [KINDS[0], KINDS[1]]),
        (20, [FORMS[2], KINDS[4]]),
        (8, [KINDS[2], KINDS[1]]),
    ]
    for place, (rows, kinds) in enumerate(cases):
        blocks = [(kind, rank, random_payload(rng, rows, columns, kind, rank, 9)) for kind, rank in kinds]
        matrix = Matrix.of(rows, columns, blocks)
        together.append(DeviceMatrix(rows, columns, table, place))
        for level, (kind, rank) in enumerate(kinds):
            address = launcher.fenced(matrix.payload(level)).data_ptr()
            together[-1].put(level, kind, rank, address, checked=True)
        together[-1].count = len(kinds)
        weights = [reference.decode_rows(matrix, own, 0, rows) for own in (ROTATED, PLAIN)]
        expected.append(sum(given.astype(np.float64) @ w.T for given, w in zip((rotated, x), weights, strict=True)))
        size.append(sum(np.abs(given) @ np.abs(w.T) for given, w in zip((rotated, x), weights, strict=True)))
    stacked = Stacked(together)
    out = torch.full((tokens, stacked.rows + 2), torch.nan, device=launcher.device)
    launcher.launched.clear()
    launcher.kernels.multiply(stacked, launcher.fenced(x), launcher.fenced(rotated), out[:, 1:-1])
    assert sum(name.startswith("multiply_rotated") for name in launcher.launched) == 1
    assert (np.abs(out[:, 1:-1].cpu().numpy() - np.concatenate(expected, 1)) <= 1e-5 * np.concatenate(size, 1)).all()
    assert out[:, [0, -1]].isnan().all()


@pytest.mark.parametrize("kinds", [[], [KINDS[1]], [KINDS[2]], [FORMS[2], KINDS[4]], [FORMS[5], KINDS[0]]], ids=str)
@pytest.mark.parametrize("absent", [[TRELLIS5], [OUTLIERS], [SIGN, TRELLIS, SPQR]], ids=str)
def test_kinds_that_are_not_in_memory(launcher, kinds, absent):
    """What is launched follows from the whole stack; kernels whose kinds have no block add nothing, and the first one writes."""
    for columns, tokens in ((48, 1), (37, 3)):
        assert not difference(launcher, 21, columns, kinds, tokens, 0, absent), (columns, tokens)


def test_more_than_a_thread_block_takes_at_once(launcher):
    """More rows than a grid, more words in a row than threads, more inputs than fit shared memory."""
    for kind, rows, columns, tokens in (
        (KINDS[1], 130, 2112, 1),
        (KINDS[0], 70, 2064, 8),
        (FORMS[7], 300, 700, 8),
        (FORMS[0], 20, 4200, 1),
        (SIGN, 140, 70, 2),
        (KINDS[4], 300, 50, 1),
    ):
        kind = (SIGN, 3) if kind == SIGN else kind
        assert not difference(launcher, rows, columns, [kind], tokens, 0), (kind, rows, columns)


@pytest.mark.parametrize("columns", [40, 37, cuda.CHUNK + 19])
@pytest.mark.parametrize("kinds", [KINDS[:2], FORMS[2:3] + KINDS[4:5], [FORMS[1], (SIGN, 3)]], ids=str)
def test_rows_are_decoded_straight_to_their_type(launcher, kinds, columns, monkeypatch):
    """Each number is rounded once, and none is converted afterwards; rows may come twice."""
    rng = np.random.default_rng(columns)
    blocks = [(kind, rank, random_payload(rng, 21, columns, kind, rank, 99)) for kind, rank in kinds]
    expected = Matrix.of(21, columns, blocks)
    matrix = DeviceMatrix(21, columns, MatrixTable(1, launcher.device), 0)
    for level, (kind, rank) in enumerate(kinds):
        matrix.put(level, kind, rank, launcher.fenced(expected.payload(level)).data_ptr(), checked=True)
    matrix.count, own = len(kinds), ROTATED if kinds == KINDS[:2] else PLAIN
    index = torch.tensor([20, 0, 7, 20], device=launcher.device)
    single = launcher.kernels.decode(matrix, own, index, torch.float32)
    wanted = torch.from_numpy(reference.decode_rows(expected, own, 0, 21))[index.cpu()]
    assert torch.allclose(single.cpu(), wanted, rtol=1e-5, atol=1e-5)
    rounded = {dtype: single.to(dtype) for dtype in (torch.float16, torch.bfloat16)}
    unchanged = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, dtype: unchanged(x, dtype) if x.dtype == dtype else None)
    assert all(torch.equal(launcher.kernels.decode(matrix, own, index, dtype), rounded[dtype]) for dtype in rounded)
    assert launcher.kernels.decode(matrix, own, index[:0], torch.float16).shape == (0, columns)


@pytest.mark.parametrize("columns", [1, 2, 6, 48, 80, 96, 1024, 3 * 4096, 2 * 8192, 4 * 8192])
def test_rotations(launcher, columns):
    kernels = launcher.kernels
    x = np.random.default_rng(columns).standard_normal((3, columns)).astype(np.float32)
    assert selftest.rotations_agree(kernels, x, lambda array: launcher.fenced(array, 4))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        given = launcher.fenced(x).to(dtype)
        expected = launcher.fenced(reference.rotate(given.float().cpu().numpy()))
        assert torch.equal(kernels.rotate(given), expected)
        assert torch.equal(kernels.rotate(given, dtype), expected.to(dtype))


def test_numbers_are_rounded_as_torch_does(launcher):
    values = torch.tensor(
        [1e38, -3e-8, torch.inf, -torch.inf, 65519, 65520, 1 + 2**-8, 1 + 3 * 2**-8, 2**-25, 2**-24, 0]
    )
    kernels = launcher.kernels
    for dtype in (torch.float16, torch.bfloat16):
        signed = torch.from_numpy(reference.rotate(values[:, None].numpy()))  # one column has a sign alone
        assert torch.equal(kernels.rotate(launcher.fenced(values[:, None].numpy()), dtype).cpu(), signed.to(dtype))
    assert kernels.rotate(torch.full((1, 1), torch.nan, device=launcher.device), torch.bfloat16).isnan().all()


def test_what_launches_on_a_gpu_finds_writes_outside_of_arrays():
    """Tried with the CPU's kernels."""
    launcher = cuda_on_gpu.Launcher(torch.device("cpu"), cuda_on_cpu.launcher().kernels.launch)
    assert not difference(launcher, 21, 48, [KINDS[1], KINDS[4]], 3, 1) and launcher.launched
    launcher.remove_fences()
    for place in (-1, 8):
        launcher.fenced(np.zeros(2, np.float32), 4)
        memory, start, _ = launcher._memory[-1]
        memory[start + place] = 0
        with pytest.raises(AssertionError, match="outside"):
            launcher.remove_fences()


def test_the_self_test_passes_and_runs_every_kernel(launcher):
    launcher.launched.clear()
    assert selftest.failure(launcher.kernels, launcher.device) == ""
    assert launcher.launched == set(cuda.KERNELS)


# What a kernel may get wrong, and the matrix that shows it: rows, columns, kind, tokens, seed.
MUTANTS = {
    "no barrier after the table": (
        "table->at[window][1][lane] = four;\n    }\n    __syncthreads();",
        "table->at[window][1][lane] = four;\n    }",
        (9, 48, 1, 1, 0),
    ),
    "no barrier after the sums": (
        "lane * all / 32] = sum;\n        __syncthreads();\n",
        "lane * all / 32] = sum;\n",
        (70, 2048, 1, 1, 0),
    ),
    "a code row too low": ("codes[4] ^ codes[2] ^ codes[0]", "codes[4] ^ codes[2] ^ codes[1]", (9, 48, 1, 1, 0)),
    "a word behind the last row": ("codes[r] = r < below ?", "codes[r] = r <= below ?", (5, 160, 1, 1, 0)),
    "a wrong lane of the fold": ("lane * all / 32] = sum", "(lane * all / 32 ^ 1)] = sum", (9, 48, 0, 1, 0)),
    "zeros of a tile's other half": ("five[1] >> 16 | five[2] << 16", "five[2] >> 8", (20, 40, 5, 1, 0)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name):
    right, wrong, (rows, columns, kind, tokens, seed) = MUTANTS[name]
    assert cuda.source().count(right) == 1
    mutant = cuda_on_cpu.Launcher(cuda_on_cpu.build(cuda.source().replace(right, wrong)))
    with pytest.raises(AssertionError):
        assert not difference(mutant, rows, columns, [KINDS[kind]], tokens, seed)
