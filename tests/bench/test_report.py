"""Tables and pictures of reports made by hand."""

import importlib.util
import json
import math
from dataclasses import replace

import pytest

import bstk
from bstack.bench.plot import save_plot
from bstack.bench.quality import Quality
from bstack.bench.results import Baseline, Comparison, Dense, Measured, Original, Point, Report, Sizes, Source
from bstack.bench.speed import Rate, Running, Speed
from bstack.bench.tables import as_csv, as_tables
from bstack.eval.estimates import Estimate

MB = 2**20


def quality(perplexity, kld):
    return Quality(Estimate(perplexity, 1.0), Estimate(kld, kld / 10), Estimate(kld * 3), Estimate(0.9, 0.01))


def running(decode, held=80 * MB, load=0.5):
    speed = Speed(512, 64, Rate(100.0, 1.0), Rate(decode, 2.0), 2, "avx2", "native")
    return Running(load, 350 * MB, held, held + 20 * MB, speed)


@pytest.fixture
def report():
    text = {"name": "text", "sha256": "0" * 64, "windows": 2, "sequence_length": 8}
    original = Original("m", MB, Quality(Estimate(30.0)), Quality(Estimate(30.0), Estimate(1e-3)))
    points = [
        Point(mb * MB, mb * MB, mb * MB, 4.0, Measured(running(60.0, mb * MB), quality(ppl, kld), {}))
        for mb, ppl, kld in ((40, 50.0, 0.5), (80, 33.0, 0.05))
    ]
    dense = [Dense("file", 80 * MB, running(21.0, 500 * MB)), Dense("original", None, running(20.0, 400 * MB, None))]
    baselines = [
        Baseline("rtn", bits, 8, Sizes(mb * MB, mb * MB), quality(ppl, kld))
        for bits, mb, ppl, kld in ((2, 50, 1e6, 9.0), (4, 79, 45.0, 0.3))
    ]
    return Report(Source("a.bstk", "00", "m", 10**6, text, "original", original), points, dense, baselines)


def test_ratios_are_to_the_original(report):
    lines = as_tables(report).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Speed and memory"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 1 : first + 7]]
    assert cells[0] == ["MB", "load s", "memory MB", "peak MB", "prompt(512) t/s", "ratio", "decode(64) t/s", "ratio"]
    assert cells[2] == ["40", "0.50", "40", "60", "100.0 ± 1.0", "1.00", "60.0 ± 2.0", "3.00"]
    assert cells[4] == ["file, float32", "0.50", "500", "520", "100.0 ± 1.0", "1.00", "21.0 ± 2.0", "1.05"]
    assert cells[5] == ["original, float32", "-", "400", "420", "100.0 ± 1.0", "1.00", "20.0 ± 2.0", "1.00"]
    assert "over the 350 MB of a process" in as_tables(report) and "avx2 kernels, native engine" in as_tables(report)


@pytest.mark.parametrize("typed", ["80.1", "0.03", "62.3"])
def test_sizes_are_named_as_they_were_typed(report, typed):
    point = replace(report.points[0], budget=bstk.budget_bytes(typed))
    report = replace(report, points=[point])
    assert point.to_json()["budget_mb"] == float(typed)
    assert f"bstack,{typed}," in as_csv(report) and f"| {typed} |" in as_tables(report).replace("  ", "")


def test_csv_leaves_out_what_was_not_measured(report):
    import csv
    import io

    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert [row["series"] for row in rows][2:4] == ["file, float32", "original, float32"]
    assert rows[0]["held_memory_bytes"] == str(40 * MB) and rows[3]["load_seconds"] == ""


def test_a_broken_baseline_does_not_flatten_the_picture(report):
    pytest.importorskip("matplotlib")
    from bstack.bench.plot import _draw

    upper, lower = _draw(report).axes
    assert lower.get_ylim() == pytest.approx((27.0, 200.0)) and lower.texts[0].get_text() == "1 baseline above"
    assert upper.get_ylim()[1] > 9


def test_an_unbroken_picture_shows_everything(report):
    pytest.importorskip("matplotlib")
    from bstack.bench.plot import _draw

    _, lower = _draw(replace(report, baselines=report.baselines[1:])).axes
    assert lower.get_ylim()[1] > 50 and not lower.texts


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_figures_that_are_not_finite_are_shown(report, broken, tmp_path):
    """Once they had been measured for hours, they crashed the report."""
    bad = Quality(*[Estimate(broken, broken)] * 4)
    original = replace(report.source.original, quality=bad, noise_floor=bad)
    baselines = [replace(b, quality=bad) for b in report.baselines]
    for points in (
        report.points,
        [
            replace(p, measured=replace(p.measured, quality=bad, tasks={"t acc": Estimate(broken)}))
            for p in report.points
        ],
    ):
        comparisons = [Comparison(b, p) for b in baselines for p in points]
        spoilt = Report(replace(report.source, original=original), points, report.dense, baselines, comparisons)
        tables = as_tables(spoilt)
        assert f"perplexity {broken}" in tables and f"KLD {broken}:" in tables and f" {broken} |" in tables
        assert str(broken) not in as_csv(spoilt)
        values = json.loads(json.dumps(spoilt.to_json(), allow_nan=False))
        assert values["original"]["original"]["perplexity"] == {"value": None, "standard_error": None}
        assert Baseline.from_plain(json.loads(json.dumps(baselines[0].to_plain()))).name == baselines[0].name
        if importlib.util.find_spec("matplotlib"):
            save_plot(spoilt, tmp_path / "broken.svg")
            assert (tmp_path / "broken.svg").stat().st_size


@pytest.mark.parametrize(
    ("context", "expected"), [(None, (512, 64)), (577, (512, 64)), (128, (113, 14)), (4, (3, 1)), (2, (1, 1))]
)
def test_speed_test_fits_the_context(context, expected):
    from bstack.bench.speed import _lengths

    prompt, decoded = _lengths(context)
    assert (prompt, decoded) == expected and (context is None or context < 3 or prompt + decoded < context + 1)
