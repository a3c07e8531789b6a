"""Files behind URLs: ranges of them on demand, over connections that may break.

requests and urllib3 (optional packages) are imported inside functions, when the first URL is opened. requests brings TLS,
redirects that do not carry credentials to another host, proxies and certificates from the environment, and ``~/.netrc``.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from . import preamble
from .errors import BstkError, RemoteChangedError, RemoteError
from .http_answer import BAD_RANGES, TransientError, Version, check_answer, check_status
from .hub import HubPlace, is_hub, only_file, token

HEAD = 2**16  # bytes of the first request: the preamble, and all of the header of most small files
PIECE = 2**18  # maximum bytes handed on at a time
RETRIES = 5  # attempts after the first, without a byte in between, before giving up
RETRIES_IN_ALL = 1000  # attempts after broken connections over the life of a source
FIRST_DELAY = 0.5  # seconds before the first of RETRIES; each wait is twice the one before
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte
MAX_LISTING = 2**24  # bytes that are read of a repository's description

T = TypeVar("T")


def is_url(what: object) -> bool:
    """Return whether `what` is text that starts with ``https://``, ``http://`` or ``hf://``."""
    return isinstance(what, str) and what.lower().startswith(("https://", "http://", "hf://"))


def shown(url: str) -> str:
    """Return `url` without the parts that may be secret: user, password, and the query, which holds the key of signed URLs."""
    try:
        parts = urlsplit(url)
    except ValueError:  # an invalid address, which is refused later
        return url.partition("?")[0]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _bearer(token: str) -> Callable[[Any], Any]:
    def add(request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return add


class HttpSource:
    """A file behind a URL. All reads are of one version of it.

    Opening makes one request, for the first `HEAD` bytes. `read` makes one for the bytes that are still missing, and continues
    where a connection broke off. A server without ranges can be read only from start to end, in one request.

    Parameters
    ----------
    url : str
        ``https://``, ``http://`` or ``hf://OWNER/REPO[@REVISION][/FILE]``, a file of a model repository on the hub (the
        server of the variable HF_ENDPOINT, or huggingface.co), or its only .bstk file, which `name` then names; redirects are
        followed for each request.
    notify : callable or None
        Called with one line about each retry, before its delay. May be set later.

    Raises
    ------
    RemoteError
        The server cannot be reached, has no such file, or gives an unusable answer.
    """

    def __init__(self, url: str, notify: Callable[[str], None] | None = None):
        self.name = shown(url)  # without secrets
        self.notify = notify
        self.requests = 0  # so far, not counting redirects
        place = HubPlace.parse(url) if is_hub(url) else None
        try:
            import requests
        except ImportError:
            raise BstkError(
                f"{self.name}: reading from a URL needs the package requests: pip install 'bstack[http]'"
            ) from None
        self._session = requests.Session()
        self._session.headers["Accept-Encoding"] = "identity"  # offsets count in the uncompressed file
        # Not among the session's headers: requests drops it where a redirect leads to another host.
        self._auth = _bearer(found) if (found := token(url)) else None
        self._lock = threading.Lock()
        self._body: _Body | None = None
        self._retries = 0
        self._version: Version | None = None
        if place is not None and not place.file:
            place = replace(place, file=self._only_file(place))
            self.name = f"{self.name.rstrip('/')}/{place.file}"
        self._address = url if place is None else place.address()
        self.restart()

    def restart(self) -> None:
        """Forget the version that was read, and use the current one."""
        self._disconnect()
        self._version = None
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
        return self._version.length if self._version else 0

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`; RemoteChangedError if the file was replaced since it was opened."""
        data = b"".join(self.pieces(offset, length))
        # The tables start here, and no chunk does. They are kept, because copying a file needs its header again.
        if offset == preamble.LENGTH and offset + len(data) > len(self._head):
            self._head = self._head[:offset] + data
        return data

    def pieces(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield the bytes that `read` returns in pieces of at most `PIECE` bytes, in one request unless it breaks off."""
        stop = min(offset + length, self.length)
        if offset < min(len(self._head), stop):
            yield self._head[offset:stop]
            offset = min(len(self._head), stop)
        while offset < stop:
            piece = self._piece(offset, stop)
            yield piece
            offset += len(piece)

    def close(self) -> None:
        """Close all connections."""
        self._disconnect()
        self._session.close()

    def _only_file(self, place: HubPlace) -> str:
        """Return the name of the only .bstk file of a repository."""
        try:
            return only_file(self._retried(lambda: self._listing(place)), self.name)
        except BaseException:
            self.close()
            raise

    def _listing(self, place: HubPlace) -> Any:
        """Return what the hub says of a repository."""
        from urllib3.exceptions import HTTPError

        self.requests += 1
        with closing(self._get(place.listing(), {})) as response:
            check_status(self.name, response.status_code, response.headers, "repository or revision")
            try:
                text = response.raw.read(MAX_LISTING, decode_content=True)
            except (HTTPError, OSError) as error:
                raise TransientError(_innermost(error)) from None
        try:
            return json.loads(text)
        except ValueError:
            raise RemoteError(
                f"{self.name}: the server's list of files cannot be read.", hint="Name the file."
            ) from None

    def _piece(self, offset: int, stop: int) -> bytes:
        """Return at least one byte at `offset`, from a request that continues to `stop`; nothing of an empty file."""

        def attempt() -> bytes:
            body = self._body_at(offset, stop)
            if body is None:
                return b""
            data = body.read(min(PIECE, stop - offset))
            if body.position == body.stop:
                self._disconnect()
            self._furthest = max(self._furthest, offset + len(data))
            return data

        with self._lock:
            return self._retried(attempt)

    def _retried(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns, again and again after TransientError."""
        failures = 0
        while True:
            try:
                return attempt()
            except TransientError as error:
                self._disconnect()
                failures += 1
                self._wait(error, failures)
            except BaseException:
                self._disconnect()
                raise

    def _body_at(self, offset: int, stop: int) -> _Body | None:
        """Return the body of an answer at `offset`: the open one, or that of a new request."""
        # Bytes are skipped only in the answer of a server without ranges.
        body = self._body
        if body is None or body.position > offset or (body.position < offset and self._ranged):
            self._disconnect()
            self._body = body = self._connect(offset, stop)
        while body is not None and body.position < offset:
            body.read(min(PIECE, offset - body.position))
        return body

    def _connect(self, offset: int, stop: int) -> _Body | None:
        if not self._ranged and offset < self._furthest:
            raise RemoteError(
                f"{self.name}: the server serves no ranges, so the file can be read from start to end only.",
                hint="Fetch it with bstack truncate, and use the copy.",
            )
        self.requests += 1
        headers = {"Range": f"bytes={offset}-{stop - 1}"}
        if self._version is not None and self._version.strong_etag:
            headers["If-Range"] = self._version.strong_etag  # the version that was read before
        response = self._get(self._address, headers)
        try:
            answer = check_answer(self.name, response.status_code, response.headers, offset, stop)
            if self._version is not None and not answer.version.is_same(self._version):
                raise RemoteChangedError(
                    f"{self.name}: the file on the server was replaced while it was read.",
                    hint="Give the command again when it stays the same.",
                )
            if answer.start == answer.stop and answer.version.length > offset:
                raise RemoteError(
                    f"{self.name}: the server says the file has {answer.version.length} bytes, and none from byte {offset} on.",
                    hint=BAD_RANGES,
                )
        except BaseException:
            response.close()
            raise
        self._version = answer.version
        self._ranged = answer.ranged
        if answer.start == answer.stop:
            response.close()
            return None
        return _Body(response, answer.start, answer.stop)

    def _get(self, address: str, headers: Mapping[str, str]) -> Any:
        """Return the response to a request, its body not read yet; TransientError means that no answer came."""
        import requests
        from urllib3.exceptions import HTTPError, NewConnectionError

        settings: dict[str, Any] = {"auth": self._auth, "stream": True, "timeout": (CONNECT_TIMEOUT, READ_TIMEOUT)}
        try:
            response = self._session.get(address, headers=headers, **settings)
        except requests.exceptions.SSLError as error:
            raise RemoteError(
                f"{self.name}: no trusted TLS connection: {_innermost(error)}.",
                hint="Check the host name and the clock of this machine; for a certificate authority of your own, set "
                "REQUESTS_CA_BUNDLE to its file.",
            ) from None
        except requests.exceptions.TooManyRedirects:
            raise RemoteError(f"{self.name}: the server redirects in circles.", hint="Check the URL.") from None
        except requests.exceptions.Timeout:
            raise TransientError("no answer in time") from None
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            lasting = isinstance(getattr(error.args[0] if error.args else None, "reason", None), NewConnectionError)
            raise TransientError(_innermost(error), lasting=lasting) from None
        except (requests.exceptions.RequestException, HTTPError, UnicodeError) as error:
            message = f"{self.name}: not a URL that can be read: {_innermost(error)}."
            raise RemoteError(message, hint="Check it.", missing=True) from None
        places = [answer.url.lower() for answer in [*response.history, response]]
        if places[0].startswith("https:") and not all(place.startswith("https:") for place in places):
            response.close()
            raise RemoteError(
                f"{self.name}: the server redirects from https to an unprotected URL, whose answer is refused.",
                hint="If you trust the connection, give that URL itself.",
            )
        return response

    def _wait(self, error: TransientError, failures: int) -> None:
        """Wait before another attempt, or raise RemoteError after the last one."""
        self._retries += 1
        opened = self._version is not None
        if (error.lasting and not opened) or failures > RETRIES or self._retries > RETRIES_IN_ALL:
            if opened:
                raise RemoteError(
                    f"{self.name}: the transfer broke off: {error} (after {self._retries} attempts).",
                    hint="Give the same command again; truncate and grow continue from the bytes that have arrived.",
                    resumable=True,
                )
            if error.answered:
                message = f"{self.name}: cannot be read after {failures} attempts: {error}."
                raise RemoteError(message, hint="Try again later.")
            raise RemoteError(f"{self.name}: cannot be reached: {error}.", hint="Check the URL and the network.")
        delay = max(error.wait, FIRST_DELAY * 2 ** (failures - 1))
        if self.notify is not None:
            self.notify(f"{error}; retry {failures} of {RETRIES} in {delay:.3g} s")
        time.sleep(delay)

    def _disconnect(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None


class _Body:
    """The body of an answer: `position` is the offset in the file of its next byte, `stop` the one after its last."""

    def __init__(self, response: Any, position: int, stop: int):
        self._response = response
        self.position = position
        self.stop = stop

    def read(self, max_length: int) -> bytes:
        """Return 1 to `max_length` bytes; raise TransientError if the connection broke off."""
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        left = self.stop - self.position
        try:
            # read1 returns the bytes that are there; read would wait for all, and lose them if the connection broke off.
            data: bytes = self._response.raw.read1(min(max_length, left), decode_content=False)
        except ReadTimeoutError:
            raise TransientError(f"no data for {READ_TIMEOUT:g} s") from None
        except (HTTPError, OSError):
            data = b""
        if not data:
            raise TransientError(f"the connection broke off, {left} bytes early")
        self.position += len(data)
        return data

    def close(self) -> None:
        """Release the answer; bytes that were not read are not fetched."""
        from urllib3.exceptions import HTTPError

        if self.position == self.stop:
            # A connection is reused only after the end of its body was read.
            with suppress(HTTPError, OSError):
                self._response.raw.read(1, decode_content=False)
        self._response.close()


def _innermost(error: BaseException) -> str:
    """Return the message of the system, without the layers of libraries around it."""
    while True:
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((value for value in reversed(error.args) if isinstance(value, BaseException)), None)
        if inner is None:
            break
        error = inner
    text = getattr(error, "strerror", None) or str(error)
    # "HTTPSConnection(host='host', port=443): Failed to resolve 'host' ([Errno -2] Name or service not known)"
    text = re.sub(r"^(<.*?>|\w+\(.*?\)): ", "", text)
    # A refused redirect is quoted, and may lead to a signed URL.
    text = re.sub(r"\?[^\s'\")]*", "", re.sub(r"//[^/@\s]*@", "//", text))
    return text.strip().rstrip(".") or type(error).__name__
