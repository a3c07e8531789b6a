"""Several .bstk files of one model at equal bytes: a table and a picture, from reports of bstack bench.

    for codec in sign trellis spqr; do
      bstack bench $codec.bstk --original MODEL --text wiki.test.raw --budgets 60,75,90,105 --no-speed --json > $codec.json
    done
    python benchmarks/compare.py sign.json trellis.json spqr.json --plot docs/codecs.svg

A report's file name, without its ending, is the name of its line. A file that does not reach down to a size has no figure there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73")
MARKERS = "so^D"


def read(path: Path) -> dict[float, dict[str, Any]]:
    """Points of a report by budget in MB."""
    return {point["budget_mb"]: point for point in json.loads(path.read_text())["points"]}


def table(reports: dict[str, dict[float, dict[str, Any]]]) -> str:
    """KLD and bits per weight at each budget, in Markdown."""
    lines = [
        "| MB | " + " | ".join(f"{name}: KLD | bits" for name in reports) + " |",
        "|---|" + "---|---|" * len(reports),
    ]
    for budget in sorted(set().union(*reports.values())):
        cells = []
        for points in reports.values():
            point = points.get(budget)
            kld = None if point is None else point["kld"]
            cells += (
                ["", ""]
                if point is None
                else [f"{kld['value']:.3g} ± {kld['standard_error']:.2g}", f"{point['bits_per_weight']:.2f}"]
            )
        lines.append(f"| {budget:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(reports: dict[str, dict[float, dict[str, Any]]], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, points), colour, marker in zip(reports.items(), COLOURS, MARKERS, strict=False):
        sizes, divergences = zip(*((p["file_bytes"] / 2**20, p["kld"]["value"]) for p in points.values()), strict=True)
        axes.plot(sizes, divergences, marker=marker, color=colour, label=name)
    axes.set(yscale="log", xlabel="file, MB of $2^{20}$ bytes", ylabel="KL divergence to the original, nats per token")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False)
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bstack"})
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="of bstack bench --json")
    parser.add_argument("--plot", help="picture to draw, .svg or .png")
    arguments = parser.parse_args()
    reports = {path.stem: read(path) for path in arguments.reports}
    print(table(reports))
    if arguments.plot:
        draw(reports, arguments.plot)


if __name__ == "__main__":
    main()
