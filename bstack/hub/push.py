"""Upload a container to a repository on the hub, with a card and the files by which transformers loads it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bstk
from bstack.engine.folder import weights_name, write_packed_files
from bstack.errors import one_line, printable
from bstack.folders import new_folder
from bstack.hub.card import CARD, PICTURE, base_model_of, draw_curve, model_card
from bstack.models.tokenizer import tokenizer_files
from bstk.errors import BstkError, RemoteError, UsageError, os_errors

__all__ = ["Pushed", "push", "write_repository"]

# Beside the files of tokenizers.
_OURS: tuple[str, ...] = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
_OURS += ("generation_config.json", PICTURE)
TEMPLATES = "additional_chat_templates/"
# Seconds that the hub has to name the original's licence.
LICENCE_TIMEOUT = 10.0


@dataclass(frozen=True)
class Pushed:
    """What lies in the repository: names and bytes of all files, what the card says of the original, and the commit's address.

    `url` is None where nothing was uploaded; `licence` and `base_model` are None where they are not known.
    """

    files: dict[str, int]
    base_model: str | None
    licence: str | None
    url: str | None


def push(
    file: bstk.Reader,
    repository: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Upload a container as the only .bstk file of a repository, which is made if it is not there, in one commit.

    Parameters
    ----------
    file : bstk.Reader
        A file on disk, whole or sealed.
    repository : str
        ``owner/name``.
    private : bool
        Make a new repository private; refuse one that is public. Without it the owner's default holds.
    base_model, licence : str, optional
        The original's hub id and licence, for the card. By default the hub id that the file records, and what the hub says of it.

    Raises
    ------
    bstk.UsageError
        The repository's name is invalid, or it is public and must not be; the file is partial or has no config.json, or another
        .bstk file is there.
    bstk.RemoteError
        The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="bstack-") as name:
        folder = Path(name)
        found = _fill(file, folder, repository, base_model, licence)
        weights = weights_name(file)
        with _hub_errors(repository):
            api.create_repo(repository, private=private or None, exist_ok=True)
            if private and not api.repo_info(repository).private:  # it was there before
                raise UsageError(
                    f"{repository} is there already, and public.",
                    hint="Make it private on the hub first, or push to another one.",
                )
            there = api.list_repo_files(repository)
            others = [name for name in there if name.lower().endswith(".bstk") and name != weights]
            if others:
                raise UsageError(
                    f"{repository} has another .bstk file, {others[0]}, and hf://{repository} would name none of them.",
                    hint="Push to a repository of its own, or give the file that name.",
                )
            paths = {name: file.source.name if name == weights else folder / name for name in found.files}
            changes: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
                *(CommitOperationDelete(name) for name in _earlier(there) if name not in paths),
                *(CommitOperationAdd(name, path) for name, path in paths.items()),
            ]
            commit = api.create_commit(repository, changes, commit_message=f"Upload {weights} with bstack")
    return Pushed(found.files, found.base_model, found.licence, str(commit.commit_url))


def write_repository(
    file: bstk.Reader,
    folder: str | os.PathLike[str],
    repository: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Write what `push` would upload beside the container itself into a folder.

    Parameters
    ----------
    file, repository, base_model, licence
        As for `push`.
    folder : path
        Must be empty or not exist. It appears whole or not at all.

    Raises
    ------
    bstk.BstkError
        As `push` does; the folder cannot be written.
    """
    with new_folder(folder) as target:
        return _fill(file, target, repository, base_model, licence)


def _earlier(names: list[str]) -> list[str]:
    """Return the files of a repository that a push of another model leaves there, and that would change what this one does."""
    top = [name for name in names if "/" not in name]
    return [name for name in names if name in _OURS or name.startswith(TEMPLATES)] + tokenizer_files(top)


def _fill(file: bstk.Reader, folder: Path, repository: str, base_model: str | None, licence: str | None) -> Pushed:
    """Write the files of a repository but the container."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError("no owner")
    except HFValidationError:
        raise UsageError(f"{repository!r} is no repository of the hub. Name it as owner/name.") from None
    if file.state == "partial":
        raise UsageError(f"{file.source.name}: {file.partial_message()}")
    base_model = base_model or base_model_of(file)
    licence = licence or (_licence(base_model) if base_model else None)
    weights = weights_name(file)
    write_packed_files(file, folder, weights)
    card = model_card(file, weights, repository, base_model, licence)
    picture = draw_curve(file)
    with os_errors(str(folder)):
        (folder / CARD).write_text(card, encoding="utf-8")
        if picture is not None:
            (folder / PICTURE).write_bytes(picture)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return Pushed(dict(sorted({**sizes, weights: file.length}.items())), base_model, licence, None)


def _licence(base_model: str) -> str | None:
    """Return the licence that the hub names for a model; None where it names none or gives no answer."""
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(base_model, timeout=LICENCE_TIMEOUT).card_data
    except Exception:  # whatever the hub's client and its own client raise
        return None
    found = card.get("license") if card is not None else None
    return found if isinstance(found, str) else None


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn errors of the hub's client into RemoteError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (BstkError, MemoryError):
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = (
            "Log in with hf auth login, or set HF_TOKEN, as somebody who may write there."
            if status in (401, 403)
            else None
        )
        raise RemoteError(f"{repository}: the hub answers: {one_line(error).rstrip('.')}.", hint=hint) from None
    except Exception as error:  # whatever the hub's client and its own client raise
        words = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # it names the file alone
            words = f"{words} {one_line(error.__cause__)}"
        raise RemoteError(
            f"{repository}: it cannot be uploaded: {printable(words).rstrip('.')}.",
            hint="Give the same command again: files that have arrived are not sent twice.",
        ) from None
