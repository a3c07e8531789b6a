"""Python code that a model needs and transformers does not have: found and put where the user trusts it to run."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bstack.errors import ForeignCodeError, ForeignCodeWarning, UnsupportedModelError, one_line
from bstack.models.hub import hub_snapshot
from bstack.models.references import ELSEWHERE, keep_references, required

__all__ = ["CODE_FILES", "Code", "find_code", "own_attention", "own_code", "put_code"]

CODE_FILES = ["*.py"]


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
            module, _, name = reference.rpartition(ELSEWHERE)[2].partition(".")
            if not (module.isidentifier() and name.isidentifier()):
                raise ForeignCodeError(
                    f"{shown}: its configuration names code as {reference!r}; allowed is module.Class, a file beside it and a class in it."
                )
            if not (self.folder / f"{module}.py").is_file():
                raise ForeignCodeError(
                    f"{shown}: its configuration names {reference}, but {self.origin} holds no {module}.py."
                )
            self._add_imports(module, modules, shown)
        names = tuple(f"{module}.py" for module in sorted(modules))
        warnings.warn(
            f"{shown}: running Python code from {self.origin}: {', '.join(names)}. It can do what you can.",
            ForeignCodeWarning,
            stacklevel=3,
        )
        return replace(self, modules=names, classes=tuple(found))

    def _add_imports(self, module: str, known: set[str], shown: str) -> None:
        """Add a module to those known, and what it imports from beside it."""
        from transformers.dynamic_module_utils import get_relative_imports

        if module in known:
            return
        if not module.isidentifier():
            raise ForeignCodeError(
                f"{shown}: its code imports .{module}; transformers takes modules only from beside those that import them."
            )
        known.add(module)
        try:
            imported = get_relative_imports(self.folder / f"{module}.py")
        except (OSError, UnicodeDecodeError) as error:
            raise ForeignCodeError(
                f"{shown}: its code is in {module}.py of {self.origin}, which cannot be read: {one_line(error)}."
            ) from None
        for other in sorted(imported):
            self._add_imports(other, known, shown)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values: where it is from, if that is public, and the digests of the modules."""
        digests = {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in self.modules}
        return {"from": self.hub, "modules": digests}


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
    places = {reference.rpartition(ELSEWHERE)[0] for reference in found.values()}
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
    keep_references(folder, code.classes)


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
