"""A checkpoint's files beside its weights in a folder of their own, with the code that may run and no other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bstack.errors import UnsupportedModelError, one_line
from bstack.models.code import Code, put_code
from bstack.models.files import put_files
from bstk.errors import os_errors

__all__ = ["BESIDE", "staged"]

# What is read beside the weights: configuration, vocabularies, chat templates. A checkpoint may hold anything else too: data
# sets, its weights once more in other formats.
BESIDE = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.bpe", "*.spm"]
PIECE = 2**20


def staged(folder: Path, code: Code) -> Path:
    """Copy what is beside the weights of a checkpoint, and put the code there.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    code : Code
        With the modules that it needs.

    Returns
    -------
    Path
        A folder alone in a temporary one, which the caller deletes.

    Raises
    ------
    bstk.ResourceError, bstk.OutputError
        It cannot be written.
    bstack.errors.UnsupportedModelError
        A file of the checkpoint cannot be read.
    """
    temporary = Path(tempfile.mkdtemp(prefix="bstack-"))
    target = temporary / "model"  # the same each time: transformers keeps code that it runs under the folder's name
    try:
        with os_errors(str(target)):
            target.mkdir()
        put_files(
            ((file.relative_to(folder).as_posix(), _pieces(file)) for file in _beside(folder)), target, str(folder)
        )
        with os_errors(str(target)):
            put_code(code, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _beside(folder: Path) -> list[Path]:
    from transformers.utils import CHAT_TEMPLATE_DIR

    places = (folder, folder / CHAT_TEMPLATE_DIR)
    return [file for place in places for pattern in BESIDE for file in sorted(place.glob(pattern)) if file.is_file()]


def _pieces(file: Path) -> Iterator[bytes]:
    try:
        with open(file, "rb") as stream:
            while piece := stream.read(PIECE):
                yield piece
    except OSError as error:
        raise UnsupportedModelError(f"{file} cannot be read: {error.strerror or one_line(error)}.") from None
