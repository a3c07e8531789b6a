"""Python code that a model needs and transformers does not have: refused, or run from a place that the user trusts.

A configuration names such code in ``auto_map``: ``module.Class`` beside it, ``owner/name--module.Class`` on the hub.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bstack.errors import ForeignCodeError, ForeignCodeWarning, UnsupportedModelError, reason
from bstack.models.hub import hub_snapshot

__all__ = ["ADVICE", "CODE_FILES", "Code", "check_known", "find_code", "lacking", "name_place", "names_beside", "own_attention", "own_code", "put_code", "references", "refusal", "required"]

CODE_FILES = ["*.py"]
# File -> the automatic classes that bstack uses and that the file may redirect.
_MAPS = {"config.json": ("AutoConfig", "AutoModelForCausalLM"), "tokenizer_config.json": ("AutoTokenizer",)}
_ELSEWHERE = "--"
ADVICE = "Read it; if you trust it, add --trust-remote-code (in Python trust_remote_code=True)."


@dataclass(frozen=True)
class Code:
    """Code that the user allows to run.

    Attributes
    ----------
    folder : Path
        Holds the modules.
    origin : str
        For people: the folder, or ``owner/name@commit``.
    hub : str or None
        The latter; None for a folder, whose path is nobody's business.
    modules : tuple of str
        Files in `folder`: what the model's files name, and what those import from beside them.
    classes : tuple of str
        The automatic classes that need them.
    """

    folder: Path
    origin: str
    hub: str | None
    modules: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def needed(self, found: dict[str, str], shown: str) -> Code:
        """With the modules that the `references` of a model need; warns that they run.

        Raises
        ------
        bstack.errors.ForeignCodeError
            A module that the model's files name is not there, cannot be read, or has a name that transformers does not take.
        """
        modules: set[str] = set()
        for reference in found.values():
            module, _, name = reference.rpartition(_ELSEWHERE)[2].partition(".")
            if not (module.isidentifier() and name.isidentifier()):
                raise ForeignCodeError(
                    f"{shown}: its configuration names code as {reference!r}; allowed is module.Class, a file beside it and a class in it."
                )
            if not (self.folder / f"{module}.py").is_file():
                raise ForeignCodeError(f"{shown}: its configuration names {reference}, but {self.origin} holds no {module}.py.")
            self._add_imports(module, modules, shown)
        names = tuple(f"{module}.py" for module in sorted(modules))
        warnings.warn(
            f"{shown}: running Python code from {self.origin}: {', '.join(names)}. It can do what you can.",
            ForeignCodeWarning, stacklevel=3,
        )  # fmt: skip
        return replace(self, modules=names, classes=tuple(found))

    def _add_imports(self, module: str, known: set[str], shown: str) -> None:
        """Add a module to those known, and what it imports from beside it."""
        from transformers.dynamic_module_utils import get_relative_imports

        if module in known:
            return
        if not module.isidentifier():
            raise ForeignCodeError(f"{shown}: its code imports .{module}; transformers takes modules only from beside those that import them.")
        known.add(module)
        try:
            imported = get_relative_imports(self.folder / f"{module}.py")
        except (OSError, UnicodeDecodeError) as error:
            raise ForeignCodeError(f"{shown}: its code is in {module}.py of {self.origin}, which cannot be read: {reason(error)}.") from None
        for other in sorted(imported):
            self._add_imports(other, known, shown)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values: where it is from, if that is public, and the digests of the modules."""
        digests = {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in self.modules}
        return {"from": self.hub, "modules": digests}


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


def own_code(folder: Path, shown: str, hub: str | None) -> Code | None:
    """The code of a checkpoint that the user trusts; None where it needs none.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    shown : str
        Its name, for messages.
    hub : str or None
        Where the folder comes from: ``owner/name@commit``.

    Raises
    ------
    bstack.errors.UnsupportedModelError
        The code is in more than one place.
    """
    found = required(folder)
    places = {reference.rpartition(_ELSEWHERE)[0] for reference in found.values()}
    if not places:
        return None
    if len(places) > 1:
        raise UnsupportedModelError(
            f"{shown}: its code is in {len(places)} places: {', '.join(sorted(found.values()))}. bstack takes it from one: copy "
            "the modules into the model's folder and take the part before -- out of auto_map."
        )
    place = places.pop()
    code = find_code(place) if place else Code(folder, hub or str(folder), hub)
    return code.needed(found, shown)


def find_code(place: str) -> Code:
    """The code in a folder or on the hub (``owner/name``, optionally ``@revision``).

    Raises
    ------
    bstack.errors.ModelNotFoundError
    """
    if Path(place).is_dir():
        return Code(Path(place), place, None)
    folder = hub_snapshot(place, CODE_FILES, "Name the folder or the hub id with the model's Python code.")
    origin = f"{place.partition('@')[0]}@{folder.name}"
    return Code(folder, origin, origin)


def put_code(code: Code, folder: Path) -> None:
    """Put the modules beside a model's files, in place of any that are there, and have the files name no others.

    What the files say of code that is not needed is taken out, for transformers would run it.
    """
    for stranger in sorted(folder.rglob("*.py")):  # a folder before what is in it
        if stranger.is_dir():
            shutil.rmtree(stranger)
        else:
            stranger.unlink(missing_ok=True)
    for module in code.modules:
        shutil.copyfile(code.folder / module, folder / module)
    for name, classes in _MAPS.items():
        if "auto_map" in (content := _json(folder / name)):
            mapping = _without_places(content["auto_map"])
            if isinstance(mapping, list):
                mapping = {"AutoTokenizer": mapping}
            if isinstance(mapping, dict):
                mapping = {auto: value for auto, value in mapping.items() if auto not in classes or auto in code.classes}
            content["auto_map"] = mapping
            (folder / name).write_text(json.dumps(content), encoding="utf-8")


def name_place(code: Code, folder: Path) -> None:
    """Have a model's files say on the hub where the code is, if it is there."""
    if code.hub is None:
        return
    place = code.hub.partition("@")[0]
    for name, classes in _MAPS.items():
        content = _json(folder / name)
        mapping = content.get("auto_map")
        if isinstance(mapping, dict):
            content["auto_map"] = {auto: _placed(value, place) if auto in classes else value for auto, value in mapping.items()}
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def names_beside(folder: Path) -> bool:
    """Whether a model's files need code that is to lie beside them."""
    return any(_ELSEWHERE not in name for name in required(folder).values())


def own_attention(config: Any) -> None:
    """Have transformers choose how attention and experts are computed.

    A configuration may name kernels of the hub for it, which are code: fetched and run where the package kernels is installed.
    """
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, name, None) not in (None, "eager", "sdpa"):
            setattr(config, name, None)
    for part in getattr(config, "sub_configs", None) or ():
        if (inner := getattr(config, part, None)) is not None:
            own_attention(inner)


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return value.rpartition(_ELSEWHERE)[2] if isinstance(value, str) else value


def _placed(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_placed(one, place) for one in value]
    return f"{place}{_ELSEWHERE}{value.rpartition(_ELSEWHERE)[2]}" if isinstance(value, str) else value


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
