"""Python code that the model of a container needs: nothing of it is in the container."""

from __future__ import annotations

from pathlib import Path

import bstk
from bstack.errors import ForeignCodeError
from bstack.models.code import Code, find_code, put_code
from bstack.models.references import check_known, references, refusal, required
from bstk.errors import UsageError

__all__ = ["allowed_code", "check_trust", "refuse_tokenizer", "stage_code"]

ADVICE = (
    "No .bstk file holds code. If you trust it, add --trust-remote-code, and --code with the folder or hub id that it is in "
    "(in Python trust_remote_code=True and code)."
)


def check_trust(trust_remote_code: bool, code: str | None) -> None:
    """Refuse a place of code that may not run; raises bstk.UsageError."""
    if code is not None and not trust_remote_code:
        raise UsageError(f"--code {code} names Python code to run. If you trust it, add --trust-remote-code.")


def allowed_code(file: bstk.Reader, folder: Path, trust_remote_code: bool, code: str | None) -> Code | None:
    """The code that a model needs, if the user allows it; otherwise refuse a model that needs any.

    Parameters
    ----------
    file : bstk.Reader
    folder : Path
        The model's files, as transformers is to read them. What they hold of Python code themselves never runs.
    trust_remote_code : bool
    code : str or None
        A folder or a hub id; None for the hub id that the file names.

    Returns
    -------
    Code or None
        With its modules; None where the model needs none.

    Raises
    ------
    bstack.errors.ForeignCodeError
        Code is needed, and not allowed or not to be found.
    """
    shown = file.source.name
    if not trust_remote_code:
        check_known(folder, shown, ADVICE)
        return None
    if not (found := required(folder)):
        return None
    place = code or _recorded(file)
    if place is None:
        raise ForeignCodeError(
            f"{shown}: this model needs Python code: {', '.join(sorted(found.values()))}. It was compressed from a folder, and "
            "no .bstk file holds code: name the folder or hub id that it is in with --code (in Python code=)."
        )
    return find_code(place).needed(found, shown)


def stage_code(file: bstk.Reader, folder: Path, trust_remote_code: bool, code: str | None) -> bool:
    """Put the `allowed_code` beside a model's files; return whether transformers may run code that it finds there.

    Parameters and errors are those of `allowed_code`.
    """
    found = allowed_code(file, folder, trust_remote_code, code)
    if found is None:
        return False
    put_code(found, folder)
    return True


def refuse_tokenizer(folder: Path, shown: str) -> None:
    """Refuse a tokenizer that names code; raises bstack.errors.ForeignCodeError."""
    if found := {auto: name for auto, name in references(folder).items() if auto == "AutoTokenizer"}:
        raise refusal(shown, found, ADVICE)


def _recorded(file: bstk.Reader) -> str | None:
    """The hub id from which the model was compressed. A file that names a folder of this machine is not listened to."""
    model = file.metadata.get("model")
    recorded = model.get("code") if isinstance(model, dict) else None
    place = recorded.get("from") if isinstance(recorded, dict) else None
    return place if isinstance(place, str) and not Path(place).exists() else None
