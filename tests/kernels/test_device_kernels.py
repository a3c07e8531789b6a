"""The Triton kernels against the reference, under Triton's interpreter where there is no GPU."""
# ruff: noqa: E402 - Triton may be missing

import pytest
import torch

pytest.importorskip("triton", "3.6")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bstack.kernels import device, reference
from bstack.kernels.matrix import OUTLIERS, PLAIN, ROTATED, SIGN, SPQR, TRELLIS, TRELLIS5, Matrix
from bstack.kernels.selftest import random_payload
from bstack.kernels.spqr import rank_of
from bstack.kernels.table import DeviceMatrix, MatrixTable


def pair(rows, columns, kinds, seed):
    """The same matrix for the reference and for the device."""
    random = np.random.default_rng(seed)
    payloads = []
    for kind, rank in kinds:
        rank = min(rank, rows, columns) if kind == SIGN else rank
        count = int(rows * columns * random.choice([0, 0.05, 1]))
        payloads.append((kind, rank, random_payload(random, rows, columns, kind, rank, count)))
    table = MatrixTable(3, torch.device(DEVICE))
    matrix = DeviceMatrix(rows, columns, table, 1)
    offset = seed % 3 * 4
    # The matrix knows addresses alone: what is there must live as long.
    matrix.tensors = [
        torch.frombuffer(bytearray(offset) + payload, dtype=torch.uint8).to(DEVICE) for _, _, payload in payloads
    ]
    for level, ((kind, rank, _), tensor) in enumerate(zip(payloads, matrix.tensors, strict=True)):
        matrix.put(level, kind, rank, tensor.data_ptr() + offset, checked=True)
    matrix.count = len(payloads)
    return Matrix.of(rows, columns, payloads), matrix


FORMS = st.builds(rank_of, st.sampled_from([3, 4]), st.sampled_from([16, 32, 64, 128]))
KINDS = st.lists(
    st.one_of(
        st.just((TRELLIS, 2)),
        st.just((TRELLIS5, 2)),
        st.tuples(st.just(SIGN), st.integers(1, 5)),
        st.tuples(st.just(SPQR), FORMS),
        st.just((OUTLIERS, 0)),
    ),
    min_size=0,
    max_size=3,
)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 20), columns=st.integers(1, 130), kinds=KINDS, tokens=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_against_the_reference(rows, columns, kinds, tokens, seed):
    expected, matrix = pair(rows, columns, kinds, seed)
    x = np.random.default_rng(seed).normal(size=(tokens, columns)).astype(np.float32)
    rotated = reference.rotate(x)
    out = torch.full((tokens, rows), torch.nan, device=DEVICE)
    device.multiply(matrix, torch.from_numpy(x).to(DEVICE), torch.from_numpy(rotated).to(DEVICE), out)
    index = torch.randint(0, rows, (7,), generator=torch.Generator().manual_seed(seed))
    total = np.zeros((tokens, rows))
    for kinds, given_inputs in ((ROTATED, rotated), (PLAIN, x)):
        dense = reference.decode_rows(expected, kinds, 0, rows)
        found = device.decode(matrix, kinds, index.to(DEVICE), torch.float32).cpu().numpy()
        assert np.allclose(found, dense[index], rtol=1e-5, atol=1e-4 * np.abs(dense).max())
        total += given_inputs.astype(np.float64) @ dense.T
    assert np.allclose(out.cpu().numpy(), total, rtol=1e-4, atol=1e-4 * np.abs(total).max())


def test_blocks_come_and_go():
    expected, matrix = pair(20, 64, [(TRELLIS, 2), (TRELLIS5, 2), (TRELLIS5, 2)], 0)
    index = torch.arange(20, device=DEVICE)
    for count in (3, 1, 0, 2):
        matrix.count = expected.count = count
        found = device.decode(matrix, ROTATED, index, torch.float32).cpu().numpy()
        dense = reference.decode_rows(expected, ROTATED, 0, 20)
        assert np.allclose(found, dense, atol=1e-4 * np.abs(dense).max())


def test_levels_that_are_not():
    _, matrix = pair(4, 8, [(TRELLIS, 2)], 0)
    for level, kind, rank in ((16, TRELLIS, 2), (-1, TRELLIS, 2), (0, 9, 2), (0, SIGN, 17)):
        with pytest.raises(ValueError):
            matrix.put(level, kind, rank, 0)
    with pytest.raises(ValueError, match="multiples of 4"):
        matrix.put(0, TRELLIS, 2, 6)
