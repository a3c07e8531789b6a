"""Products with packed parameters against plain tensors, through the functions that models call."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from bstack.codecs.sign import SignCodec
from bstack.codecs.spqr import SpqrCodec
from bstack.codecs.trellis import TrellisCodec
from bstack.kernels.matrix import Matrix
from bstack.packed.lock import PriorityLock
from bstack.packed.matrix import FEW, Blocks, Table
from bstack.packed.weight import PackedWeight

CODECS = {
    "trellis": TrellisCodec(2),
    "sign": SignCodec(planes=3, rank=2),
    "spqr": SpqrCodec(3, outliers=0.05, planes=1),
    "spqr, no outliers": SpqrCodec(3, outliers=0, planes=1),
}


def matrix(rows, columns, seed, codec="trellis"):
    """A matrix and its dense weights."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    hessian = torch.eye(columns) * 100
    blocks = list(CODECS[codec].encode(weight, hessian, 100, torch.ones(rows)))
    made = Matrix.of(rows, columns, [(b.kind.code, b.rank, b.payload) for b in blocks])
    dense = CODECS[codec].rebuild(
        [b.payload for b in blocks], [b.kind for b in blocks], [b.rank for b in blocks], (rows, columns)
    )
    return made, dense


def packed(rows, columns, codec="trellis", transposed=False, dtype=torch.float32):
    """A parameter in two parts, and its dense weights."""
    cut = max(1, rows // 3)
    parts = [matrix(cut, columns, 0, codec)] + ([matrix(rows - cut, columns, 1, codec)] if rows > cut else [])
    dense = torch.cat([dense for _, dense in parts])
    weight = PackedWeight(Blocks([m for m, _ in parts], PriorityLock()), transposed, dtype, "w")
    return weight, (dense.t() if transposed else dense).to(dtype)


def close(found, expected, dense, x, dtype=torch.float32):
    """Inputs are rounded to 16 bits, the results to their type."""
    assert found.shape == expected.shape and found.dtype == dtype
    scale = dense.abs().float().norm() * x.float().norm(dim=-1).max() if x.numel() else 1
    step = 1e-3 if dtype == torch.float32 else 3e-2
    return bool(((found.float() - expected.float()).abs() <= step * scale).all())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    tokens=st.sampled_from([0, 1, 2, FEW, FEW + 1, 30]),
    codec=st.sampled_from(sorted(CODECS)),
    seed=st.integers(0, 99),
)
def test_linear(rows, columns, tokens, codec, seed):
    weight, dense = packed(rows, columns, codec)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    bias = torch.randn(rows)
    assert close(functional.linear(x, weight), functional.linear(x, dense), dense, x)
    assert close(functional.linear(x, weight, bias), functional.linear(x, dense, bias), dense, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 48), (2, 3, 48), (2, 20, 48), (48,)])
def test_shapes_and_types(dtype, shape):
    weight, dense = packed(37, 48, dtype=dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = functional.linear(x, weight)
    assert close(found, functional.linear(x, dense), dense, x, dtype)


def test_transposed_ones():
    weight, dense = packed(30, 48, transposed=True)
    x, bias = torch.randn(5, 48), torch.randn(30)
    assert weight.shape == (48, 30)
    for operation in (
        lambda w: x @ w,
        lambda w: torch.matmul(x, w),
        lambda w: torch.addmm(bias, x, w),
        lambda w: torch.mm(x, w),
        lambda w: functional.linear(x, w.t()),
        lambda w: functional.linear(x, w.T, bias),
        lambda w: functional.linear(x, w.transpose(0, 1)),
    ):
        assert close(operation(weight), operation(dense), dense, x)


X = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(30, generator=torch.Generator().manual_seed(1))
KEYWORDS = {
    "linear": lambda w: functional.linear(input=X, weight=w.t(), bias=BIAS),
    "linear-weight": lambda w: functional.linear(X, weight=w.t()),
    "matmul": lambda w: torch.matmul(input=X, other=w),
    "Tensor.matmul": lambda w: X.matmul(other=w),
    "mm": lambda w: torch.mm(input=X, mat2=w),
    "Tensor.mm": lambda w: X.mm(mat2=w),
    "addmm": lambda w: torch.addmm(input=BIAS, mat1=X, mat2=w, beta=1, alpha=1),
    "t": lambda w: functional.linear(X, torch.t(input=w)),
    "transpose": lambda w: functional.linear(X, torch.transpose(input=w, dim0=0, dim1=1)),
    "Tensor.transpose": lambda w: functional.linear(X, w.transpose(dim0=0, dim1=-1)),
    "embedding": lambda w: functional.embedding(input=torch.tensor([3, 29]), weight=w.t(), padding_idx=0, sparse=False),
}
WITHOUT_A_PACKED_FORM = {
    "matmul": lambda w: torch.matmul(X, w, out=torch.empty(5, 30)),
    "mm": lambda w: torch.mm(X, w, out=torch.empty(5, 30)),
    "addmm": lambda w: torch.addmm(BIAS, X, w, beta=2, alpha=0.5),
    "addmm-out": lambda w: torch.addmm(BIAS, X, w, out=torch.empty(5, 30)),
    "embedding": lambda w: functional.embedding(torch.tensor([3, 29]), w.t(), max_norm=1.0),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_torchs_own_keywords(name):
    weight, dense = packed(30, 48, transposed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # packed
        found = KEYWORDS[name](weight)
    assert close(found, KEYWORDS[name](dense), dense, X)


@pytest.mark.filterwarnings("ignore:The model.s code applies")
@pytest.mark.parametrize("name", WITHOUT_A_PACKED_FORM)
def test_other_arguments_get_the_dense_weights(name):
    weight, dense = packed(30, 48, transposed=True)
    assert close(WITHOUT_A_PACKED_FORM[name](weight), WITHOUT_A_PACKED_FORM[name](dense), dense, X)


def test_embedding():
    weight, dense = packed(40, 24)
    ids = torch.tensor([[0, 39, 13], [12, 14, 0]])
    found = functional.embedding(ids, weight, 0)
    assert torch.allclose(found, functional.embedding(ids, dense), atol=1e-4) and found.shape == (2, 3, 24)
    assert functional.embedding(ids[:, :0], weight).shape == (2, 0, 24)


def test_experts():
    parts = [matrix(20, 16, seed) for seed in range(3)]
    lock = PriorityLock()
    weight = PackedWeight([Blocks([m], lock) for m, _ in parts], False, torch.float32, "experts")
    assert weight.shape == (3, 20, 16)
    x = torch.randn(4, 16)
    for index in (0, 2, torch.tensor(1)):
        dense = parts[int(index)][1]
        assert close(functional.linear(x, weight[index]), functional.linear(x, dense), dense, x)


def test_an_operation_without_a_packed_form_is_right_and_says_so():
    weight, dense = packed(12, 16)
    with pytest.warns(RuntimeWarning, match="which has no packed form"):
        assert torch.allclose(weight.abs().sum(), dense.abs().sum(), rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        weight.abs()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_tables_of_half_precision(stored):
    table = torch.randn(70, 24).to(stored)
    weight = PackedWeight(Table(table), False, torch.float32, "t")
    x = torch.randn(2, 3, 24)
    assert torch.allclose(functional.linear(x, weight), functional.linear(x, table.float()), atol=1e-5)
    assert torch.equal(functional.embedding(torch.tensor([3, 69]), weight), table[[3, 69]].float())


def test_depth_may_change_between_two_products():
    made, _ = matrix(20, 32, 0)
    weight = PackedWeight(Blocks([made], PriorityLock()), False, torch.float32, "w")
    x = torch.randn(1, 32)
    whole = functional.linear(x, weight)
    made.count = 1
    assert not torch.equal(functional.linear(x, weight), whole)
    made.count = 2
    assert torch.equal(functional.linear(x, weight), whole)
    made.count = 0
    assert not functional.linear(x, weight).any() and not np.any(weight.rebuilt().numpy())
