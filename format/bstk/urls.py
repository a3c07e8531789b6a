"""URLs: which names are URLs, what messages show of them, the address and the token of ``hf://``."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, urlsplit

from .errors import RemoteError

_SCHEMES = ("https://", "http://", "hf://")


def is_url(what: object) -> bool:
    """Whether `what` is text that starts with ``https://``, ``http://`` or ``hf://``."""
    return isinstance(what, str) and what.lower().startswith(_SCHEMES)


def shown(url: str) -> str:
    """Return `url` without the parts that may be secret: user, password, and the query, which holds the key of signed URLs."""
    try:
        parts = urlsplit(url)
    except ValueError:  # an invalid address, which is refused later
        return url.partition("?")[0]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def address(url: str) -> str:
    """Return the address to request: on the hub's server for ``hf://OWNER/REPO[@REVISION]/FILE``, else `url` itself.

    The server is the environment variable HF_ENDPOINT, or huggingface.co.

    Raises
    ------
    RemoteError
        It starts with ``hf://`` and does not continue as shown.
    """
    if not _is_hub(url):
        return url
    owner, _, rest = url[len("hf://") :].partition("/")
    repository, _, file = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not (owner and repository and file):
        raise RemoteError(
            f"{url}: a file on the hub is named hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE.", missing=True
        )
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    return f"{endpoint}/{quote(owner)}/{quote(repository)}/resolve/{quote(revision or 'main', safe='')}/{quote(file)}"


def token(url: str) -> str | None:
    """Return the access token for an ``hf://`` URL: the one that huggingface_hub uses. None for other URLs."""
    return hub_token() if _is_hub(url) else None


def hub_token() -> str | None:
    """Return the token of HF_TOKEN, HUGGING_FACE_HUB_TOKEN, or the file that ``hf auth login`` writes, if there is one."""
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


def _is_hub(url: str) -> bool:
    return url.lower().startswith("hf://")
