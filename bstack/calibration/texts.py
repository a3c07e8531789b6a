"""Reads calibration texts (files, folders, hub data sets) and cuts them into windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bstack.errors import one_line
from bstk.errors import BstkError, UsageError

__all__ = ["HELD_OUT", "SELF", "TextSource", "open_text", "token_windows"]

SELF = "self"
# Windows beyond the samples, on which the quality curve in the file is measured; calibration does not see them.
HELD_OUT = 4
PLAIN = {".txt", ".md", ".raw", ".tokens", ".text"}
RECORDS = {".jsonl", ".ndjson"}
# The most characters that are read, so that a folder of a terabyte costs no more.
MAX_CHARACTERS = 256 * 2**20
# The same for a data set of the hub, which is fetched while it is read.
MAX_FETCHED = 2**24
BETWEEN = "\n\n"
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
        A text file (plain, or .jsonl with a "text" field a line), a folder of such files (read in the order of their
        names), or a hub data set as ``name``, ``name:configuration`` or ``name:configuration:split``.

    Raises
    ------
    bstack.errors.BstkError
        The source holds no text, or text that is not UTF-8.
    bstk.UsageError
        There is nothing of that name, or a hub data set cannot be read.
    """
    path = Path(source)
    if path.is_file():
        text = _joined(_pieces(path), MAX_CHARACTERS)
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in PLAIN | RECORDS)
        if not files:
            raise BstkError(f"{path} holds no text: looked for files ending in {', '.join(sorted(PLAIN | RECORDS))}.")
        text = _joined((piece for file in files for piece in _pieces(file)), MAX_CHARACTERS)
    else:
        return TextSource(source, _joined(_rows(source), MAX_FETCHED))
    return TextSource(path.name, text)


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
        if path.suffix.lower() in RECORDS:
            yield from _records(path)
            return
        with open(path, encoding="utf-8") as stream:
            yield stream.read(MAX_CHARACTERS)
    except UnicodeDecodeError as error:
        raise BstkError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.object[error.start]:#04x}). "
            "Calibration reads plain text or .jsonl."
        ) from None
    except OSError as error:
        raise BstkError(f"{path} cannot be read: {error.strerror}.") from None


def _records(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_CHARACTERS), ""), 1):
            if not line.strip():
                continue
            if len(line) >= MAX_CHARACTERS:
                raise BstkError(
                    f"{path}, line {number}: longer than {MAX_CHARACTERS} characters. Split the text into records."
                )
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise BstkError(f'{path}, line {number}: expected a JSON object with a "text" field.') from None
            yield str(text)


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
        for row in rows:
            text = row.get("text")
            if not isinstance(text, str):
                raise BstkError(f'{source}: rows have no "text" column, only {", ".join(sorted(row))}.')
            yield text
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
    bstack.errors.BstkError
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
            f"The calibration text {source.name} has {len(ids)} tokens, but {samples} samples of {length}{more} need "
            f"{count * length}. Give {advice}."
        )
    chosen = [i * available // count for i in range(count)]
    return torch.tensor([ids[i * length : (i + 1) * length] for i in chosen])
