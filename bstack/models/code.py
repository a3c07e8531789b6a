"""Python code that a model needs and transformers lacks: refused, or named in a warning and run where the user allows it.

A configuration names such code in ``auto_map``: ``module.Class`` in a file beside it, ``owner/name--module.Class`` on the hub.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bstk
from bstack.errors import ForeignCodeError, ForeignCodeWarning, UnsupportedModelError, one_line
from bstack.models.files import hub_snapshot, is_model_file, put_files
from bstack.models.weight_files import read_json
from bstk.errors import os_errors

__all__ = ["Code", "allowed_code", "check_code", "check_trust", "put_code", "recorded_place"]
__all__ += ["reset_choices", "stage_code", "stage_model", "write_references"]

# File -> the automatic classes that bstack uses and that the file may redirect.
_MAPS = {"config.json": ("AutoConfig", "AutoModelForCausalLM"), "tokenizer_config.json": ("AutoTokenizer",)}
# That transformers builds models in; None: in float32.
_TYPES = ("None", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Code:
    """Modules that the user allows to run."""

    folder: Path
    hub: str | None  # where they come from, owner/name@commit; None for a folder, whose path is private
    # File name -> SHA-256, of the modules that auto_map names and of those that they import from beside them.
    digests: dict[str, str]
    references: dict[str, str]  # automatic class -> module.Class

    def to_json(self) -> dict[str, Any]:
        """Return what a container's metadata record: the place if it is public, and the digests."""
        return {"from": self.hub, "modules": self.digests}


def check_code(folder: Path, name: str, trust_remote_code: bool, hub: str | None = None) -> Code | None:
    """Return the code that a checkpoint needs, after a warning that names it; None where it needs none.

    Code that is not allowed or not found is a ForeignCodeError. `hub` is where the folder comes from, ``owner/name@commit``.
    """
    if not (found := _needed(folder, name, trust_remote_code)):
        return None
    places = {reference.rpartition("--")[0] for reference in found.values()}
    if len(places) > 1:
        raise UnsupportedModelError(
            f"{name}: its code is in {len(places)} places: {', '.join(sorted(found.values()))}.",
            hint="Copy the modules into the model's folder, and leave only module.Class in auto_map.",
        )
    return _find(place, found, name) if (place := places.pop()) else _load(folder, hub, found, name)


def allowed_code(file: bstk.Reader, folder: Path, trust_remote_code: bool, code: str | None) -> Code | None:
    """Return the code that the model of a container needs, after a warning that names it; None where it needs none.

    Parameters
    ----------
    file : bstk.Reader
    folder : Path
        Holds the files that the container carries.
    trust_remote_code : bool
    code : str or None
        A folder or a hub id with the code; None for the hub id that the file records.

    Raises
    ------
    bstack.errors.ForeignCodeError
        Code is needed, and not allowed or not found.
    """
    name = file.source.name
    if not (found := _needed(folder, name, trust_remote_code)):
        return None
    if (place := code or recorded_place(file)) is None:
        raise ForeignCodeError(
            f"{name}: this model needs Python code: {', '.join(sorted(found.values()))}. It was compressed "
            "from a folder, and no .bstk file holds code.",
            hint="Name the folder or hub id that has it (code).",
            option="code",
        )
    return _find(place, found, name, _record(file).get("modules"))


def stage_code(file: bstk.Reader, folder: Path, trust_remote_code: bool, code: str | None) -> bool:
    """Put the `allowed_code` beside a container's files; return whether transformers may run code that lies there."""
    if (found := allowed_code(file, folder, trust_remote_code, code)) is not None:
        put_code(found, folder)
    return found is not None


def stage_model(folder: Path, code: Code) -> Path:
    """Copy the files beside a checkpoint's weights into a temporary folder, with `code` and no other code.

    transformers runs code from the folder that it reads: this way it runs what was announced and recorded, at one commit.
    The caller deletes the parent of the folder that is returned.
    """
    from transformers.utils import CHAT_TEMPLATE_DIR

    target = Path(tempfile.mkdtemp(prefix="bstack-")) / "model"  # one name: transformers caches code under it
    files = [*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*")]
    names = [file.relative_to(folder).as_posix() for file in files if file.is_file() and is_model_file(file.name)]
    try:
        target.mkdir()
        put_files(((name, [(folder / name).read_bytes()]) for name in names), target, str(folder))
        put_code(code, target)
    except BaseException:
        shutil.rmtree(target.parent, ignore_errors=True)
        raise
    return target


def put_code(code: Code, folder: Path) -> None:
    """Copy the modules beside a model's files, and have the files name them and no others."""
    with os_errors(str(folder)):
        for module in code.digests:
            shutil.copyfile(code.folder / module, folder / module)
    write_references(code, folder)


def write_references(code: Code, folder: Path, place: str = "") -> None:
    """Have a model's files name `code`, beside them or in the hub's repository `place`, in their ``auto_map``."""
    for file, classes in _MAPS.items():
        if "auto_map" in (content := read_json(folder / file)):
            prefix = f"{place}--" if place else ""
            named: dict[str, Any] = {auto: prefix + name for auto, name in code.references.items() if auto in classes}
            if "AutoTokenizer" in named:
                named["AutoTokenizer"] = [None, named["AutoTokenizer"]]
            content["auto_map"] = named
            with os_errors(str(folder / file)):
                (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_trust(trust_remote_code: bool, code: str | None) -> None:
    """Refuse a place of code without the permission to run it; raises bstack.errors.ForeignCodeError."""
    if code is not None and not trust_remote_code:
        raise ForeignCodeError(
            f"{code} is named as Python code to run (code), but running it is not allowed.",
            hint="If you trust it, allow it (trust_remote_code).",
            option="trust_remote_code",
        )


def recorded_place(file: bstk.Reader) -> str | None:
    """Return the hub id and commit that a container records for its code. A folder of this machine is ignored."""
    place = _record(file).get("from")
    return place if isinstance(place, str) and not Path(place).exists() else None


def reset_choices(config: Any) -> None:
    """Let transformers choose how attention and experts are computed, and in which type: a configuration may name kernels of
    the hub for that, which are code, or a type that it builds no model in, such as one of 8 bits."""
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, name, None) not in (None, "eager", "sdpa"):
            setattr(config, name, None)
    if str(getattr(config, "dtype", None)).removeprefix("torch.") not in _TYPES:
        config.dtype = None
    for part in getattr(config, "sub_configs", None) or ():
        if (inner := getattr(config, part, None)) is not None:
            reset_choices(inner)


def _needed(folder: Path, name: str, trust_remote_code: bool) -> dict[str, str]:
    """Return what of ``auto_map`` must run, automatic class -> reference; empty where transformers has all that is needed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: dict[str, str] = {}
    for file, classes in _MAPS.items():
        mapping: Any = read_json(folder / file).get("auto_map")
        if isinstance(mapping, list):  # the old form of tokenizers
            mapping = {"AutoTokenizer": mapping}
        for auto in classes if isinstance(mapping, dict) else ():
            value = mapping.get(auto)
            # A tokenizer names a slow and a fast class; transformers prefers the fast one.
            for reference in reversed(value if isinstance(value, list) else [value]):
                if isinstance(reference, str):
                    found.setdefault(auto, reference)
    kind = read_json(folder / "config.json").get("model_type")
    known = {"AutoConfig": CONFIG_MAPPING_NAMES, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    if all(auto not in found or (isinstance(kind, str) and kind in names) for auto, names in known.items()):
        found = {auto: found[auto] for auto in found if auto == "AutoTokenizer" and not _has_tokenizer(folder)}
    if found and not trust_remote_code:
        raise ForeignCodeError(
            f"{name}: this model needs Python code that is not in transformers: "
            f"{', '.join(sorted(found.values()))}. It can do with your machine what you can.",
            hint="Read it; if you trust it, allow it (trust_remote_code).",
            option="trust_remote_code",
        )
    return found


def _find(place: str, found: dict[str, str], name: str, recorded: object = None) -> Code:
    """Return the code in a folder or on the hub (``owner/name``, optionally ``@revision``)."""
    if Path(place).is_dir():
        return _load(Path(place), None, found, name, recorded)
    folder = hub_snapshot(place, ["*.py"], "Name the folder or the hub id with the model's Python code.")
    return _load(folder, f"{place.partition('@')[0]}@{folder.name}", found, name, recorded)


def _load(folder: Path, hub: str | None, found: dict[str, str], name: str, recorded: object = None) -> Code:
    """Collect the modules that run, and warn about them and about those that are not the recorded ones."""
    from transformers.dynamic_module_utils import get_relative_import_files

    origin = hub or str(folder)
    references = {auto: reference.rpartition("--")[2] for auto, reference in found.items()}
    digests: dict[str, str] = {}
    for reference in references.values():
        module, _, kind = reference.partition(".")
        if not (module.isidentifier() and kind.isidentifier()):
            raise ForeignCodeError(
                f"{name}: its configuration names code as {reference!r}. Allowed is module.Class, a class in a file beside it."
            )
        try:
            first = folder / f"{module}.py"
            for file in [first, *map(Path, get_relative_import_files(first))]:
                if file.parent != folder:
                    raise OSError(f"{file} is not in that folder")
                digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        except (OSError, UnicodeDecodeError) as error:
            raise ForeignCodeError(
                f"{name}: its code {reference} in {origin} cannot be read: {one_line(error)}."
            ) from None
    digests = dict(sorted(digests.items()))
    message = f"{name}: running Python code from {origin}: {', '.join(digests)}. It can do what you can."
    if isinstance(recorded, dict) and (other := [file for file in digests if digests[file] != recorded.get(file)]):
        message += f" Other code than the model was compressed with: {', '.join(other)}."
    warnings.warn(message, ForeignCodeWarning, stacklevel=4)
    return Code(folder, hub, digests, references)


def _record(file: bstk.Reader) -> dict[str, Any]:
    """Return what a container records of its model's code."""
    model = file.metadata.get("model")
    record = model.get("code") if isinstance(model, dict) else None
    return record if isinstance(record, dict) else {}


def _has_tokenizer(folder: Path) -> bool:
    """Try whether transformers makes the tokenizer without its code: only transformers knows."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # also a panic of the tokenizers library, which is no Exception
        return False
    return True
