"""``bstack compress``"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from bstack.cli._common import code_told, json_option, print_json, quiet_option, trust_option
from bstack.cli._progress import is_terminal, stage
from bstack.cli._text import duration, megabytes
from bstack.settings import EMBEDDINGS, ORDERS, PRESETS

_STAGES = {
    "open": "Opening the model",
    "calibration text": "Letting the model write its calibration text",
    "sensitivity": "Measuring sensitivities",
    "layers": "Compressing layers",
    "embeddings": "Compressing embeddings",
    "order": "Searching the order",
    "curve": "Measuring the quality curve",
    "write": "Writing the file",
}


class NumberOrAuto(click.ParamType):
    """A number of some kind, or the word auto."""

    def __init__(self, number: click.ParamType):
        self._number, self.name = number, f"{number.name} or auto"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if value == "auto":
            return value
        try:
            return self._number.convert(value, param, ctx)
        except click.BadParameter:
            words = "a whole number" if self._number is click.INT else "a number"
            self.fail(f"{value!r} is neither {words} nor auto.", param, ctx)


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(), help="The .bstk file to write.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="default",
    show_default=True,
    help="Settings to start from; paper is BitStack as published: sign codec, rank 16, 16 planes, paper order.",
)
@click.option(
    "--codec",
    type=click.Choice(["trellis", "sign", "spqr"]),
    help="trellis (the default): 2 bits per weight and block, best quality. sign: BitStack's sign planes. "
    "spqr: groups of 3 or 4 bits with separate outliers, trellis blocks on top.",
)
@click.option(
    "--planes",
    type=int,
    help="Blocks per linear; 4 with the trellis codec, 8 with sign, by default. With spqr the blocks on top of "
    "dense part and outliers, 0 and more; 2 by default.",
)
@click.option(
    "--rank",
    type=NumberOrAuto(click.INT),
    metavar="N|auto",
    help="Sign codec: rank of a block's magnitudes; auto (the default) chooses it for each matrix.",
)
@click.option("--bits", type=int, help="SpQR codec: bits of a code, 3 or 4 (the default).")
@click.option("--group", type=int, help="SpQR codec: inputs that share a scale, 16 (the default), 32, 64 or 128.")
@click.option(
    "--outliers",
    type=NumberOrAuto(click.FLOAT),
    metavar="FRACTION|auto",
    help="SpQR codec: fraction of a layer's weights that are outliers, at most 3 of a group; auto (the default) "
    "is 0.01, or with --bpw what that leaves room for.",
)
@click.option(
    "--bpw",
    type=float,
    metavar="X",
    help="SpQR codec: find the outliers' threshold at which dense part and outliers of each layer take at most X "
    "bits per weight, everything counted. In place of --outliers FRACTION.",
)
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    help="gain: predicted gain per byte. paper: BitStack's perplexity search, slow, holds the model in memory.",
)
@click.option(
    "--embeddings",
    type=click.Choice(EMBEDDINGS),
    help="stack: embeddings and head are cut like every linear. dense: they stay whole.",
)
@click.option(
    "--calibration",
    metavar="FILE|FOLDER|DATASET|self",
    help="Text to calibrate on; self (the default): the model writes it, no network needed.",
)
@click.option("--samples", type=int, help="Calibration windows; 64 by default.")
@click.option("--sequence-length", type=int, help="Tokens in each window; 256 by default.")
@click.option("--seed", type=int, help="Of everything random; 0 by default.")
@click.option("--work-dir", type=click.Path(), help="Where finished layers are kept; OUTPUT.work by default.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@trust_option
@click.option(
    "--dask",
    metavar="SCHEDULER",
    help="Encode matrices on the workers of this Dask scheduler, such as tcp://10.0.0.5:8786.",
)
@json_option
@quiet_option
def command(
    model: str,
    output: str,
    preset: str,
    work_dir: str | None,
    force: bool,
    trust_remote_code: bool,
    dask: str | None,
    as_json: bool,
    quiet: bool,
    **changes: object,
) -> None:
    """Compress MODEL into one .bstk file that can be cut to any size.

    MODEL is a transformers folder (safetensors), a hub id such as owner/name, a GGUF file, or smollm2, the embedded
    default. Interrupted, the same command resumes where it was.

    \b
    Example:
      bstack compress smollm2 -o smollm2.bstk
      bstack compress smollm2 -o near-lossless.bstk --codec spqr --bpw 4.75
      bstack compress ./Llama-3.1-8B -o llama.bstk --calibration corpus.txt --samples 128 --sequence-length 512
    """
    from bstack.compression.api import compress

    _check_preset(preset, changes["codec"])
    settings = PRESETS[preset].with_changes(**changes)
    with code_told(quiet):
        report = compress(
            model,
            output,
            settings=settings,
            work_dir=work_dir,
            overwrite=force,
            trust_remote_code=trust_remote_code,
            dask=dask,
            progress=_progress(quiet),
        )
    if as_json:
        print_json("bstack.compress/1", report.to_json())
        return
    rows = [
        ("original", megabytes(report.original_bytes) + " of weight files"),
        ("full file", f"{megabytes(report.file_bytes)}, {megabytes(report.memory_bytes)} of weights in memory"),
        ("smallest file", megabytes(report.smallest_bytes)),
        (
            "stack",
            f"{report.blocks} blocks of {report.linears} linears, "
            f"{report.bits_per_weight:.2f} bits per weight at full depth",
        ),
        ("time", duration(report.seconds)),
    ]
    if report.peak_memory_bytes is not None:
        rows.append(("peak memory", megabytes(report.peak_memory_bytes)))
    click.echo(f"{output}: done")
    for key, value in rows:
        click.echo(f"  {key:<14} {value}")


def _check_preset(preset: str, codec: object) -> None:
    """Refuse another codec than that of a preset whose settings are its codec's own."""
    own = PRESETS[preset].codec
    if preset != "default" and codec not in (None, own):
        raise click.UsageError(
            f"--preset {preset} is made of settings for --codec {own}, and --codec {codec} has others. Leave one of them out."
        )


def _progress(quiet: bool):
    """Show each stage; without a terminal, say at its end what it took."""

    @contextmanager
    def shown(name: str, steps: int) -> Iterator[Callable[[], None]]:
        started = time.monotonic()
        with stage(steps, _STAGES[name], quiet, leave=True) as step:
            yield step
        if not quiet and not is_terminal():
            click.echo(f"{_STAGES[name]}: {duration(time.monotonic() - started)}", err=True)

    return shown
