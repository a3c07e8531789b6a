"""Which names are URLs, what is shown of them, and what ``hf://`` stands for."""

from __future__ import annotations

import os
from urllib.parse import quote, urlsplit

from .errors import RemoteNotFoundError

_SCHEMES = ("https://", "http://", "hf://")


def is_url(what: object) -> bool:
    """Whether `what` is text that starts with ``https://``, ``http://`` or ``hf://``."""
    return isinstance(what, str) and what.lower().startswith(_SCHEMES)


def shown(url: str) -> str:
    """Return `url` without what may be secret: user, password, and the query, where signed URLs have their key."""
    try:
        parts = urlsplit(url)
    except ValueError:  # a bad address; it will be refused
        return url.partition("?")[0]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def address(url: str) -> str:
    """Return the address to ask: that of the hub's server for ``hf://OWNER/REPO[@REVISION]/FILE``, else `url` itself.

    The server is the one of the environment variable HF_ENDPOINT, or huggingface.co.

    Raises
    ------
    RemoteNotFoundError
        It starts with ``hf://`` and does not go on as shown.
    """
    if not _is_hub(url):
        return url
    owner, _, rest = url[len("hf://") :].partition("/")
    repository, _, file = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not (owner and repository and file):
        raise RemoteNotFoundError(
            f"{url}: a file on the hub is named hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE."
        )
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    return f"{endpoint}/{quote(owner)}/{quote(repository)}/resolve/{quote(revision or 'main', safe='')}/{quote(file)}"


def token(url: str) -> str | None:
    """Return the access token for `url`: of ``hf://`` the environment variable HF_TOKEN, of others none."""
    return os.environ.get("HF_TOKEN", "").strip() or None if _is_hub(url) else None


def _is_hub(url: str) -> bool:
    return url.lower().startswith("hf://")
