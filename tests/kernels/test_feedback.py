"""The feedback between groups of columns, of floats and of bytes, against double precision."""

import numpy as np
import pytest
import torch

from bstack.kernels import feedback
from bstack.kernels.feedback import feedback_of
from bstack.kernels.native import CHOICES, library, set_threads, threads
from bstack.kernels.reference import TABLE5, places

OFFERING = ["reference"]
if library() is not None:
    used = library().bstack_instructions()
    for name in CHOICES[1:]:
        if library().bstack_use(name.encode()) == 0 and library().bstack_feedback_offers():
            OFFERING.append(name)
    library().bstack_use(used)


@pytest.fixture(params=OFFERING)
def instructions(request, monkeypatch):
    monkeypatch.setattr(feedback, "NARROW", 0)
    if request.param == "reference":
        monkeypatch.setattr(feedback, "library", lambda: None)
        monkeypatch.setattr(feedback, "COLUMNS_MULTIPLIED", 128)
        yield request.param
        return
    before = library().bstack_instructions()
    assert library().bstack_use(request.param.encode()) == 0
    yield request.param
    library().bstack_use(before)


def upper(n: int, seed: int) -> torch.Tensor:
    """Columns of very different sizes, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    factor = (torch.randn(n, n, generator=generator) * 10.0 ** torch.linspace(-6, 2, n)).triu_(1)
    factor[:, n // 2] = 0
    factor.diagonal().fill_(1)
    return factor.t().contiguous().t()  # as `factorise` leaves it


def run(factor: torch.Tensor, m: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Return what is found, and what double precision finds; at last the sizes that rounding is relative to."""
    n = len(factor)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, n, generator=generator) * torch.rand(m, 1, generator=generator)
    codes = torch.randint(0, 4, (n, 4 + m), dtype=torch.uint8, generator=generator)
    scale, product = torch.rand(m, generator=generator) + 0.1, torch.randn(n, m, generator=generator)
    values = torch.tensor(TABLE5, dtype=torch.float32)[places(codes.t()).t().int()] * scale
    tested = feedback_of(factor)
    tested.begin(scale)
    kept, found = product.clone(), []
    for start in range(0, n, 64):
        part = slice(start, start + 64)
        assert torch.equal(tested.inside(start), factor[part, part])
        found.append(tested.targets(product, start))
        tested.add(start, codes[part], -values[part])
    assert torch.equal(product, kept)
    outside = factor.double()
    for start in range(0, n, 64):
        outside[start : start + 64, start : start + 64] = 0
    expected = product - outside.t() @ values.double()
    size = product.abs() + outside.abs().amax(0)[:, None] * values.double().square().sum(0).sqrt()
    whole = (rows.double() @ factor.double()).t()
    whole_size = factor.abs().amax(0)[:, None] * rows.double().square().sum(1).sqrt()
    return [torch.cat(found), tested.product(rows)], [expected, whole], [size, whole_size]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 64), (33, 65), (70, 300), (290, 700)])
def test_it_is_as_exact_as_single_precision(m, n, instructions):
    for found, expected, size in zip(*run(upper(n, n), m, m), strict=True):
        assert found.shape == (n, m)
        assert ((found - expected).abs() <= 1e-6 * size).all()


def test_a_factor_lies_in_memory_as_it_likes(instructions):
    one, two = upper(200, 1), upper(200, 1).contiguous()
    assert one.is_contiguous() != two.is_contiguous()
    for found, expected in zip(run(one, 20, 1)[0], run(two, 20, 1)[0], strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
def test_sums_of_very_many_columns_do_not_overflow(instructions):
    """Bytes of the largest size, more than 32 bits would hold."""
    n, m = 256 * 64 + 70, 3
    factor = torch.ones(n, n).triu_()
    tested = feedback_of(factor)
    found = tested.product(torch.full((m, n), -1.0))
    assert torch.allclose(found, -torch.arange(1.0, n + 1)[:, None].expand(n, m), rtol=1e-6)


def test_threads_do_not_change_the_bits(monkeypatch):
    monkeypatch.setattr(feedback, "NARROW", 0)
    if len(OFFERING) == 1:
        pytest.skip("no instruction set here multiplies these bytes")
    before, count, found = library().bstack_instructions(), threads(), []
    try:
        for name in OFFERING[1:]:
            for number in (1, 3):
                library().bstack_use(name.encode())
                set_threads(number)
                found.append(np.concatenate([part.numpy().ravel() for part in run(upper(300, 1), 600, 2)[0]]))
    finally:
        library().bstack_use(before)
        set_threads(count)
    assert all(other.tobytes() == found[0].tobytes() for other in found)
