"""What a model's files say of Python code outside transformers, in ``auto_map``: read, refused, and written anew.

A configuration names such code as ``module.Class``, in a file beside it, or as ``owner/name--module.Class`` on the hub.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bstack.errors import ForeignCodeError

__all__ = [
    "ADVICE",
    "ELSEWHERE",
    "check_known",
    "keep_references",
    "lacking",
    "name_place",
    "names_beside",
    "references",
    "refusal",
    "required",
]

ELSEWHERE = "--"
"""Parts a place on the hub from the class there."""

ADVICE = "Read it; if you trust it, add --trust-remote-code (in Python trust_remote_code=True)."
# File -> the automatic classes that bstack uses and that the file may redirect.
_MAPS = {"config.json": ("AutoConfig", "AutoModelForCausalLM"), "tokenizer_config.json": ("AutoTokenizer",)}


def references(folder: Path) -> dict[str, str]:
    """What a model's files say of code outside transformers: automatic class -> ``module.Class``."""
    found: dict[str, str] = {}
    for name, classes in _MAPS.items():
        mapping = _json(folder / name).get("auto_map")
        if isinstance(mapping, list):  # as tokenizers were once written
            mapping = {"AutoTokenizer": mapping}
        for auto in classes if isinstance(mapping, dict) else ():
            value = mapping.get(auto)
            # Of a tokenizer's two classes transformers takes the fast one.
            values = [value] if isinstance(value, str) else value[::-1] if isinstance(value, list) else []
            if known := [one for one in values if isinstance(one, str)]:
                found[auto] = known[0]
    return found


def lacking(folder: Path) -> dict[str, str]:
    """The `references` without which transformers cannot make the configuration or the model.

    A tokenizer's is not among them: only transformers knows when it can do without.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = _json(folder / "config.json").get("model_type")
    kind = kind if isinstance(kind, str) else None
    own = {"AutoConfig": CONFIG_MAPPING_NAMES, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return {auto: name for auto, name in references(folder).items() if auto in own and kind not in own[auto]}


def required(folder: Path) -> dict[str, str]:
    """The `references` whose code must run.

    All where transformers lacks the configuration or the model; else that of a tokenizer which it cannot make without, or none.
    """
    found = references(folder)
    if lacking(folder):
        return found
    return {auto: name for auto, name in found.items() if auto == "AutoTokenizer" and not _has_tokenizer(folder)}


def check_known(folder: Path, shown: str, advice: str) -> None:
    """Refuse a model whose code lies outside transformers.

    Raises
    ------
    bstack.errors.ForeignCodeError
    """
    if found := lacking(folder):
        raise refusal(shown, found, advice)


def refusal(shown: str, found: dict[str, str], advice: str) -> ForeignCodeError:
    """The error for code that the user did not allow."""
    return ForeignCodeError(
        f"{shown}: this model needs Python code that is not in transformers: {', '.join(sorted(found.values()))}. Whoever wrote "
        f"it can do with your machine what you can. {advice}"
    )


def keep_references(folder: Path, kept: Collection[str]) -> None:
    """Have a model's files name code beside them, for the automatic classes `kept` and no others that bstack uses."""
    for name, classes in _MAPS.items():
        if "auto_map" in (content := _json(folder / name)):
            mapping = _without_places(content["auto_map"])
            if isinstance(mapping, list):
                mapping = {"AutoTokenizer": mapping}
            if isinstance(mapping, dict):
                mapping = {auto: value for auto, value in mapping.items() if auto not in classes or auto in kept}
            content["auto_map"] = mapping
            (folder / name).write_text(json.dumps(content), encoding="utf-8")


def name_place(folder: Path, place: str) -> None:
    """Have a model's files say that the code is in a repository of the hub, ``owner/name``."""
    for name, classes in _MAPS.items():
        content = _json(folder / name)
        mapping = content.get("auto_map")
        if isinstance(mapping, dict):
            content["auto_map"] = {
                auto: _placed(value, place) if auto in classes else value for auto, value in mapping.items()
            }
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def names_beside(folder: Path) -> bool:
    """Whether a model's files need code that is to lie beside them."""
    return any(ELSEWHERE not in name for name in required(folder).values())


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return value.rpartition(ELSEWHERE)[2] if isinstance(value, str) else value


def _placed(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_placed(one, place) for one in value]
    return f"{place}{ELSEWHERE}{value.rpartition(ELSEWHERE)[2]}" if isinstance(value, str) else value


def _has_tokenizer(folder: Path) -> bool:
    """Whether transformers makes the tokenizer without its code, which only it knows."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # in many ways
        return False
    return True


def _json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none, for transformers then says what is wrong."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
