"""The tokenizer's files as transformers writes them, to be packed into a container."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from bstack.errors import UnsupportedModelError, one_line
from bstack.models.files import MODEL_SUFFIXES, is_model_file
from bstk.errors import os_errors

__all__ = ["export"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def export(
    target: Path, source: Path, trusted: bool = False, display_name: Path | None = None, **kwargs: str
) -> list[str]:
    """Write tokenizer and generation settings of a checkpoint into a folder.

    Parameters
    ----------
    target : Path
        An existing, empty folder.
    source : Path
        The checkpoint's folder.
    trusted : bool
        Whether Python code in `source` may run.
    display_name : Path, optional
        What to call the folder in messages; `source` by default.
    **kwargs
        Passed to transformers (``gguf_file``).

    Returns
    -------
    list of str
        Names of the files written, as paths inside the folder, sorted; without a tokenizer only generation_config.json, or nothing.
    """
    from transformers import AutoTokenizer, GenerationConfig

    display_name = display_name or source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted, **kwargs)
        # For a folder without a vocabulary transformers makes a tokenizer with special tokens only.
        words = tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        # transformers raises all these for a folder without a tokenizer, whose model is usable with token ids. A tokenizer
        # that is there and cannot be read must not get lost silently.
        if present := [name for name in TOKENIZER_FILES if (source / name).is_file()]:
            raise UnsupportedModelError(
                f"{display_name / present[0]}: the tokenizer cannot be read: {one_line(error)}"
            ) from None
        words = None
    if words:
        _save(tokenizer, target)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except (OSError, ValueError):
        pass  # most folders have none; transformers then derives the settings from config.json
    else:
        _save(generation, target)
    # Further chat templates are in a folder of their own. transformers copies code there too, which stays out.
    names = sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file() and path.suffix != ".py"
    )
    if unknown := [name for name in names if not is_model_file(name)]:
        raise UnsupportedModelError(
            f"{display_name}: its tokenizer writes {unknown[0]}. bstack packs files that end in {', '.join(MODEL_SUFFIXES)}."
        )
    return names


def _save(what: Any, target: Path) -> None:
    with os_errors(str(target)):
        try:
            what.save_pretrained(target)
        except OSError:
            raise
        except Exception as error:
            # The tokenizers library raises bare Exceptions, whose text ends in the system's error number.
            if number := re.search(r"\(os error (\d+)\)$", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise
