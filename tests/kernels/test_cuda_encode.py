"""The encoder's search in CUDA against the CPU's: on a GPU, or compiled for the CPU by tests/helpers/cuda_on_cpu.h."""

import cuda_on_cpu
import numpy as np
import pytest
import torch

from bstack.kernels import cuda, reference
from bstack.kernels.encode import encode_columns
from bstack.kernels.reference import TABLE5


def columns_of(rows, columns, seed, spread=1.0):
    """Return random arguments of `encode_columns`."""
    rng = np.random.default_rng(seed)
    original = rng.standard_normal((columns, rows)) * spread
    scale, weight = rng.uniform(0.01, 0.1, rows) * spread, rng.uniform(0.01, 10, rows)
    feedback = rng.standard_normal((columns, columns)) * 0.3
    arrays = original * 0.9, original, feedback, np.array(TABLE5), scale, weight
    return [torch.from_numpy(array.astype(np.float32)) for array in arrays]


def encode_whole(given):
    """Return codes, errors and targets of the CPU's encoder."""
    target = given[0].clone()
    return *encode_columns(target, *given[1:]), target


def encode_segments(given, turn=0):
    """Return those of the reference of a search in segments."""
    arrays = [array.numpy().copy() for array in given]
    first = cuda.first_segment(given[0].shape[1], turn)
    found = reference.encode_columns(*arrays, first=first, segment=cuda.SEGMENT, margin=cuda.MARGIN)
    return tuple(map(torch.from_numpy, (*found, arrays[0])))


def found(launcher, given, turn=0):
    """Return those of the CUDA kernels, all arrays between fences."""
    arrays = [launcher.fenced(array.numpy()) for array in given]
    return tuple(array.cpu() for array in (*launcher.kernels.encode_columns(*arrays, turn=turn), arrays[0]))


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 5, 15, 16, 17, 31, 33, 97, 256])
def test_one_segment_has_the_bits_of_the_cpu(launcher, rows):
    for columns in (1, 3):
        launcher.backwards = columns == 3
        given = columns_of(rows, columns, rows, spread=(1e-6, 1.0, 1e6)[rows % 3])
        assert same(found(launcher, given, turn=rows % 4), encode_whole(given)), columns


@pytest.mark.parametrize("rows", [257, 259, 300, 320, 321, 768, 2 * 256 + 40])
def test_segments_have_the_bits_of_their_reference(launcher, rows):
    launcher.backwards = bool(rows % 2)
    given = columns_of(rows, 3, rows)
    for turn in (0, rows % 3 + 1):
        assert same(found(launcher, given, turn), encode_segments(given, turn)), turn


def test_segments_meet_elsewhere_in_each_of_four_blocks():
    assert [cuda.first_segment(1000, turn) for turn in range(5)] == [256, 192, 128, 64, 256]
    assert [cuda.first_segment(256, turn) for turn in range(5)] == [256] * 5


def test_equal_costs_are_decided_as_on_the_cpu(launcher):
    """Columns of zeros, and of table values met exactly, where many paths cost the same."""
    rows = 90
    given = columns_of(rows, 2, 0)
    given[0][0] = 0
    given[0][1] = torch.tensor(TABLE5, dtype=torch.float32).repeat(2)[:rows]
    given[4][:] = 1
    given[5][:] = 0
    given[5][::7] = 1
    assert same(found(launcher, given), encode_whole(given))


def test_segments_cost_little():
    """Against a search of whole columns: Gaussian samples, with the scale that the codec uses."""
    rng = np.random.default_rng(0)
    rows, columns = 2048, 6
    x = torch.from_numpy(rng.standard_normal((columns, rows)).astype(np.float32))
    table, scale = torch.tensor(TABLE5, dtype=torch.float32), torch.full((rows,), 0.0229)
    given = [x, x, torch.zeros(columns, columns), table, scale, torch.ones(rows)]
    cut, whole = encode_segments(given)[1], encode_whole(given)[1]
    assert 1 <= float(cut.square().mean() / whole.square().mean()) < 1.01


# What the search may get wrong.
MUTANTS = {
    "no barrier": ("            __syncwarp();\n", ""),
    "segments from any state": ("const int from = start ? __ldg(state + segment) : -1", "const int from = -1"),
    "segments to any state": ("to = stop < rows ? __ldg(state + segment + 1) : -1", "to = -1"),
    "targets without feedback": ("        if (keeps) *own = x;\n", ""),
    "the last of equal costs": ("other == least && its < state", "other == least && its > state"),
    "errors of the column before are not there yet": ("k == column - 1 ? last_error(row) : __ldg(kept)", "__ldg(kept)"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name):
    right, wrong = MUTANTS[name]
    assert cuda.source().count(right) == 1
    mutant = cuda_on_cpu.Launcher(cuda_on_cpu.build(cuda.source().replace(right, wrong)))
    for backwards in (False, True):
        mutant.backwards = backwards
        given = columns_of(300, 3, 1)
        given[5][::5] = 0
        given[5][-40:] = 0
        try:
            if not same(found(mutant, given), encode_segments(given)):
                return
        except AssertionError:
            return
    pytest.fail("nothing shows it")
