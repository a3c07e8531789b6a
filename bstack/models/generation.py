"""The generation settings beside a model's weights: what transformers accepts of them is kept, the rest named in a warning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from bstack.errors import ModelWarning, one_line

__all__ = ["GENERATION", "read_generation"]

GENERATION = "generation_config.json"
# These must be token ids or lists of them; transformers checks it only when text is written.
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
# Which values others may have depends on these.
_MODE = ("do_sample", "num_beams")


def read_generation(folder: Path, name: str) -> dict[str, Any] | None:
    """Return what transformers accepts of a folder's generation settings, with a warning about the rest.

    `name` is the model's, for the warning. None without such a file, or where nothing of it can be used: transformers then
    takes the settings in config.json.
    """
    try:
        found = json.loads((folder / GENERATION).read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}, not an object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        _warn(
            name, f"cannot be read and is left out, so config.json decides which tokens end a text: {one_line(error)}"
        )
        return None
    if _problem(found) is None:
        return found
    kept: dict[str, Any] = {}
    for key in sorted(found, key=lambda key: (key not in _TOKENS, key not in _MODE)):
        if (problem := _problem({**kept, key: found[key]})) is None:
            kept[key] = found[key]
        else:
            _warn(name, f"its {key} is left out, the rest kept: {problem}")
    return kept


def _problem(settings: dict[str, Any]) -> str | None:
    """Return why transformers does not accept settings; None if it does."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    for key in _TOKENS:
        value = settings.get(key)
        listed = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not (
            listed and all(isinstance(token, int) and not isinstance(token, bool) for token in listed)
        ):
            return f"{json.dumps(value)} is no token id"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it logs what it finds odd, here once for each setting
    try:
        GenerationConfig.from_dict(dict(settings))
        return None
    except Exception as error:  # values of other types than expected raise anything
        return one_line(error)
    finally:
        logging.set_verbosity(verbosity)


def _warn(name: str, problem: str) -> None:
    warnings.warn(f"{name}: {GENERATION}: {problem.rstrip('.')}.", ModelWarning, stacklevel=3)
