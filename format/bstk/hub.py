"""Places on the hub: ``hf://`` names, the addresses behind them, the access token, a repository's only .bstk file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from .errors import RemoteError

MAX_LISTED = 8  # names of files in a message


def is_hub(url: str) -> bool:
    """Return whether a URL names a place on the hub."""
    return url.lower().startswith("hf://")


@dataclass(frozen=True)
class HubPlace:
    """A place on the hub: a repository of models at a revision, and a file in it or, with an empty name, its only .bstk file."""

    repository: str
    revision: str
    file: str

    @classmethod
    def parse(cls, url: str) -> HubPlace:
        """Read ``hf://OWNER/REPO[@REVISION][/FILE]``; a slash in a revision is written %2F, except in ``refs/pr/1``."""
        match = _HUB.fullmatch(url)
        if match is None:
            raise RemoteError(
                f"{url}: a file in a model repository of the hub is named hf://OWNER/REPO[@REVISION]/FILE, and its only .bstk "
                "file hf://OWNER/REPO[@REVISION].",
                missing=True,
            )
        return cls(match["repository"], unquote(match["revision"] or "main"), match["file"] or "")

    def address(self) -> str:
        """Return the address of the file on the hub's server."""
        return f"{_endpoint()}/{quote(self.repository)}/resolve/{quote(self.revision, safe='')}/{quote(self.file)}"

    def listing(self) -> str:
        """Return the address that answers with the names of all files."""
        return f"{_endpoint()}/api/models/{quote(self.repository)}/revision/{quote(self.revision, safe='')}"


# As huggingface_hub reads it.
_HUB = re.compile(
    r"hf://(?:models/)?(?!(?:datasets|spaces|kernels|buckets)/)(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<file>.+)|/?)",
    re.IGNORECASE,
)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def token(url: str) -> str | None:
    """Return the access token for an ``hf://`` URL, where huggingface_hub looks for it; None for other URLs."""
    if not is_hub(url):
        return None
    given = _clean(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or "")
    if given:
        return given
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    path = os.environ.get("HF_TOKEN_PATH", os.path.join(_expand(home), "token"))
    try:
        return _clean(Path(_expand(path)).read_text())
    except (OSError, ValueError):
        return None


def _expand(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def _clean(text: str) -> str | None:
    return text.replace("\r", "").replace("\n", "").strip() or None


def only_file(answer: Any, name: str) -> str:
    """Return the name of the only .bstk file in what the hub says of the repository `name`."""
    siblings = answer.get("siblings") if isinstance(answer, dict) else None
    entries = [entry.get("rfilename") for entry in siblings or () if isinstance(entry, dict)]
    names = sorted(entry for entry in entries if isinstance(entry, str) and entry.lower().endswith(".bstk"))
    if len(names) == 1:
        return names[0]
    if not names:
        raise RemoteError(f"{name}: the repository has no .bstk file.", hint="Check the name.", missing=True)
    listed = ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if names[MAX_LISTED:] else "")
    hint = f"Name one, such as {name.rstrip('/')}/{names[0]}."
    raise RemoteError(f"{name}: the repository has {len(names)} .bstk files: {listed}.", hint=hint, missing=True)
