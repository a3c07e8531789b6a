"""What a server's answer to a request for a range of a file says, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import RemoteAccessError, RemoteAnswerError, RemoteError, RemoteNotFoundError

_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)", re.IGNORECASE | re.ASCII)
_LONGEST_WAIT = 60.0  # seconds that Retry-After is obeyed for


class TransientError(Exception):
    """A failure that may be gone in a moment; callers retry, and raise something else when it stays.

    Attributes
    ----------
    wait : float
        Seconds that the server asks to wait.
    lasting : bool
        Not worth repeating where nothing was ever heard from the server: there is no such host, or nobody listens.
    answered : bool
        The server is there, and says itself that it cannot.
    """

    def __init__(self, reason: str, wait: float = 0.0, lasting: bool = False, answered: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.lasting = lasting
        self.answered = answered


@dataclass(frozen=True)
class Version:
    """What tells one version of a file on a server from another: its length, entity tag and date of change."""

    length: int
    etag: str | None = None
    modified: str | None = None

    def is_same(self, other: Version) -> bool:
        """Whether nothing says that the two differ. A date is looked at only where a tag is missing."""
        if self.length != other.length:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return not (self.modified and other.modified) or self.modified == other.modified

    @property
    def strong_etag(self) -> str | None:
        """The tag, if equal tags promise equal bytes."""
        return self.etag if self.etag and self.etag.startswith('"') else None


@dataclass(frozen=True)
class Answer:
    """The bytes `start` to `stop` (exclusive) of a version of the file follow; with `ranged` false, all of it."""

    version: Version
    start: int
    stop: int
    ranged: bool


def check(name: str, status: int, headers: Mapping[str, str], start: int, stop: int) -> Answer:
    """Read the head of an answer to the request for the bytes `start` to `stop` (exclusive).

    Parameters
    ----------
    name : str
        The file, for messages.
    status : int
        HTTP status code.
    headers : mapping
        Header fields; keys are found in any case.

    Raises
    ------
    TransientError
        The server is out of order or asks for patience.
    RemoteError
        One of its subclasses: no such file, no permission, an answer that cannot be used.
    """
    _check_status(name, status, headers)
    coding = headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise RemoteAnswerError(
            f"{name}: the server compresses the file ({coding}) although it was asked not to, so offsets in it mean "
            "nothing. Have compression switched off for .bstk files, or download the file with another tool."
        )
    stated = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if status == 200:
        length = _content_length(headers)
        if length is None:
            raise RemoteAnswerError(
                f"{name}: the server serves no ranges and does not say how long the file is. "
                "Download the file with another tool."
            )
        return Answer(_version(headers, length), 0, length, ranged=False)
    if stated is None or stated[3] == "*":
        raise RemoteAnswerError(
            f"{name}: the server answers {status} with Content-Range {headers.get('Content-Range')!r}, which does not say "
            "how long the file is. Download the file with another tool."
        )
    length = int(stated[3])
    if status == 416:
        return Answer(_version(headers, length), start, start, ranged=True)
    _check_range(name, headers, stated, start, min(stop, length))
    return Answer(_version(headers, length), start, min(stop, length), ranged=True)


def _check_range(name: str, headers: Mapping[str, str], stated: re.Match[str], start: int, stop: int) -> None:
    wanted = f"bytes {start}-{stop - 1}"
    if stated[1] is None or (int(stated[1]), int(stated[2]) + 1) != (start, stop):
        raise RemoteAnswerError(
            f"{name}: asked for {wanted}, and the server answers with {stated[0]!r}. It does not serve ranges rightly; "
            "download the file with another tool."
        )
    length = _content_length(headers)
    if length is not None and length != stop - start:
        raise RemoteAnswerError(
            f"{name}: asked for {wanted}, and the server announces {length} bytes instead of {stop - start}. "
            "It does not serve ranges rightly; download the file with another tool."
        )


def _check_status(name: str, status: int, headers: Mapping[str, str]) -> None:
    if status in (200, 206, 416):
        return
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(f"the server answers {status}", wait=_retry_after(headers), answered=True)
    if status in (404, 410):
        raise RemoteNotFoundError(f"{name}: the server has no such file (it answers {status}). Check the URL.")
    if status in (401, 403, 407):
        raise RemoteAccessError(
            f"{name}: the server refuses access (it answers {status}). Check that you may read the file. Credentials "
            "come from ~/.netrc, and for hf:// from the environment variable HF_TOKEN; signed URLs expire."
        )
    raise RemoteError(f"{name}: the server answers {status}, which is not the file. Check the URL.")


def _version(headers: Mapping[str, str], length: int) -> Version:
    return Version(length, headers.get("ETag") or None, headers.get("Last-Modified") or None)


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "").strip()
    return int(text) if re.fullmatch(r"\d{1,19}", text, re.ASCII) else None


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("Retry-After", "").strip()
    return min(float(text), _LONGEST_WAIT) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0.0
