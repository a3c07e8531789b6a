"""``bstack export``."""

from __future__ import annotations

import click

from bstack.cli import _common, _progress
from bstack.cli._text import megabytes
from bstack.errors import printable

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # names of torch


@click.command("export")
@_common.place_argument
@click.option(
    "--to", "form", type=click.Choice(["safetensors"]), default="safetensors", help="What to write: safetensors."
)
@click.argument("folder", type=click.Path(), metavar="DIR")
@_common.mb_option(required=False, help="Export the best model of at most N megabytes; by default all of FILE.")
@click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    help="Type of the weights; by default bf16, or with a complete file made with --exact the original's files of weights.",
)
@_common.trust_option
@_common.code_option
@_common.strict_option
@_common.json_option
@_common.quiet_option
def command(
    file: str,
    form: str,
    folder: str,
    budget: int | None,
    dtype: str | None,
    trust_remote_code: bool,
    code: str | None,
    strict: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the model in FILE as a plain transformers folder, with dense weights, for programs that do not know bstack.

    DIR receives the configuration, the tokenizer and the weights as safetensors, large ones in several files. It must be
    empty or not exist, and appears whole or not at all. The weights take the memory of the original with any budget: --mb
    decides their quality. One layer at a time is in memory.

    A complete file that was made with compress --exact gives the original's files of weights, bit for bit, unless --mb or
    --dtype asks for others; each is checked against its SHA-256.

    From a URL only the blocks within the budget are fetched.

    \b
    Example:
      bstack export model.bstk --to safetensors model/
      bstack export model.bstk --to safetensors small/ --mb 3000 --dtype fp16
    """
    with _common.open_file(file, strict=strict, quiet=quiet) as reader:
        cut = reader.fit(budget=budget)
        # Before torch is imported, which takes seconds.
        from bstack.folders import check_free

        check_free(folder)
        import torch

        from bstack.engine.export import export_safetensors

        total = sum(chunk.stored_length for chunk in reader.chunks[: cut.chunks] if chunk.shape)
        with _progress.transferred(reader, total, "export", quiet) as advance, _common.model_warnings(quiet):
            done = export_safetensors(
                reader,
                folder,
                budget=budget,
                dtype=getattr(torch, _DTYPES[dtype]) if dtype else None,
                trust_remote_code=trust_remote_code,
                code=code,
                progress=advance,
            )
        bits = reader.bits_per_weight(cut)
    dtype = next(short for short, long in _DTYPES.items() if done.dtype == getattr(torch, long))
    if as_json:
        _common.print_json(
            "bstack.export/1",
            {
                "input": reader.source.name,
                "output": folder,
                "dtype": dtype,
                "exact": done.exact,
                "parameters": done.parameters,
                "weight_bytes": done.weight_bytes,
                "files": done.files,
                "code": done.code,
                "cut": {**cut._asdict(), "bits_per_weight": bits},
            },
        )
        return
    click.echo(f"{printable(folder)}: {len(done.files)} files, {megabytes(done.weight_bytes)} of weights as {dtype}")
    if done.exact:
        click.echo("  bit for bit those of the original: the SHA-256 of every file of weights matches")
    words = f"  from {megabytes(cut.file_bytes)} of {printable(reader.source.name)}"
    click.echo(words if bits is None else f"{words}, {bits:.3f} bits per weight of the linears")
    if done.code:
        click.echo(f"  copy its Python code there: {printable(', '.join(done.code))}")
