"""``bstack bench``"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

import bstk
from bstack.bench.options import CALIBRATED, Choice, Options, parse_against, parse_budgets
from bstack.cli import _common
from bstack.cli._model import device_option
from bstack.cli._progress import stage
from bstack.errors import printable, require
from bstk.atomic import replacing

if TYPE_CHECKING:
    from bstack.bench.results import Report


@click.command("bench")
@_common.file_argument
@click.option(
    "--budgets",
    type=_common.Parsed("MB,MB-MB+STEP", parse_budgets),
    help="Sizes to measure, such as 60,80,100-200+20 (or 64-512*2); ten from the base model to the whole file by default.",
)
@click.option(
    "--original",
    metavar="MODEL",
    help="The model the file was made from: folder, hub id, GGUF file or smollm2. The divergence is measured against it.",
)
@click.option("--force", is_flag=True, help="Measure against --original even if FILE was not made from it.")
@click.option(
    "--text",
    metavar="FILE|FOLDER|DATASET",
    help="Text to measure on; by default Python's own language reference, which is on every machine.",
)
@click.option("--windows", type=click.IntRange(1, 2**20), default=16, show_default=True, help="Windows of the text.")
@click.option(
    "--sequence-length",
    type=click.IntRange(8, 2**20),
    help="Tokens in each window; 512 by default, or what the model reads if that is less.",
)
@click.option(
    "--against",
    type=_common.Parsed("rtn,gptq:3,spqr:4@4.75,gguf:FILE,...", parse_against),
    help="Also measure one-size quantisers (rtn, gptq, spqr), at all usual bits or at the bits named; needs --original. "
    "spqr:4@4.75 is SpQR with codes of 4 bits and as many outliers as make 4.75 bits per weight; without @ they "
    "are 1 % of the weights. gguf:FILE is a GGUF file of the same model, as it is.",
)
@click.option(
    "--calibration",
    metavar="FILE|FOLDER|DATASET|self",
    help="Text to calibrate gptq and spqr on; by default what the file was calibrated on.",
)
@click.option(
    "--tasks",
    metavar="TASK,...",
    help="Zero-shot tasks, through lm-eval (pip install 'bstack[tasks]'): its names, or .yaml files of your own.",
)
@click.option("--no-speed", is_flag=True, help="Skip the speed tests.")
@click.option("--no-quality", is_flag=True, help="Skip everything that needs a text.")
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE.png|svg|pdf", help="Draw quality against size.")
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="FILE|-",
    help="Write the figures as CSV; - is standard output, in place of the tables.",
)
@device_option
@_common.trust_option
@_common.code_option
@_common.json_option
@_common.quiet_option
def command(
    file: str,
    budgets: list[int] | None,
    original: str | None,
    force: bool,
    text: str | None,
    windows: int,
    sequence_length: int | None,
    against: list[Choice] | None,
    calibration: str | None,
    tasks: str | None,
    no_speed: bool,
    no_quality: bool,
    plot: str | None,
    csv_path: str | None,
    device: str,
    trust_remote_code: bool,
    code: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the quality, speed and memory of FILE at several sizes.

    For every size: perplexity, divergence from the original (KLD, nats per token) with its 99th percentile, fraction of
    tokens for which both find the same one most likely; and, run from its packed weights, load time, memory and tokens
    per second beside those of float32 weights. Each size is measured in a process of its own. If the command is stopped,
    the same command continues. docs/guide.md explains the figures.

    \b
    Example:
      bstack bench model.bstk --original smollm2 --plot model.png
      bstack bench model.bstk --budgets 60,80,100-200+20 --no-quality
      bstack bench model.bstk --original smollm2 --text corpus.txt --against rtn,gptq:3 --csv figures.csv
    """
    if no_quality:
        for name, value in {"--plot": plot, "--original": original, "--against": against, "--text": text}.items():
            if value:
                raise click.UsageError(f"{name} is about quality, which --no-quality skips. Leave one of them out.")
    if force and original is None:
        raise click.UsageError("--force is about --original: name one.")
    if against and original is None:
        raise click.UsageError("--against compares with the original: name it with --original MODEL.")
    if code and not trust_remote_code:
        raise click.UsageError("--code names Python code to run. If you trust it, add --trust-remote-code.")
    if calibration and not any(choice.method in CALIBRATED for choice in against or ()):
        raise click.UsageError("--calibration is for --against gptq and spqr; nothing else here is calibrated.")
    if as_json and csv_path == "-":
        raise click.UsageError("--json and --csv - both write to standard output. Give --csv a file.")
    options = Options(
        budgets=budgets,
        speed=not no_speed,
        quality=not no_quality,
        text=text,
        windows=windows,
        sequence_length=sequence_length,
        original=original,
        force=force,
        against=against or (),
        calibration=calibration,
        tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
        trust_remote_code=trust_remote_code,
        code=code or original,
        device=device,
    )
    require("Measuring")
    _check_outputs(file, plot, csv_path)
    with _common.open_file(file, quiet=quiet):  # its warning or error comes before the heavy imports
        pass
    if device != "cpu":
        from bstack.packed.backends import device_of

        device_of(device, packed=True)
    from bstack.bench.tasks import check_tasks

    if options.tasks:
        check_tasks(options.tasks)
    from bstack.bench.run import run_bench

    with _common.model_warnings(quiet):
        report, resume = run_bench(file, options, lambda name, steps: stage(steps, name, quiet))
    _write(report, plot, csv_path, as_json, quiet)
    resume.delete()  # only now: hours of measuring must survive a full disk and a closed pipe


def _check_outputs(file: str, plot: str | None, csv_path: str | None) -> None:
    """Check what would fail only after hours of measuring."""
    for path in (plot, csv_path):
        if path in (None, "-"):
            continue
        if os.path.exists(path) and os.path.samefile(file, path):
            raise click.UsageError(f"{path} is the file to measure; name another.")
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise bstk.OutputError(f"{path}: cannot write: there is no folder {folder}.", hint="Create it first.")
        if not os.access(folder, os.W_OK):
            raise bstk.OutputError(f"{path}: cannot write: no permission in {folder}.")
    if plot is not None:
        from bstack.bench.plot import check_plot

        check_plot(plot)


def _write(report: Report, plot: str | None, csv_path: str | None, as_json: bool, quiet: bool) -> None:
    from bstack.bench.tables import as_csv, as_tables

    if csv_path == "-":
        click.echo(as_csv(report), nl=False)
    elif as_json:
        _common.print_json("bstack.bench/1", report.to_json())
    else:
        click.echo(printable(as_tables(report, _plus_minus())))
    if as_json or csv_path == "-":
        for note in report.notes if not quiet else ():
            click.echo(printable(f"Note: {note}"), err=True)
    if csv_path not in (None, "-"):
        with replacing(csv_path) as (sink, _):
            sink.write(as_csv(report).encode())
    if plot is not None:
        from bstack.bench.plot import save_plot

        save_plot(report, plot)
    for path in (csv_path, plot):
        if path not in (None, "-") and not quiet:
            click.echo(f"{printable(path)}: written", err=True)


def _plus_minus() -> str:
    try:
        "±".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "+/-"
    return "±"
