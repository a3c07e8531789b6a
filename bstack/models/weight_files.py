"""Which files of a transformers folder hold the weights: those that transformers reads, or a refusal that says what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bstack.errors import UnsupportedModelError
from bstk.errors import BstkError, DamagedError, UsageError

__all__ = ["INDEX", "SINGLE", "no_model", "read_json", "weight_files"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_PICKLE = (".bin", ".pt", ".pth", ".ckpt")


def weight_files(folder: Path, names: Collection[str], shown: str) -> tuple[list[str], str | None]:
    """Return the names of the files with the weights, as transformers chooses them, and of the index that lists them, if one does.

    Parameters
    ----------
    folder : Path
        Has the small files: config.json and the index, if there is one.
    names : collection of str
        All files of the model, as paths inside its folder; those with weights may be elsewhere still.
    shown : str
        What messages call the folder.

    Raises
    ------
    bstk.UsageError, bstk.DamagedError, bstack.errors.UnsupportedModelError
        There are none that transformers reads, or not those of one model alone.
    """
    if ADAPTER in names:
        raise _adapter(folder, names, shown)
    if ranks := sorted(name for name in names if _RANKS.match(name)):
        raise UnsupportedModelError(
            f"{shown} has {ranks[0]}, a part of a distributed checkpoint, which transformers would read "
            f"instead of {SINGLE}.",
            hint="Load it with transformers, call save_pretrained, and give that folder.",
        )
    chosen = read_json(folder / "config.json").get("transformers_weights") or SINGLE
    if chosen == SINGLE and SINGLE not in names and INDEX in names:
        chosen = INDEX
    if not isinstance(chosen, str) or not chosen.endswith((".safetensors", ".safetensors.index.json")):
        raise UnsupportedModelError(
            f"{shown}: its config.json names {chosen!r} as the file of the weights (transformers_weights), which is no "
            "safetensors file."
        )
    if chosen not in names:
        raise no_model(folder, names, shown, f"has no {chosen}" + (f" and no {INDEX}" if chosen == SINGLE else ""))
    if chosen.endswith(".safetensors"):
        return [chosen], None
    shards = _shards(folder / chosen, shown)
    if absent := [name for name in shards if name not in names]:
        raise DamagedError(f"{shown} lacks {len(absent)} of {len(shards)} shards, first {absent[0]}.")
    return shards, chosen


def no_model(folder: Path, names: Collection[str], shown: str, lacking: str) -> BstkError:
    """Return the error for a folder without config.json or weights (`lacking` says which), with a way out if there is one."""
    top = sorted(name for name in names if "/" not in name)

    def first(*endings: str) -> str | None:
        return next((name for name in top if name.endswith(endings)), None)

    if ADAPTER in top:
        return _adapter(folder, names, shown)
    if (found := first(".gguf")) is not None:
        return UsageError(f"{shown} {lacking}, but {found}. Give that file, by its path.")
    if (found := first(".safetensors")) is not None:
        if found.startswith("consolidated"):
            what = "weights in the form and with the names of Mistral's or Meta's own programs, which transformers does not read"
            way = "Give the model in transformers' form."
        elif variant := re.fullmatch(r"model\.(.+?)(-\d+-of-\d+)?\.safetensors", found):
            what = f"the variant {variant[1]!r}, which transformers reads only when asked for it"
            way = f"Load it with transformers (variant={variant[1]!r}), call save_pretrained, and give that folder."
        elif re.fullmatch(r"model-\d+-of-\d+\.safetensors", found):
            what, way = "a shard", f"Fetch {INDEX} too, which says what is where."
        else:
            what, way = "a file that transformers does not look for", f"If it holds the weights, call it {SINGLE}."
        return UnsupportedModelError(f"{shown} {lacking}, but {found}: {what}. {way}")
    if (found := first(*_PICKLE)) is not None:
        return UnsupportedModelError(
            f"{shown} has {found}, a pickle. bstack never unpickles: convert it to safetensors first "
            "(load it with transformers and call save_pretrained)."
        )
    wanted = "config.json" if "config.json" not in names else SINGLE
    if inside := sorted(name for name in names if name.endswith("/" + wanted)):
        return UsageError(
            f"{shown} {lacking}, but {inside[0]}. Give that folder: {shown}/{inside[0].rpartition('/')[0]}."
        )
    return UsageError(f"{shown} {lacking}, so it is not a transformers folder with weights.")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is none, for transformers then says what is wrong."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _adapter(folder: Path, names: Collection[str], shown: str) -> BstkError:
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    whole = "config.json" in names and (SINGLE in names or INDEX in names)
    return UnsupportedModelError(
        f"{shown} has the adapter of a model ({ADAPTER})"
        + (" beside whole weights, and transformers adds it where peft is installed" if whole else "")
        + (f"; its base model is {base}" if isinstance(base, str) else "")
        + ". bstack compresses whole models: merge it (peft: merge_and_unload, then save_pretrained)"
        + (", or take the adapter's files out of the folder." if whole else ", and give that folder.")
    )


def _shards(index: Path, shown: str) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) and ".." not in name.split("/") for name in shards) or not shards:
            raise ValueError
        return shards
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedError(
            f"{shown}/{index.name} is not a safetensors index: it is not JSON with a weight_map of files."
        ) from None
