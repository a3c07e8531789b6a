"""A bench report as tables for people and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from bstack.bench.quality import Quality
from bstack.bench.results import Dense, Point, Report
from bstack.bench.speed import Rate, Running, Speed
from bstack.eval.estimates import Estimate
from bstk import MB, mb_text

__all__ = ["as_csv", "as_tables", "with_error"]

Row = list[str]


def with_error(value: float, error: float | None, sign: str = "±") -> str:
    """Return a value and its error with as many decimals as two digits of the error need; inf and nan as they are.

    >>> with_error(36.0824, 1.2345), with_error(0.07263, 0.00119), with_error(12.5, None)
    ('36.1 ± 1.2', '0.0726 ± 0.0012', '12.5')
    """
    if not math.isfinite(value):
        return f"{value}"
    if error is None or not math.isfinite(error) or error == 0:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 8 or abs(value) >= 1e7:
        return f"{value:.3g} {sign} {error:.2g}"
    return f"{value:.{decimals}f} {sign} {error:.{decimals}f}"


def as_tables(report: Report, sign: str = "±") -> str:
    """Return the report as text: a head, tables in Markdown (as llama-bench writes them), notes."""
    parts = [_head(report)]
    if report.source.text is not None:
        parts.append("Quality\n" + _quality(report, sign))
    if any(point.measured.tasks for point in report.points):
        parts.append("Tasks\n" + _tasks(report, sign))
    if all(point.measured.running for point in report.points):
        parts.append(("Speed and memory\n" if _speed(report) else "Memory\n") + _running(report, sign))
    if report.baselines:
        parts.append("Baselines, one run for each size\n" + _baselines(report, sign))
    if report.comparisons:
        parts.append("At the same bytes\n" + _comparisons(report, sign))
    if report.notes:
        parts.append("\n".join(f"Note: {note}" for note in report.notes))
    return "\n\n".join(parts)


def _head(report: Report) -> str:
    source = report.source
    about = [source.model or "", f"{source.parameters / 1e6:,.1f} M parameters" if source.parameters else ""]
    lines = [", ".join([source.file, *filter(None, about)])]
    if source.text is not None:
        t = source.text
        windows = f"first {t['windows']} windows of {t['sequence_length']} tokens"
        lines.append(f"  text       {t['name']} (SHA-256 {t['sha256'][:12]}), {windows}")
    if source.original:
        lines.append(
            f"  original   {source.original.model}, {source.original.bytes / MB:,.2f} MB as it is stored, "
            f"perplexity {source.original.quality.perplexity.value:.4g}"
        )
        floor = source.original.noise_floor.kld
        lines.append(
            f"  floor      KLD {'-' if floor is None else f'{floor.value:.2g}'}: the original in bfloat16 against itself "
            "in float32"
        )
    if speed := _speed(report):
        lines.append(
            f"  speed      greedy, one sequence, {speed.threads} threads; packed weights, {speed.kernels} kernels, "
            f"{speed.engine} engine"
        )
    started = [p.measured.running.start_memory_bytes for p in report.points if p.measured.running]
    if started:
        lines.append(
            f"  memory     over the {started[0] / MB:,.0f} MB of a process that has imported torch and transformers"
        )
    return "\n".join(lines)


def _speed(report: Report) -> Speed | None:
    running = report.points[0].measured.running
    return None if running is None else running.speed


def _quality(report: Report, sign: str) -> str:
    to = "original" if report.source.reference == "original" else "full file"
    head = ["MB", "file MB", "weights MB", "bits/weight", *_quality_head(to)]
    return _markdown(head, [[*_sizes(p), *_quality_cells(p.measured.quality, sign)] for p in report.points])


def _quality_head(to: str) -> Row:
    return ["perplexity", f"KLD to {to}", "KLD 99 %", "same top %"]


def _quality_cells(quality: Quality | None, sign: str) -> Row:
    if quality is None:
        return ["-"] * 4
    figures = [quality.perplexity, quality.kld, quality.kld_99]
    return [*[_estimate(figure, sign) for figure in figures], _estimate(quality.same_top, sign, 100)]


def _tasks(report: Report, sign: str) -> str:
    names = list(dict.fromkeys(name for point in report.points for name in point.measured.tasks))
    rows = [
        [mb_text(point.budget), *[_estimate(point.measured.tasks.get(name), sign) for name in names]]
        for point in report.points
    ]
    return _markdown(["MB", *names], rows)


def _running(report: Report, sign: str) -> str:
    with_sizes, speed = report.source.text is None, _speed(report)
    base = report.dense[-1] if report.dense else None
    head = ["MB", *(["file MB", "weights MB", "bits/weight"] if with_sizes else []), "load s", "memory MB", "peak MB"]
    if speed is not None:
        # Ratios are to the last row: the original where there is one.
        ratio = ["ratio"] if base is not None else []
        head += [f"prompt({speed.prompt_tokens}) t/s", *ratio, f"decode({speed.decoded_tokens}) t/s", *ratio]
    rows = []
    for point in report.points:
        sizes = _sizes(point) if with_sizes else [mb_text(point.budget)]
        rows.append([*sizes, *_running_cells(point.measured.running, base, sign)])
    for dense in report.dense:
        empty = ["", "", ""] if with_sizes else []
        rows.append([f"{dense.name}, float32", *empty, *_running_cells(dense.running, base, sign)])
    return _markdown(head, rows)


def _running_cells(running: Running | None, base: Dense | None, sign: str) -> Row:
    if running is None:
        return ["-"] * 3
    cells = ["-" if running.load_seconds is None else f"{running.load_seconds:.2f}"]
    cells += [f"{size / MB:,.0f}" for size in (running.held_memory_bytes, running.peak_memory_bytes)]
    if running.speed is not None:
        theirs = base.running.speed if base is not None else None
        for test in ("prompt", "decode"):
            rate: Rate = getattr(running.speed, test)
            cells.append(with_error(rate.value, rate.deviation, sign))
            if theirs is not None:
                cells.append(f"{rate.value / getattr(theirs, test).value:.2f}")
    return cells


def _baselines(report: Report, sign: str) -> str:
    head = ["baseline", "bits", "embeddings", "file MB", "weights MB", *_quality_head("original")]
    rows = []
    for b in report.baselines:
        sizes = [_size(b.sizes.file_bytes), _size(b.sizes.memory_bytes)]
        rows.append([b.method, b.width, f"{b.embedding_bits or '-'}", *sizes, *_quality_cells(b.quality, sign)])
    return _markdown(head, rows, left=1)


def _comparisons(report: Report, sign: str) -> str:
    head = ["baseline", "its MB", "its KLD", "bstack MB", "bstack KLD", "its KLD / bstack's"]
    rows = []
    for c in report.comparisons:
        quality = c.point.measured.quality
        theirs, ours = c.baseline.quality.kld, None if quality is None else quality.kld
        ratio = f"{theirs.value / ours.value:.2f}" if theirs and ours and ours.value > 0 else "-"
        their_cells = [c.baseline.name, _size(c.baseline.sizes.file_bytes), _estimate(theirs, sign)]
        rows.append([*their_cells, _size(c.point.file_bytes), _estimate(ours, sign), ratio])
    return _markdown(head, rows, left=1)


def _sizes(point: Point) -> Row:
    bits = "-" if point.bits_per_weight is None else f"{point.bits_per_weight:.3f}"
    return [mb_text(point.budget), _size(point.file_bytes), _size(point.memory_bytes), bits]


def _size(size: int) -> str:
    return f"{size / MB:,.{2 if size >= 10 * MB else 4}f}"


def _estimate(e: Estimate | None, sign: str, factor: float = 1) -> str:
    return "-" if e is None else with_error(e.value * factor, None if e.error is None else e.error * factor, sign)


def _markdown(head: Sequence[str], rows: Sequence[Row], left: int = 0) -> str:
    """Return an aligned Markdown table; the first `left` columns are aligned to the left."""
    widths = [max(3, *(len(line[i]) for line in [head, *rows])) for i in range(len(head))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [cell.ljust(widths[i]) if i < left else cell.rjust(widths[i]) for i, cell in enumerate(line)]
        for line in [head, rule, *rows]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(report: Report) -> str:
    """Return all points and baselines as CSV, one row each, sizes in bytes, empty where there is no value."""
    figures = ("perplexity", "kld", "kld_99", "same_top")
    tasks = list(dict.fromkeys(name for point in report.points for name in point.measured.tasks))
    columns = ["series", "budget_mb", "file_bytes", "memory_bytes", "bits_per_weight", *_with_errors(figures)]
    columns += ["reference", "load_seconds", "start_memory_bytes", "held_memory_bytes", "peak_memory_bytes"]
    columns += ["prompt_tokens_per_second", "prompt_sd", "decode_tokens_per_second", "decode_sd", *_with_errors(tasks)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    reference = report.source.reference or ""
    for point in report.points:
        flat = point.to_json()
        row = {key: flat[key] for key in columns if key in flat and not isinstance(flat[key], dict)}
        row |= _rates(flat) | _flat(flat, figures) | _flat(flat["tasks"], tasks)
        writer.writerow({"series": "bstack", "reference": reference, **row})
    for dense in report.dense:
        flat = dense.to_json()
        row = {key: flat[key] for key in columns if flat.get(key) is not None}
        writer.writerow({"series": f"{dense.name}, float32", **row, **_rates(flat)})
    for baseline in report.baselines:
        flat = baseline.to_json()
        sizes = {key: flat[key] for key in ("file_bytes", "memory_bytes")}
        writer.writerow({"series": baseline.series, "reference": reference, **sizes, **_flat(flat, figures)})
    return text.getvalue()


def _with_errors(names: Sequence[str]) -> list[str]:
    return [column for name in names for column in (name, f"{name}_se")]


def _rates(values: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for test in ("prompt", "decode"):
        if rate := (values.get("speed") or {}).get(test):
            found |= {f"{test}_tokens_per_second": rate["value"], f"{test}_sd": rate["deviation"]}
    return found


def _flat(values: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    found: dict[str, float | None] = {}
    for name in names:
        if values.get(name):
            found |= {name: values[name]["value"], f"{name}_se": values[name]["standard_error"]}
    return {key: value for key, value in found.items() if value is not None}
