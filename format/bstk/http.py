"""A file on an HTTP server as a source: ranges of it on demand, over connections that may break."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from . import answers, urls
from .answers import TransientError, Version
from .client import Body, Client
from .errors import RemoteAnswerError, RemoteChangedError, TransferError, UnreachableError

HEAD = 2**16
"""Bytes of the first request: the preamble, and all of the header of most small files."""

PIECE = 2**18
"""Most bytes handed on at a time."""

RETRIES = 5
"""Attempts after the first, without a byte in between, before giving up."""

RETRIES_IN_ALL = 1000
"""Attempts after broken connections over the life of a source."""

FIRST_DELAY = 0.5
"""Seconds before the first of `RETRIES`; each wait is twice the one before."""


class HttpSource:
    """A file behind a URL. What was read keeps to one version of it.

    Opening makes one request, for the first `HEAD` bytes; `read` makes one for what it still needs, and goes on where a
    connection broke off. A server without ranges can be read from start to end only, in one request.

    Parameters
    ----------
    url : str
        ``https://``, ``http://`` or ``hf://``; redirects are followed, anew for each request.
    notify : callable or None
        Called with one line about each retry, before its delay. May be set later.

    Attributes
    ----------
    name : str
        The URL without credentials and query.
    length : int
        Bytes of the file, as the server says.
    requests : int
        Requests made so far, not counting redirects.

    Raises
    ------
    MissingPackageError
        The package requests is not installed.
    RemoteError
        One of its subclasses: the server cannot be reached, has no such file, or gives an answer that cannot be used.
    """

    def __init__(self, url: str, notify: Callable[[str], None] | None = None):
        self.name = urls.shown(url)
        self.notify = notify
        self.requests = 0
        self._client = Client(self.name, urls.address(url), urls.token(url))
        self._lock = threading.Lock()
        self._body: Body | None = None
        self._retries = 0
        self.restart()

    def restart(self) -> None:
        """Forget the version that was read, and begin with the one that is there now."""
        self._disconnect()
        self._version: Version | None = None
        self._ranged = True
        self._furthest = 0
        self._head = b""
        try:
            head = self._piece(0, HEAD)
            while len(head) < min(HEAD, self.length):
                head += self._piece(len(head), min(HEAD, self.length))
        except BaseException:
            self.close()
            raise
        self._head = head

    @property
    def length(self) -> int:
        return self._version.length

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`; fewer only where the file ends.

        Raises
        ------
        RemoteChangedError
            The file is no longer the one that was opened.
        TransferError
            The connection broke off too often.
        RemoteError
            The server gives an answer that cannot be used.
        """
        data = b"".join(self.pieces(offset, length))
        # What begins in the head belongs to it: the header of a file is read so, and is not fetched a second time.
        if offset < len(self._head) < offset + len(data):
            self._head = self._head[:offset] + data
        return data

    def pieces(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield what `read` returns in pieces of at most `PIECE` bytes, in one request unless it breaks off."""
        stop = min(offset + length, self.length)
        if offset < min(len(self._head), stop):
            yield self._head[offset:stop]
            offset = min(len(self._head), stop)
        while offset < stop:
            piece = self._piece(offset, stop)
            yield piece
            offset += len(piece)

    def close(self) -> None:
        self._disconnect()
        self._client.close()

    def _piece(self, offset: int, stop: int) -> bytes:
        """Return at least one byte at `offset`, of a request that goes on to `stop`; none of an empty file."""
        with self._lock:
            failures = 0
            while True:
                try:
                    body = self._body_at(offset, stop)
                    if body is None:
                        return b""
                    data = body.read(min(PIECE, stop - offset))
                    if body.position == body.stop:
                        self._disconnect()
                    self._furthest = max(self._furthest, offset + len(data))
                    return data
                except TransientError as error:
                    self._disconnect()
                    failures += 1
                    self._wait(error, failures)
                except BaseException:
                    self._disconnect()
                    raise

    def _body_at(self, offset: int, stop: int) -> Body | None:
        """Return an answer's body that stands at `offset`: the one that is open, or a new one."""
        # Only the answer of a server without ranges may lie behind: what is between is read and thrown away.
        body = self._body
        if body is None or body.position > offset or (body.position < offset and self._ranged):
            self._disconnect()
            self._body = self._connect(offset, stop)
        while self._body is not None and self._body.position < offset:
            self._body.read(min(PIECE, offset - self._body.position))
        return self._body

    def _connect(self, offset: int, stop: int) -> Body | None:
        if not self._ranged and offset < self._furthest:
            raise RemoteAnswerError(
                f"{self.name}: the server serves no ranges, so the file can be read from start to end only. "
                "Fetch it with bstack truncate, and use the copy."
            )
        self.requests += 1
        response = self._client.get(offset, stop, self._version and self._version.strong_etag)
        try:
            answer = answers.check(self.name, response.status_code, response.headers, offset, stop)
            if self._version is not None and not answer.version.is_same(self._version):
                raise RemoteChangedError(
                    f"{self.name}: the file on the server was replaced while it was read. Give the command again when it "
                    "stays the same."
                )
            if answer.start == answer.stop and answer.version.length > offset:
                raise RemoteAnswerError(
                    f"{self.name}: the server says the file has {answer.version.length} bytes, and none from byte {offset} "
                    "on. It does not serve ranges rightly; download the file with another tool."
                )
        except BaseException:
            response.close()
            raise
        self._version = answer.version
        self._ranged = answer.ranged
        if answer.start == answer.stop:
            response.close()
            return None
        return Body(response, answer.start, answer.stop)

    def _wait(self, error: TransientError, failures: int) -> None:
        """Wait before another attempt, or raise when there were enough."""
        self._retries += 1
        opened = self._version is not None
        if (error.lasting and not opened) or failures > RETRIES or self._retries > RETRIES_IN_ALL:
            if opened:
                raise TransferError(
                    f"{self.name}: the transfer broke off: {error} (after {self._retries} attempts). "
                    "Give the same command again; truncate and grow go on from what has arrived."
                )
            if error.answered:
                raise UnreachableError(
                    f"{self.name}: cannot be read after {failures} attempts, as {error}. Try again later."
                )
            raise UnreachableError(f"{self.name}: cannot be reached: {error}. Check the URL and the network.")
        delay = max(error.wait, FIRST_DELAY * 2 ** (failures - 1))
        if self.notify is not None:
            self.notify(f"{error}; retry {failures} of {RETRIES} in {delay:.3g} s")
        time.sleep(delay)

    def _disconnect(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
