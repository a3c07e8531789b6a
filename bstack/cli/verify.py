"""``bstack verify``."""

from __future__ import annotations

import re

import click

import bstk
from bstack.cli import _common, _progress
from bstack.cli._text import megabytes
from bstack.errors import printable


def _root_digest(value: str) -> bytes:
    if not re.fullmatch("[0-9a-fA-F]{64}", value):
        raise ValueError(
            f"{value!r} is not a root digest. Give 64 hexadecimal digits, as bstack inspect --root prints them."
        )
    return bytes.fromhex(value)


@click.command("verify")
@_common.file_argument
@click.option(
    "--root", type=_common.Parsed("HEX", _root_digest), help="Refuse a file with another root digest (exit code 5)."
)
@_common.strict_option
@_common.json_option
@_common.quiet_option
def command(file: str, root: bytes | None, strict: bool, as_json: bool, quiet: bool) -> None:
    """Check every digest of FILE and decode every chunk; name the first that is damaged.

    Exit code 0: FILE is good. 3 (with --strict): it is partial. 4: it is no .bstk file. 5: it is damaged.

    The digests in FILE detect damage, not forgery. With --root, FILE must be the model with that root digest or a cut of
    it; bstack inspect --root prints the digest of a trusted copy.

    \b
    Example:
      bstack verify model.bstk
      bstack verify small.bstk --root $(bstack inspect --root model.bstk)
    """
    try:
        with _common.open_file(file, quiet=quiet) as reader:
            if root is not None:
                reader.require_root(root)
            total = sum(chunk.stored_length for chunk in reader.chunks)
            with _progress.copied(total, "verify", quiet) as advance:
                reader.verify(lambda chunk: advance(chunk.stored_length))
            # Damage is reported first: a damaged partial file is not a valid one.
            if strict and reader.state == "partial":
                raise bstk.PartialError(f"{file}: {reader.partial_message()}")
    except bstk.BstkError as error:
        if as_json:
            _common.print_json("bstack.verify/1", _failure(file, error))
        raise
    if as_json:
        result = {"file": file, "ok": True, "state": reader.state, "file_bytes": reader.length}
        result |= {"chunks": len(reader.chunks), "root": reader.root.hex()}
        _common.print_json("bstack.verify/1", result)
        return
    click.echo(
        f"{printable(file)}: good ({reader.state}): all {len(reader.chunks):,} chunks match, "
        f"{megabytes(reader.chunks[-1].end)} of file\n  root {reader.root.hex()}"
    )


def _failure(file: str, error: bstk.BstkError) -> dict[str, object]:
    chunk = getattr(error, "chunk", None)
    place = None if chunk is None else {"name": chunk.name, "level": chunk.level, "offset": chunk.offset}
    return {"file": file, "ok": False, "exit_code": error.exit_code, "error": str(error), "chunk": place}
