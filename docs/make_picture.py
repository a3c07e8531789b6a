"""Draw docs/quality.svg from the figures in docs/results.md: ``python docs/make_picture.py`` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).with_name("quality.svg")

# File size in MB -> divergence from the original, nats per token: SmolLM2-135M-Instruct, WikiText-2 test.
BSTACK = {38.5: 0.616, 52.41: 0.293, 57.96: 0.180, 64.38: 0.110, 70.75: 0.069, 83.97: 0.036, 99.8: 0.012, 131.0: 0.004}
GPTQ = {38.67: 6.71, 54.18: 1.213, 64.98: 0.405, 78.85: 0.262}
RTN = {38.54: 10.04, 54.11: 1.488, 64.93: 0.518, 78.8: 0.355}
ORIGINAL = (257, 0.0011)  # in bfloat16: its divergence from itself in float32
NOISE = 0.0011


def main() -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bstack", "svg.fonttype": "path", "font.size": 11})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for figures, label, style in (
        (RTN, "round to nearest: one run for each size", {"color": "#999999", "marker": "s", "linestyle": "none"}),
        (GPTQ, "GPTQ: one run for each size", {"color": "#d95f02", "marker": "^", "linestyle": "none"}),
        (BSTACK, "bstack: one file, cut to each size", {"color": "#1b6ca8", "marker": "o", "linewidth": 2}),
    ):
        axes.plot(figures.keys(), figures.values(), label=label, markersize=7, **style)
    axes.axhline(NOISE, color="#2a7f3f", linestyle=":", linewidth=1)
    axes.plot(*ORIGINAL, color="#2a7f3f", marker="*", markersize=15, linestyle="none", clip_on=False)
    axes.annotate(
        "the original in bfloat16:\n257 MB", ORIGINAL, (250, 0.0028), ha="right", va="center", color="#2a7f3f"
    )
    axes.set_yscale("log")
    axes.set_xlim(30, 268)
    axes.set_ylim(0.0007, 20)
    axes.set_yticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"])
    axes.set_xlabel("size of the file, MB")
    axes.set_ylabel("KL divergence from the original\n(lower is better)")
    axes.set_title("SmolLM2-135M-Instruct on WikiText-2", loc="left", fontsize=11)
    axes.grid(True, which="major", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
