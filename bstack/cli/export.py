"""``bstack export``."""

from __future__ import annotations

import os
from typing import Any

import click

import bstk
from bstack.cli import _common, _progress
from bstack.cli._text import megabytes
from bstack.errors import printable, require

# Those of bstack.engine.gguf, which imports torch.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # names of torch


@click.command("export")
@_common.place_argument
@click.option(
    "--to",
    "form",
    type=click.Choice(["safetensors", "transformers", "gguf"]),
    default="safetensors",
    show_default=True,
    help="safetensors: a folder with dense weights, for any program; transformers: one with packed weights, for programs that "
    "import bstack; gguf: a file for llama.cpp.",
)
@click.argument("output", type=click.Path(), metavar="DIR|OUT.gguf")
@_common.mb_option(required=False, help="Export the best model of at most N megabytes; by default all of FILE.")
@click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    help="safetensors: type of the weights; by default bf16, or with a complete file made with --exact the original's files of "
    "weights.",
)
@click.option("--type", "kind", type=click.Choice(TYPES), help="gguf: type of the matrices; q8_0 by default.")
@_common.trust_option
@_common.code_option
@_common.strict_option
@_common.json_option
@_common.quiet_option
def command(
    file: str,
    form: str,
    output: str,
    budget: int | None,
    dtype: str | None,
    kind: str | None,
    trust_remote_code: bool,
    code: str | None,
    strict: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the model in FILE for other programs.

    With --to safetensors, DIR receives the configuration, the tokenizer and dense weights, large ones in several files, for
    programs that do not know bstack. The weights take the memory of the original with any budget: --mb decides their quality.
    One layer at a time is in memory.

    A complete file that was made with compress --exact gives the original's files of weights, bit for bit, unless --mb or
    --dtype asks for others; each is checked against its SHA-256.

    With --to transformers, DIR receives a cut of FILE in place of dense weights. After "import bstack", transformers'
    from_pretrained loads it with packed weights; docs/guide.md shows how.

    With --to gguf, OUT.gguf is a GGUF file for llama.cpp, of Llama, Mistral, Qwen2 and Qwen3 with byte-level tokenizers. Other
    models go there by way of safetensors and llama.cpp's own converter.

    DIR must be empty or not exist, OUT.gguf must not exist; both appear whole or not at all. From a URL only the blocks within
    the budget are fetched.

    \b
    Example:
      bstack export model.bstk --to safetensors model/
      bstack export model.bstk --to safetensors small/ --mb 3000 --dtype fp16
      bstack export model.bstk --to transformers packed/ --mb 3000
      bstack export model.bstk --to gguf model.gguf --mb 3000 --type q8_0
    """
    require("Exporting")
    with _common.open_file(file, strict=strict, quiet=quiet) as reader:
        cut = reader.fit(budget=budget)
        for option, value, its in (("--dtype", dtype, "safetensors"), ("--type", kind, "gguf")):
            if value is not None and form != its:
                raise click.UsageError(f"{option} is for --to {its}.")
        # Before torch is imported, which takes seconds.
        if form == "gguf":
            if os.path.lexists(output):
                raise bstk.UsageError(f"{output}: the output exists.", hint="Name another output.")
            result = _gguf(reader, output, budget, cut, kind or "q8_0", quiet)
        else:
            from bstack.folders import check_free

            check_free(output)
            if form == "transformers":
                result = _packed(reader, output, budget, cut, quiet)
            else:
                allowed = {"trust_remote_code": trust_remote_code, "code": code}
                result = _dense(reader, output, budget, cut, dtype, allowed, quiet)
        bits = reader.bits_per_weight(cut)
        has_top = any(chunk.kind.restores for chunk in reader.all_chunks)
        exact = reader.restores and cut.chunks == len(reader.chunks) and form != "transformers"
    if as_json:
        about = {"input": reader.source.name, "output": output, "to": form}
        _common.print_json("bstack.export/1", {**about, **result, "cut": {**cut._asdict(), "bits_per_weight": bits}})
        return
    forms = {
        "safetensors": "{} files, {} of weights as {}",
        "transformers": "{} files, with packed weights",
        "gguf": "{1} of weights as {2}",
    }
    size = megabytes(result.get("weight_bytes", 0))
    what = forms[form].format(len(result["files"]), size, result.get("dtype") or result.get("type"))
    click.echo(f"{printable(output)}: {what}")
    if result.get("exact"):
        click.echo("  bit for bit those of the original: the SHA-256 of every file of weights matches")
    words = f"  from {megabytes(cut.file_bytes)} of {printable(reader.source.name)}"
    if exact:
        click.echo(f"{words}, with its exact top: the original's weights")
    else:
        click.echo(words if bits is None else f"{words}, {bits:.3f} bits per weight of the linears")
        if has_top:
            click.echo("  without the exact top, so not the original's weights")
    if result.get("code"):
        click.echo(f"  copy its Python code there: {printable(', '.join(result['code']))}")


def _gguf(
    reader: bstk.Reader, output: str, budget: int | None, cut: bstk.Cut, kind: str, quiet: bool
) -> dict[str, Any]:
    from bstack.engine.gguf import export_gguf

    total = sum(chunk.stored_length for chunk in reader.chunks[: cut.chunks] if chunk.is_weight)
    with _progress.transferred(reader, total, "export", quiet) as advance, _common.model_warnings(quiet):
        done = export_gguf(reader, output, kind=kind, budget=budget, progress=advance)
    return {"type": kind, "parameters": done.parameters, "weight_bytes": done.file_bytes, "files": [output]}


def _packed(reader: bstk.Reader, folder: str, budget: int | None, cut: bstk.Cut, quiet: bool) -> dict[str, Any]:
    from bstack.engine.folder import export_packed

    with _progress.transferred(reader, cut.file_bytes, "export", quiet) as advance:
        _, files = export_packed(reader, folder, budget=budget, progress=advance)
    return {"files": files}


def _dense(
    reader: bstk.Reader,
    folder: str,
    budget: int | None,
    cut: bstk.Cut,
    dtype: str | None,
    allowed: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    import torch

    from bstack.engine.export import export_safetensors

    total = sum(chunk.stored_length for chunk in reader.chunks[: cut.chunks] if chunk.shape)
    with _progress.transferred(reader, total, "export", quiet) as advance, _common.model_warnings(quiet):
        done = export_safetensors(
            reader,
            folder,
            budget=budget,
            dtype=getattr(torch, _DTYPES[dtype]) if dtype else None,
            progress=advance,
            **allowed,
        )
    numbers = {"parameters": done.parameters, "weight_bytes": done.weight_bytes}
    shorts = {getattr(torch, long): short for short, long in _DTYPES.items()}
    short = shorts.get(done.dtype, "fp64")  # of an original
    return {"dtype": short, "exact": done.exact, **numbers, "files": done.files, "code": done.code}
