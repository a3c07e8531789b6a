"""Reads calibration texts (files, folders, hub data sets) and cuts them into windows of token ids."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bstack.errors import ModelWarning, one_line
from bstk.errors import BstkError, UsageError

__all__ = ["HELD_OUT", "SELF", "TextSource", "open_text", "token_windows"]

SELF = "self"
# Windows beyond the samples, on which the quality curve in the file is measured; calibration does not see them.
HELD_OUT = 4
PLAIN = {".txt", ".md", ".raw", ".tokens", ".text"}
RECORDS = {".jsonl", ".ndjson"}
# One array of records, or one on each line. Not looked for in folders, where it may be anything.
JSON = ".json"
# Files that may hold texts, and are not read in folders.
LIKELY = {JSON, ".gz", ".zst", ".csv", ".tsv", ".parquet", ".arrow"}
# First bytes of a file -> how its text is encoded.
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
GZIP = b"\x1f\x8b"
# Stands for the name of a pipe: that of a process substitution (/dev/fd/63) changes, and a resumed run compares names.
PIPE = "(pipe)"
# The most characters that are read, so that a folder of a terabyte costs no more.
MAX_CHARACTERS = 256 * 2**20
# The same for a data set of the hub, which is fetched while it is read.
MAX_FETCHED = 2**24
BETWEEN = "\n\n"
_NO_SPACE = re.compile(r"\S")
# The shortest windows that the settings allow.
MIN_LENGTH = 8


@dataclass(frozen=True)
class TextSource:
    """A text and where it came from.

    Attributes
    ----------
    name : str
        For the record in the file; no folders of the user's machine.
    text : str
    """

    name: str
    text: str


def open_text(source: str) -> TextSource:
    """Read the text that `source` names.

    Parameters
    ----------
    source : str
        A file or a pipe (plain text or records), a folder of such files (read in the order of their names, hidden ones left
        out), or a hub data set as ``name``, ``name:configuration`` or ``name:configuration:split``. A record is a JSON
        object with a "text" field. Files of records end in .jsonl, .ndjson or .json; a pipe of records begins with one
        or with an array of them.

    Raises
    ------
    bstk.BstkError
        The source holds no text, bytes that are no text, or a record without one.
    bstk.UsageError
        There is nothing of that name, or a hub data set cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        seen = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        files = sorted(p for p in seen if p.is_file() and p.suffix.lower() in PLAIN | RECORDS)
        if not files:
            raise BstkError(f"{path} holds no text: looked for files ending in {', '.join(sorted(PLAIN | RECORDS))}.")
        if others := sorted(p.name for p in seen if p.suffix.lower() in LIKELY):
            warnings.warn(
                f"{path}: {others[0]} is left out (files like it: {len(others)}). Of a folder bstack reads files ending in "
                f"{', '.join(sorted(PLAIN | RECORDS))}.",
                ModelWarning,
                stacklevel=2,
            )
        return TextSource(path.name, _joined((piece for file in files for piece in _pieces(file)), MAX_CHARACTERS))
    if path.exists():
        return TextSource(path.name if path.is_file() else PIPE, _joined(_pieces(path), MAX_CHARACTERS))
    return TextSource(source, _joined(_rows(source), MAX_FETCHED))


def _joined(pieces: Iterator[str], longest: int) -> str:
    """Join pieces with blank lines up to `longest` characters; later pieces are not asked for."""
    joined, length = [], 0
    for piece in pieces:
        joined.append(piece)
        length += len(piece) + len(BETWEEN)
        if length >= longest:
            break
    return BETWEEN.join(joined)[:longest]


def _pieces(path: Path) -> Iterator[str]:
    """Yield a plain file up to the bound, or each text of a file of records."""
    try:
        with open(path, "rb") as raw:
            first = raw.peek(4)
            if first.startswith(GZIP):
                raise BstkError(f"{path} is compressed with gzip.", hint="Unpack it, or give a pipe from gunzip.")
            encoding = next((found for mark, found in MARKS.items() if first.startswith(mark)), "utf-8")
            with io.TextIOWrapper(raw, encoding) as stream:
                yield from _texts(path, stream)
    except UnicodeDecodeError as error:
        raise BstkError(
            f"{path} is not {error.encoding.upper()} text (byte {error.start}: {error.object[error.start]:#04x}). "
            "Calibration reads plain text or .jsonl."
        ) from None
    except OSError as error:
        raise BstkError(f"{path} cannot be read: {error.strerror}.") from None


def _texts(path: Path, stream: io.TextIOWrapper) -> Iterator[str]:
    lines = iter(lambda: stream.readline(MAX_CHARACTERS), "")
    suffix = path.suffix.lower()
    if suffix in RECORDS:
        yield from _records(path, lines)
        return
    pipe, head = not path.is_file(), ""  # a pipe has no ending: records are known by how they begin
    while pipe and not head.strip() and (line := next(lines, "")):
        head += line
    if isinstance(_parsed(head), dict):  # one on each line
        yield from _records(path, itertools.chain(head.removesuffix("\n").split("\n"), lines))
        return
    text = head + stream.read(MAX_CHARACTERS)
    first = next(_values(text), None) if pipe else None
    if isinstance(first, dict) or (isinstance(first, list) and first and isinstance(first[0], dict)):
        records = (value if isinstance(value, list) else [value] for value in _values(text))
        for number, record in enumerate(itertools.chain.from_iterable(records), 1):
            yield _text_of(record, f"{path}, record {number}")
    elif suffix != JSON:
        if "\0" in text:
            raise BstkError(f"{path} is not plain text: its character {text.index(chr(0))} is NUL.")
        yield text
    elif isinstance(whole := _parsed(text), (list, dict)):
        for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
            yield _text_of(record, f"{path}, record {number}")
    else:
        yield from _records(path, text.split("\n"))


def _records(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) >= MAX_CHARACTERS:
            raise BstkError(
                f"{path}, line {number}: longer than {MAX_CHARACTERS} characters.", hint="Split the text into records."
            )
        # Files with byte order marks that were put together have some inside.
        if line := line.strip("\ufeff \t\r\n"):
            yield _text_of(_parsed(line), f"{path}, line {number}")


def _parsed(text: str) -> Any:
    """Parse JSON; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _values(text: str) -> Iterator[Any]:
    """Yield the JSON values that follow each other in a text; None for what is none, unless the text was cut there."""
    at = 0
    while match := _NO_SPACE.search(text, at):
        try:
            value, at = json.JSONDecoder().raw_decode(text, match.start())
        except (ValueError, RecursionError):
            if len(text) < MAX_CHARACTERS:
                yield None
            return
        yield value


def _text_of(record: Any, where: str) -> str:
    """Return the text of a record; a BstkError that says `where` for one without."""
    if not isinstance(record, dict):
        raise BstkError(f'{where}: expected a JSON object with a "text" field.')
    if "text" not in record:
        raise BstkError(
            f"""{where}: no "text" field, only {", ".join(sorted(record))}.""", hint="Give each record its text there."
        )
    text = record["text"]
    if not isinstance(text, str):
        raise BstkError(f'{where}: its "text" is {json.dumps(text, default=str)[:40]}, which is no string.')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise BstkError(
            f'{where}: its "text" holds half a character, \\u{half:x}.', hint="Remove or replace it."
        ) from None
    return text


def _rows(source: str) -> Iterator[str]:
    """Yield each text of a data set of the hub, fetched as it is asked for."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"There is no file or folder {source!r}. If it is a data set of the hub, reading it needs the package "
            "datasets: pip install 'bstack[datasets]'"
        ) from None
    name, configuration, split = [*source.split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _text_of(row, f"{source}, row {number}")
    except BstkError:
        raise
    except Exception as error:  # the library raises dozens of kinds, many of them private
        raise UsageError(
            f"There is no file or folder {source!r}, and as a hub data set it cannot be read: {one_line(error)}"
        ) from None


def token_windows(source: TextSource, tokenizer: Any, samples: int, length: int, held_out: int = 0) -> torch.Tensor:
    """Cut a text into windows of token ids, spread evenly over the text.

    Parameters
    ----------
    source : TextSource
    tokenizer : transformers.PreTrainedTokenizerBase
    samples, length : int
        How many windows, and how many tokens each.
    held_out : int
        Windows beyond the samples.

    Returns
    -------
    torch.Tensor
        int64, shape (samples + held_out, length).

    Raises
    ------
    bstk.BstkError
        The text has fewer than (samples + held_out) x length tokens.
    """
    ids = tokenizer(source.text, add_special_tokens=False, verbose=False)["input_ids"]
    available, count = len(ids) // length, samples + held_out
    if available < count:
        more = f" and {held_out} more to measure the quality on" if held_out else ""
        if available > held_out:
            advice = f"a longer text, or at most {available - held_out} samples"
        elif len(ids) // count >= MIN_LENGTH:
            advice = f"a longer text, or a sequence length of at most {len(ids) // count}"
        else:
            advice = "a longer text"
        raise BstkError(
            f"The calibration text {source.name} has {len(ids)} tokens, but {samples} samples of {length}{more} "
            f"need {count * length}.",
            hint=f"Give {advice}.",
        )
    chosen = [i * available // count for i in range(count)]
    return torch.tensor([ids[i * length : (i + 1) * length] for i in chosen])
