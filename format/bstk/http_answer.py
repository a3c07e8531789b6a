"""What a server's answer to a request for bytes of a file says: which version, which bytes, or why there are none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import RemoteError

_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)", re.IGNORECASE | re.ASCII)
_MAX_WAIT = 60.0  # seconds that Retry-After is obeyed for
_OTHER_TOOL = "Download the file with another tool."
BAD_RANGES = f"The server does not serve ranges correctly. {_OTHER_TOOL}"


class TransientError(Exception):
    """A failure that may be gone in a moment; callers retry, and raise another error after the last attempt.

    `wait`: seconds that the server asks for. `lasting`: retrying is pointless for a server that never answered, because the
    host does not exist, or refuses connections. `answered`: the server itself reported the failure.
    """

    def __init__(self, reason: str, wait: float = 0.0, lasting: bool = False, answered: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.lasting = lasting
        self.answered = answered


@dataclass(frozen=True)
class Version:
    """The length, entity tag and date of a file on a server, which tell its versions apart."""

    length: int
    etag: str | None = None
    modified: str | None = None

    def is_same(self, other: Version) -> bool:
        """Return whether nothing says that the two differ. Dates count only where a tag is missing."""
        if self.length != other.length:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return not (self.modified and other.modified) or self.modified == other.modified

    @property
    def strong_etag(self) -> str | None:
        """The tag, if equal tags guarantee equal bytes."""
        return self.etag if self.etag and self.etag.startswith('"') else None


@dataclass(frozen=True)
class Answer:
    """The head of an answer: bytes `start` to `stop` (exclusive) of a version follow, all of them without `ranged`."""

    version: Version
    start: int
    stop: int
    ranged: bool


def check_answer(name: str, status: int, headers: Mapping[str, str], start: int, stop: int) -> Answer:
    """Read the head of an answer to a request for the bytes `start` to `stop` (exclusive) of the file `name`."""
    check_status(name, status, headers)
    coding = headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise RemoteError(
            f"{name}: the server compresses the file ({coding}), although it was asked not to, so offsets do not count in the "
            "file.",
            hint="Switch off compression for .bstk files on the server, or download the file with another tool.",
        )
    stated = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    marks = headers.get("ETag") or None, headers.get("Last-Modified") or None
    if status == 200:
        length = _content_length(headers)
        if length is None:
            message = f"{name}: the server serves no ranges and does not say how long the file is."
            raise RemoteError(message, hint=_OTHER_TOOL)
        return Answer(Version(length, *marks), 0, length, ranged=False)
    if stated is None or stated[3] == "*":
        raise RemoteError(
            f"{name}: the server answers {status} with Content-Range {headers.get('Content-Range')!r}, which does not say "
            "how long the file is.",
            hint=_OTHER_TOOL,
        )
    length = int(stated[3])
    version = Version(length, *marks)
    if status == 416:
        return Answer(version, start, start, ranged=True)
    stop = min(stop, length)
    wanted = f"asked for bytes {start}-{stop - 1}"
    if stated[1] is None or (int(stated[1]), int(stated[2]) + 1) != (start, stop):
        raise RemoteError(f"{name}: {wanted}, and the server answers with {stated[0]!r}.", hint=BAD_RANGES)
    announced = _content_length(headers)
    if announced is not None and announced != stop - start:
        message = f"{name}: {wanted}, and the server announces {announced} bytes instead of {stop - start}."
        raise RemoteError(message, hint=BAD_RANGES)
    return Answer(version, start, stop, ranged=True)


def check_status(name: str, status: int, headers: Mapping[str, str], what: str = "file") -> None:
    if status in (200, 206, 416):
        return
    if status in (408, 425, 429) or status >= 500:
        text = headers.get("Retry-After", "").strip()
        wait = min(float(text), _MAX_WAIT) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0.0
        raise TransientError(f"the server answers {status}", wait=wait, answered=True)
    if status in (404, 410):
        message = f"{name}: the server has no such {what} (it answers {status})."
        raise RemoteError(message, hint="Check the URL.", missing=True)
    if status in (401, 403, 407):
        raise RemoteError(
            f"{name}: the server refuses access (it answers {status}).",
            hint="Check that you may read the file. Credentials come from ~/.netrc, and for hf:// from HF_TOKEN or the login of "
            "huggingface_hub; signed URLs expire.",
        )
    raise RemoteError(f"{name}: the server answers {status}, which is not the file.", hint="Check the URL.")


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "").strip()
    return int(text) if re.fullmatch(r"\d{1,19}", text, re.ASCII) else None
