"""``bstack compress``"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from bstack.cli._common import Parsed, json_option, model_warnings, print_json, quiet_option, trust_option
from bstack.cli._progress import is_terminal, stage
from bstack.cli._text import duration, megabytes, original_fields
from bstack.errors import printable
from bstack.progress import Plan
from bstack.settings import EMBEDDINGS, ORDERS, PRESETS
from bstk.kinds import SPQR_BITS, SPQR_GROUPS, one_of

if TYPE_CHECKING:
    from bstack.compression.api import Report

_STAGES = {
    "open": "Opening the model",
    "calibration text": "Generating the calibration text",
    "sensitivity": "Measuring sensitivities",
    "layers": "Compressing layers",
    "embeddings": "Compressing embeddings",
    "order": "Choosing the order",
    "curve": "Measuring the quality curve",
    "exact": "Restoring the original",
    "write": "Writing the file",
}


def _number_or_auto(name: str, number: type[int] | type[float], words: str) -> Parsed:
    def parse(value: str) -> float | str:
        try:
            return value if value == "auto" else number(value)
        except ValueError:
            raise ValueError(f"{value!r} is neither {words} nor auto.") from None

    return Parsed(name, parse)


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
    help="Blocks per linear: by default 4 with the trellis codec and 8 with sign. With spqr the blocks on top of "
    "the dense part and the outliers, 0 or more; by default 2.",
)
@click.option(
    "--rank",
    metavar="N|auto",
    type=_number_or_auto("N|auto", int, "a whole number"),
    help="Sign codec: rank of a block's magnitudes; auto (the default) chooses it for each matrix.",
)
@click.option("--bits", type=int, help=f"SpQR codec: bits of a code, {one_of(SPQR_BITS)} (the default).")
@click.option("--group", type=int, help=f"SpQR codec: inputs that share a scale, {one_of(SPQR_GROUPS)}; by default 16.")
@click.option(
    "--outliers",
    metavar="FRACTION|auto",
    type=_number_or_auto("FRACTION|auto", float, "a number"),
    help="SpQR codec: fraction of a layer's weights to store as outliers, at most 3 in a group; auto (the "
    "default) is 0.01, or with --bpw as many as fit.",
)
@click.option(
    "--bpw",
    type=float,
    metavar="X",
    help="SpQR codec: choose the outlier threshold so that each layer's dense part and outliers take at most X "
    "bits per weight, everything counted. Excludes --outliers FRACTION.",
)
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    help="gain: predicted gain per byte. paper: BitStack's perplexity search, slow, holds the model in memory.",
)
@click.option(
    "--embeddings",
    type=click.Choice(EMBEDDINGS),
    help="stack: embeddings and head are compressed and cut like linears. dense: they stay whole.",
)
@click.option(
    "--calibration",
    metavar="FILE|FOLDER|DATASET|self",
    help="Text to calibrate on; self (the default): the model writes it, without network.",
)
@click.option("--samples", type=int, help="Calibration windows; 64 by default.")
@click.option("--sequence-length", type=int, help="Tokens in each window; 256 by default.")
@click.option("--seed", type=int, help="Random seed; 0 by default.")
@click.option(
    "--no-tokenizer", is_flag=True, help="Leave the tokenizer out: the file then takes token ids alone, in Python."
)
@click.option(
    "--exact",
    is_flag=True,
    help="Add what the complete file needs to give back the original's weights bit for bit (bstack export); cuts drop it first.",
)
@click.option(
    "--device",
    metavar="cpu|cuda|cuda:N",
    help="Where to do the work: cpu (the default), or an NVIDIA GPU (pip install 'bstack[compress,cuda]'), with the trellis codec.",
)
@click.option("--work-dir", type=click.Path(), help="Folder for finished layers; OUTPUT.work by default.")
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
    no_tokenizer: bool,
    exact: bool,
    trust_remote_code: bool,
    dask: str | None,
    as_json: bool,
    quiet: bool,
    **changes: object,
) -> None:
    """Compress MODEL into one .bstk file that can be cut to any size.

    MODEL is a transformers folder (safetensors), a hub id such as owner/name, a GGUF file, or smollm2, the
    default model. After an interruption the same command continues.

    \b
    Example:
      bstack compress smollm2 -o smollm2.bstk
      bstack compress smollm2 -o near-lossless.bstk --codec spqr --bpw 4.75
      bstack compress ./Llama-3.1-8B -o llama.bstk --calibration corpus.txt --samples 128 --sequence-length 512
      bstack compress ./Llama-3.1-8B -o llama.bstk --exact
      bstack compress ./Llama-3.1-8B -o llama.bstk --device cuda
    """
    from bstack.compression.api import compress

    _check_preset(preset, changes["codec"])
    settings = PRESETS[preset].with_changes(**changes, tokenizer=False if no_tokenizer else None, exact=exact or None)
    with model_warnings(quiet):
        report = compress(
            model,
            output,
            settings=settings,
            work_dir=work_dir,
            overwrite=force,
            trust_remote_code=trust_remote_code,
            dask=dask,
            progress=_progress(quiet),
            on_plan=lambda plan: None if quiet else click.echo(_plan_text(plan), err=True),
        )
    if as_json:
        print_json("bstack.compress/2", report.to_json())
        return
    rows = [
        *original_fields(vars(report)),
        ("full file", f"{megabytes(report.file_bytes)}, {megabytes(report.memory_bytes)} of weights in memory"),
        *_exact_fields(report),
        ("base model", megabytes(report.base_bytes)),
        (
            "stack",
            f"{report.blocks} blocks of {report.linears} linears, {report.bits_per_weight:.2f} bits per weight in all",
        ),
        ("time", duration(report.seconds)),
        ("peak memory", megabytes(report.peak_memory_bytes)),
    ]
    click.echo(f"{printable(output)}: done")
    for key, value in rows:
        click.echo(f"  {key:<14} {value}")


def _exact_fields(report: Report) -> list[tuple[str, str]]:
    """Return what the exact top takes, and whether the original takes less."""
    if not report.exact_bytes:
        return []
    fraction = report.file_bytes / report.original_dtype_bytes
    rows = [("exact top", f"{megabytes(report.exact_bytes)} of it; the full file takes {fraction:.1%} of the original")]
    if report.file_bytes > report.original_bytes:
        rows.append(("", f"the source file, which takes {megabytes(report.original_bytes)}, is smaller and as exact"))
    return rows


def _check_preset(preset: str, codec: object) -> None:
    """Refuse a codec that does not take the settings of a preset."""
    own = PRESETS[preset].codec
    if preset != "default" and codec not in (None, own):
        raise click.UsageError(
            f"--preset {preset} is for --codec {own}, not for --codec {codec}. Leave one of them out."
        )


def _plan_text(plan: Plan) -> str:
    text = f"Needs about {megabytes(plan.memory_bytes)} of memory at its peak"
    if plan.free_bytes is None:
        text = f"{text}."
    else:
        text = f"{text}; {megabytes(plan.free_bytes)} are free."
        if plan.memory_bytes > plan.free_bytes:
            text = f"Warning: {text} The system may end the command."
    if plan.device_bytes is not None and plan.device_free_bytes is not None:
        text += (
            f" Of the GPU's memory: about {megabytes(plan.device_bytes)}; {megabytes(plan.device_free_bytes)} are free."
        )
    return text


def _progress(quiet: bool) -> Callable[[str, int], Any]:
    """Show each stage; without a terminal, log at its end how long it took."""

    @contextmanager
    def show(name: str, steps: int) -> Iterator[Callable[[], None]]:
        started = time.monotonic()
        with stage(steps, _STAGES[name], quiet, leave=True) as step:
            yield step
        if not quiet and not is_terminal():
            click.echo(f"{_STAGES[name]}: {duration(time.monotonic() - started)}", err=True)

    return show
