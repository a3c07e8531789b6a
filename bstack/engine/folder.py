"""What lies beside a model's weights in a folder for transformers; needs neither torch nor transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.numpy

import bstk
from bstack.folders import new_folder
from bstack.models.files import MODEL_SUFFIXES, is_model_file, put_files
from bstack.models.weight_files import INDEX
from bstk.errors import DamagedError, UsageError, os_errors
from bstk.transfer import write_cut

__all__ = ["PLACEHOLDER", "WEIGHTS_KEY", "copy_files", "export_packed", "read_object", "weights_name"]
__all__ += ["write_json", "write_packed_files"]

# Of these, the files that say where weights are.
REFUSED = (INDEX, "adapter_config.json")

SUFFIX = ".bstk"
# The key by which config.json names the file of the weights. transformers refuses any that ends like ours; the quantizer
# (bstack/engine/quantizer.py) names the placeholder instead. So without bstack loading fails, and no random weights run.
WEIGHTS_KEY = "transformers_weights"
# transformers always opens a file of weights. This one has none.
PLACEHOLDER = "placeholder.safetensors"


def copy_files(file: bstk.Reader, target: Path) -> None:
    """Write embedded files into a folder; refuse names on which other programs act, such as `.git`, pickled weights or modules."""
    for name in file.files:
        if name.lower() in REFUSED or not is_model_file(name):
            raise DamagedError(
                f"{file.source.name}: its file {name!r} is none that a model has beside its weights; those end in "
                f"{', '.join(MODEL_SUFFIXES)}, and do not begin with a dot."
            )
    put_files(((name, file.file_pieces(name)) for name in file.files), target, file.source.name)


def write_packed_files(file: bstk.Reader, target: Path, weights: str) -> None:
    """Write what transformers needs beside a .bstk file called `weights`: configuration, tokenizer, the placeholder.

    Raises
    ------
    bstk.UsageError
        The container has no config.json.
    bstk.DamagedError
        An embedded file is not one that a model has beside its weights.
    """
    if "config.json" not in file.files:
        raise UsageError(f"{file.source.name} has no config.json, so transformers cannot load it.")
    copy_files(file, target)
    config = read_object(target / "config.json", file.source.name)
    config.pop("torch_dtype", None)  # the old name of dtype
    # Packed weights have no type; activations are float32, unless another is asked for.
    write_json(target / "config.json", {**config, "dtype": "float32", WEIGHTS_KEY: weights})
    with os_errors(str(target)):
        (target / PLACEHOLDER).write_bytes(safetensors.numpy.save({}, metadata={"format": "pt"}))


def export_packed(
    file: bstk.Reader,
    folder: str | os.PathLike[str],
    *,
    budget: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[bstk.Cut, list[str]]:
    """Write a folder that transformers loads with packed weights: a cut of a container, and what belongs beside it.

    Parameters
    ----------
    file : bstk.Reader
    folder : path
        Must not exist, or be empty. It appears whole or not at all.
    budget : int, optional
        Bytes of the largest cut to write; by default all of the file.
    progress : callable
        Receives the bytes of each piece that is copied.

    Returns
    -------
    cut : bstk.Cut
    files : list of str
        Sorted.

    Raises
    ------
    bstk.BstkError
        As `write_packed_files` and `bstk.truncate`; the folder cannot be written.
    """
    cut = min(file.fit(budget=budget), file.model)
    with new_folder(folder) as target:
        name = weights_name(file)
        write_packed_files(file, target, name)
        if bstk.is_url(file.source.name):
            bstk.truncate(file, target / name, budget=cut.budget, progress=progress)
        else:  # `truncate` refuses to copy all of a file
            whole = cut.chunks == len(file.chunks) and file.state != "partial"
            write_cut(file, cut, target / name, file.seal if whole else cut.file_bytes, progress, False)
        files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    return cut, files


def weights_name(file: bstk.Reader) -> str:
    """Return the name for a container in a folder or repository: its own, with the usual ending."""
    return Path(file.source.name).name.removesuffix(SUFFIX) + SUFFIX


def read_object(path: Path, shown: str) -> dict[str, Any]:
    """Read a JSON object; DamagedError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DamagedError(f"{shown}: its {path.name} is not a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file."""
    with os_errors(str(path)):
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
