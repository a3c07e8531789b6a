import itertools
from decimal import Decimal

import pytest

import bstk
from bstack.bench.options import even_budgets, parse_budgets


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("60", "60"),
        ("60,80", "60 80"),
        (" 60 , 80 ", "60 80"),
        ("80,60", "80 60"),
        ("60,80,100-200+20", "60 80 100 120 140 160 180 200"),
        ("100-199+20", "100 120 140 160 180"),
        ("62.5", "62.5"),
        (".5", "0.5"),
        ("3.", "3"),
        ("0.1-0.3+0.1", "0.1 0.2 0.3"),  # 0.1 + 0.1 + 0.1 is more than 0.3 in binary
        ("64-512*2", "64 128 256 512"),
        ("10-20*1.5", "10 15"),
        ("60,60,60.0", "60"),
        ("60-80+20,80-100+20", "60 80 100"),
        ("5-5+1", "5"),
        ("007", "7"),
    ],
)
def test_sizes(text, sizes):
    assert parse_budgets(text) == [int(Decimal(size) * bstk.MB) for size in sizes.split()]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "60,",
        ",60",
        "abc",
        "60 MB",
        "60MB",
        "-60",
        "+60",
        "1e3",
        "0x10",
        "nan",
        "inf",
        "60;80",
        "60 80",
        "0",
        "0.0",
        "0-10+1",
        "0-10*2",
        "100-200",
        "100-200+",
        "100-+20",
        "-200+20",
        "100-200-20",
        "100-200/2",
        "100--200+20",
        "1_000",
        "200-100+20",
        "100-200+0",
        "100-200*1",
        "100-200*0.5",
        "100-200*0",
        "1-2+0.0001",
        "1-5000+1",
        "٣",
        "1.2.3",
        "60,80,x",
    ],
)
def test_no_sizes(text):
    with pytest.raises(bstk.UsageError) as caught:
        parse_budgets(text)
    assert caught.value.exit_code == 2
    # The message shows what was wrong, or what would be right.
    assert "'" in str(caught.value) or "such as" in str(caught.value)


def test_too_many_sizes_stop_early():
    with pytest.raises(bstk.UsageError, match="more than 1000 sizes"):
        parse_budgets("1-99999999999999999999999999+0.0000000001")


class File:
    """As much of a reader as the sizes need: a cut is its length."""

    even_cuts = bstk.Reader.even_cuts

    def __init__(self, lengths):
        self.lengths = lengths
        self.base = bstk.Cut(0, lengths[0], lengths[0])
        self.model = self.fit()

    def fit_bytes(self, budget):
        chunks = max((i for i, length in enumerate(self.lengths) if length <= budget), default=0)
        return bstk.Cut(chunks, self.lengths[chunks], self.lengths[chunks])

    def fit(self, mb=None):
        return self.fit_bytes(10**18 if mb is None else bstk.budget_bytes(mb))


def test_even_sizes_run_from_the_smallest_to_the_whole():
    file = File([20 * bstk.MB + 123457 * i for i in range(700)])
    sizes = even_budgets(file)
    assert len(sizes) == 10 and sizes == sorted(sizes)
    assert all(size == bstk.budget_bytes(f"{size / bstk.MB:.2f}") for size in sizes)
    cuts = [file.fit_bytes(size) for size in sizes]
    assert cuts[0] == file.base and cuts[-1] == file.fit()
    steps = [b - a for a, b in itertools.pairwise(sizes)]
    assert max(steps) - min(steps) < bstk.MB / 4  # one block and the rounding


def test_even_sizes_of_a_tiny_file_are_exact():
    file = File([1000, 1100, 1250])
    sizes = even_budgets(file)
    assert [file.fit_bytes(size).file_bytes for size in sizes] == [1000, 1100, 1250]
    assert even_budgets(File([1000])) == [bstk.budget_bytes("0.01")]
