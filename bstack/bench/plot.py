"""A bench report as a plot: quality against megabytes."""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import bstk
from bstack.bench.results import Report, frontier
from bstack.errors import require
from bstk import MB
from bstk.atomic import replacing

__all__ = ["FORMATS", "check_plot", "save_plot"]

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's colours, which people with any colour vision can tell apart.
OURS, THEIRS, GREY = "#0072B2", {"gptq": "#D55E00", "rtn": "#009E73", "spqr": "#CC79A7"}, "#555555"
NAMES = {"spqr": "SpQR"}
MARKERS = {"gptq": "s", "rtn": "^", "spqr": "D"}
# A baseline is not drawn if its perplexity is so many times the worst of the file's sizes.
BROKEN = 4


def check_plot(path: str | os.PathLike[str]) -> None:
    """Check that the plot can be drawn, before hours of measuring."""
    if Path(path).suffix.lower().lstrip(".") not in FORMATS:
        raise bstk.UsageError(
            f"{os.fspath(path)}: the name of a plot must end in {', '.join('.' + f for f in FORMATS)}."
        )
    require("A plot", "bench", ["matplotlib"])


def save_plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw the report's quality; the file appears whole or not at all."""
    check_plot(path)
    import matplotlib

    picture = io.BytesIO()
    # The same report gives the same bytes. Letters in an SVG stay letters: as paths they would be most of the file.
    with matplotlib.rc_context({"svg.hashsalt": "bstack", "svg.fonttype": "none", "font.size": 10}):
        figure = _draw(report)
        kind = Path(path).suffix.lower().lstrip(".")
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(picture, format=kind, dpi=160, metadata=dates)
    with replacing(path) as (sink, _):
        sink.write(picture.getbuffer())


def _draw(report: Report) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 8.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    source = report.source
    name = source.model or source.file
    t = source.text or {}
    upper.set_title(name, loc="left", fontsize=12, fontweight="bold")
    upper.set_title(f"{t['name']}, {t['windows']} × {t['sequence_length']} tokens", loc="right", fontsize=9, color=GREY)
    _curve(upper, report, "kld")
    # Without bars: all sizes are measured on the same windows, so their errors go together.
    _curve(lower, report, "perplexity", bars=False)
    floor = source.original and source.original.noise_floor.kld
    if floor and 0 < floor.value < math.inf:
        upper.axhline(floor.value, color=GREY, linestyle=":", label="noise floor: the original in bfloat16")
    original = _original_perplexity(report)
    if original:
        lower.axhline(original, color=GREY, linestyle="--", label=f"original: {original:.4g}")
    upper.set_ylabel(f"KL divergence from the {source.reference}\nnats per token, ± standard error")
    lower.set_ylabel("perplexity")
    lower.set_xlabel("size of the file, MB (2²⁰ bytes)")
    for axes in (upper, lower):
        axes.set_yscale("log")
    _leave_out_broken(lower, report)
    for axes in (upper, lower):
        _label_axis(axes)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
        axes.grid(True, which="minor", color="#eeeeee", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    lines, labels = upper.get_legend_handles_labels()
    # Curves first, then the floor, which is drawn as a plain line.
    order = sorted(range(len(lines)), key=lambda i: labels[i].startswith("noise"))
    upper.legend([lines[i] for i in order], [labels[i] for i in order], frameon=False, loc="upper right", fontsize=9)
    if original:
        lower.legend(frameon=False, loc="upper right", fontsize=9)
    return figure


def _original_perplexity(report: Report) -> float | None:
    """Return the original's perplexity if it can be drawn."""
    original = report.source.original
    value = original.quality.perplexity.value if original is not None else math.inf
    return value if value < math.inf else None


def _curve(axes: Any, report: Report, figure: str, *, bars: bool = True) -> None:
    ours = [(p.file_bytes / MB, getattr(p.measured.quality, figure)) for p in report.points]
    ours += [(c.point.file_bytes / MB, getattr(c.point.measured.quality, figure)) for c in report.comparisons]
    name = "bstack: one file, cut" if bars else None
    _line(axes, ours, bars, color=OURS, marker="o", label=name, markersize=4.5, linewidth=1.8, zorder=3)
    series = defaultdict(list)
    for b in frontier(report.baselines):
        series[b.method].append(b)
    for method, members in series.items():
        pairs = [(b.sizes.file_bytes / MB, getattr(b.quality, figure)) for b in members]
        _line(
            axes,
            pairs,
            bars,
            color=THEIRS.get(method, GREY),
            marker=MARKERS.get(method, "x"),
            linestyle="--",
            linewidth=1.2,
            label=f"{NAMES.get(method, method.upper())}, one run a size" if bars else None,
            markersize=5.5,
            markerfacecolor="white",
        )


def _leave_out_broken(axes: Any, report: Report) -> None:
    """End the axis of perplexities above this file's own, because a broken baseline at a million would flatten the others."""
    original = _original_perplexity(report)
    ours = [q.perplexity.value for p in report.points if (q := p.measured.quality) and q.perplexity.value < math.inf]
    theirs = [b.quality.perplexity.value for b in frontier(report.baselines)]
    top = BROKEN * max(ours, default=math.inf)
    above = sum(value > top for value in theirs)
    if above:
        axes.set_ylim(0.9 * min([*ours, *([original] if original else [])]), top)
        words = "1 baseline above" if above == 1 else f"{above} baselines above"
        axes.annotate(words, (0.01, 0.97), xycoords="axes fraction", va="top", fontsize=9, color=GREY)


def _line(axes: Any, pairs: list[tuple[float, Any]], bars: bool, **style: Any) -> None:
    # A logarithmic axis has neither 0 (the full file against itself) nor infinity.
    kept = sorted({x: e for x, e in pairs if 0 < e.value < math.inf}.items())
    if kept:
        xs, estimates = zip(*kept, strict=True)
        values = [e.value for e in estimates]
        # Downwards at most half of the value, so that the bar ends on the axis.
        lengths = [[min(e.error or 0, e.value / 2) for e in estimates], [e.error or 0 for e in estimates]]
        axes.errorbar(xs, values, yerr=lengths if bars else None, elinewidth=1, capsize=2, **style)


def _label_axis(axes: Any) -> None:
    """Label a logarithmic axis in plain numbers, also between the powers of ten where there are few of these."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    decades = math.log10(high / low) if low > 0 else 9
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3.5 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=30))
    axes.yaxis.set_minor_locator(LogLocator(base=10, subs=tuple(range(2, 10)), numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value:.0e}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
