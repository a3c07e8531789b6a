"""The texts that quality is measured on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

import bstk
from bstack.bench.options import Options
from bstack.calibration.texts import TextSource, open_text
from bstack.errors import CalibrationError

__all__ = ["DEFAULT", "digest", "file_tokenizer", "first_windows", "measuring_text", "window_length"]

DEFAULT = "python-reference"
LENGTH = 512


def measuring_text(source: str | None) -> TextSource:
    """Read the text to measure on.

    Parameters
    ----------
    source : str or None
        A file, a folder or a hub data set, as for calibration; None for the default: the language reference that the
        standard library carries for ``help()`` (``pydoc_data.topics``), English prose on every machine with a Python.
        Its wording changes a little from one Python to the next, so its digest goes into every report.

    Raises
    ------
    bstack.errors.CalibrationError
        When the text cannot be read.
    """
    if source is not None:
        return open_text(source)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError(
            "This Python comes without pydoc_data, whose text is the default. Give another with --text FILE."
        ) from None
    return TextSource(DEFAULT, "\n\n".join(topics[name].strip() for name in sorted(topics)))


def digest(text: TextSource) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.text.encode()).hexdigest()


def first_windows(text: TextSource, tokenizer: Any, windows: int, length: int) -> torch.Tensor:
    """Cut the beginning of a text into windows of token ids, one after the other, no special tokens added.

    Parameters
    ----------
    text : TextSource
    tokenizer : transformers.PreTrainedTokenizerBase
    windows, length : int

    Returns
    -------
    torch.Tensor
        int64, shape (windows, length).

    Raises
    ------
    bstack.errors.CalibrationError
        When the text is too short.
    """
    # No token is longer than this many characters on average, so a long text need not be tokenised whole. A cut
    # inside the text could change its last tokens only, which are beyond the windows.
    needed = windows * length
    characters = 16 * needed + 4096
    while True:
        ids = tokenizer(text.text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > needed + 64 or characters >= len(text.text):
            break
        characters *= 4
    if len(ids) < needed:
        raise CalibrationError(
            f"The text {text.name} has {len(ids)} tokens, but {windows} windows of {length} need {needed}. Give a longer "
            f"text with --text"
            + (
                f", or at most --windows {len(ids) // length}."
                if len(ids) >= length
                else f", or a smaller --sequence-length than {len(ids) + 1}."
            )
        )
    return torch.tensor(ids[:needed]).view(windows, length)


def file_tokenizer(file: bstk.Reader, options: Options) -> Any:
    """The tokenizer in a file.

    Parameters
    ----------
    file : bstk.Reader
    options : Options
        Say whether Python code that it needs may run.

    Raises
    ------
    bstack.errors.CalibrationError
        The file has none.
    bstack.errors.UnsupportedModelError
        It cannot be used.
    """
    from bstack.engine.container import embedded_files, load_tokenizer
    from bstack.models.code import stage_code

    if "tokenizer_config.json" not in file.files:
        raise CalibrationError(
            "The file has no tokenizer, so no text can be read and no quality measured. Use --no-quality for its speed."
        )
    with embedded_files(file) as folder:
        trusted = stage_code(file, folder, options.trust_remote_code, options.code)
        return load_tokenizer(folder, file.source.name, trusted)


def window_length(file: bstk.Reader, asked: int | None) -> int:
    """Tokens in a window: as many as asked for, or 512, or what the model reads if that is less.

    Raises
    ------
    bstk.UsageError
        The model was not made to read as many as were asked for.
    """
    config = json.loads(file.file("config.json")) if "config.json" in file.files else {}
    limits = [config[key] for key in ("max_position_embeddings", "n_positions") if isinstance(config.get(key), int)]
    if asked is None:
        return min([LENGTH, *limits])
    if limits and asked > min(limits):
        raise bstk.UsageError(
            f"this model reads at most {min(limits)} tokens, and windows of {asked} were asked for. "
            f"Give at most --sequence-length {min(limits)}."
        )
    return asked
