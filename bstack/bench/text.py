"""The text that quality is measured on, and its windows of tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bstk
from bstack.bench.reference import Reference
from bstack.calibration.texts import TextSource, open_text
from bstack.models.tokenizer import tokenizer_files

__all__ = ["DEFAULT", "Text", "digest", "file_tokenizer", "first_windows", "measuring_text", "window_length"]

DEFAULT = "python-reference"
LENGTH = 512


class Text:
    """The windows to measure quality on."""

    reference: Reference

    def __init__(self, source: TextSource, tokenizer: Any, windows: torch.Tensor, path: Path):
        self.source, self.tokenizer, self.windows, self.path = source, tokenizer, windows, path
        np.save(path, windows.numpy())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values for the report."""
        count, length = self.windows.shape
        return {"name": self.source.name, "sha256": digest(self.source), "windows": count, "sequence_length": length}


def measuring_text(source: str | None) -> TextSource:
    """Read the text to measure on; by default the language reference that the standard library carries for ``help()``.

    It is English prose on every machine with a Python. Its wording changes a little between versions of Python, so its
    digest goes into every report.
    """
    if source is not None:
        return open_text(source)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        message = "This Python comes without pydoc_data, whose text is the default. Give another text."
        raise bstk.BstkError(message, option="text") from None
    return TextSource(DEFAULT, "\n\n".join(topics[name].strip() for name in sorted(topics)))


def digest(text: TextSource) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.text.encode()).hexdigest()


def first_windows(text: TextSource, tokenizer: Any, windows: int, length: int) -> torch.Tensor:
    """Cut the beginning of a text into windows of token ids, one after the other, no special tokens added.

    Raises bstk.BstkError when the text is too short.
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
        enough = len(ids) >= length
        most = f"at most {len(ids) // length} windows" if enough else f"windows of at most {len(ids)} tokens"
        raise bstk.BstkError(
            f"The text {text.name} has {len(ids)} tokens, but {windows} windows of {length} need {needed}.",
            hint=f"Give a longer text, or ask for {most}.",
            option="windows" if enough else "sequence_length",
        )
    return torch.tensor(ids[:needed]).view(windows, length)


def file_tokenizer(file: bstk.Reader, trust_remote_code: bool, code: str | None) -> tuple[Any, int]:
    """Load the tokenizer in a file, and the size of its model's vocabulary; arguments as for `bstack.load`."""
    from bstack.engine.container import embedded_files, load_tokenizer, read_config
    from bstack.models.code import stage_code

    if not tokenizer_files(file.files):
        raise bstk.BstkError(
            "The file has no tokenizer, so its quality cannot be measured.",
            hint="Measure its speed alone, without quality.",
            option="quality",
        )
    with embedded_files(file) as folder:
        trusted = stage_code(file, folder, trust_remote_code, code)
        vocabulary = read_config(file, folder, trusted).get_text_config().vocab_size
        return load_tokenizer(folder, file.source.name, trusted), vocabulary


def window_length(file: bstk.Reader, asked: int | None) -> int:
    """Return the tokens in a window: as many as asked for, or 512, or what the model reads if that is less."""
    config = json.loads(file.file("config.json")) if "config.json" in file.files else {}
    sizes = {**config, **config.get("text_config", {})}  # of a model with a vision part, too
    limits = [sizes[key] for key in ("max_position_embeddings", "n_positions") if isinstance(sizes.get(key), int)]
    if asked is None:
        return min([LENGTH, *limits])
    if limits and asked > min(limits):
        raise bstk.UsageError(
            f"sequence_length is {asked}, but this model reads at most {min(limits)} tokens.",
            hint=f"Give {min(limits)} or less.",
            option="sequence_length",
        )
    return asked
