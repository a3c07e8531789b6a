"""The one place that speaks HTTP: requests to a server through the library requests, its failures as our errors.

requests (an optional package) brings what must not be home-made: TLS, redirects that do not carry credentials to another
host, proxies and certificates from the environment, ``~/.netrc``. It is imported when the first URL is opened.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from .answers import TransientError
from .errors import CertificateError, MissingPackageError, RemoteAnswerError, RemoteError, RemoteNotFoundError

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte


class Body:
    """The body of an answer, read piece by piece.

    Attributes
    ----------
    position : int
        Offset in the file of the next byte.
    stop : int
        Offset after the last.
    """

    def __init__(self, response: Any, position: int, stop: int):
        self._response = response
        self.position = position
        self.stop = stop

    def read(self, most: int) -> bytes:
        """Return 1 to `most` bytes.

        Raises
        ------
        TransientError
            The connection broke off.
        """
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        left = self.stop - self.position
        try:
            # read1 hands over what is there; read would wait for all of it, and lose it if the connection broke off.
            data = self._response.raw.read1(min(most, left), decode_content=False)
        except ReadTimeoutError:
            raise TransientError(f"no data for {READ_TIMEOUT:g} s") from None
        except (HTTPError, OSError):
            data = b""
        if not data:
            raise TransientError(f"the connection broke off, {left} bytes early")
        self.position += len(data)
        return data

    def close(self) -> None:
        """Let go of the answer; what was not read of it is not fetched."""
        from urllib3.exceptions import HTTPError

        if self.position == self.stop:
            # At the end of a body the connection goes back to be used again, but it must be told that this is the end.
            with suppress(HTTPError, OSError):
                self._response.raw.read(1, decode_content=False)
        self._response.close()


class Client:
    """Connections to servers, kept open between requests.

    Raises
    ------
    MissingPackageError
        requests is not installed.
    """

    def __init__(self, name: str, address: str, token: str | None = None):
        try:
            import requests
        except ImportError:
            raise MissingPackageError(
                f"{name}: reading from a URL needs the package requests: pip install 'bstack[http]'"
            ) from None
        self._name = name
        self._address = address
        self._session = requests.Session()
        # Offsets count in the file itself, so it must come uncompressed.
        self._session.headers["Accept-Encoding"] = "identity"
        self._auth = _Bearer(token) if token else None

    def get(self, start: int, stop: int, etag: str | None) -> Any:
        """Ask for the bytes `start` to `stop` (exclusive), of the version with the strong tag `etag` if one is given.

        Returns
        -------
        requests.Response
            Its head is there, its body is not read yet.

        Raises
        ------
        TransientError
            No answer.
        RemoteError
            One of its subclasses: the URL is none, TLS fails, redirects that should not be followed.
        """
        import requests
        from urllib3.exceptions import HTTPError, NewConnectionError

        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if etag:
            headers["If-Range"] = etag
        try:
            response = self._session.get(
                self._address, headers=headers, auth=self._auth, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)
            )
        except requests.exceptions.SSLError as error:
            raise CertificateError(
                f"{self._name}: no trusted TLS connection: {_innermost(error)}. Check the host name and the clock of this "
                "machine; for a certificate authority of your own, set REQUESTS_CA_BUNDLE to its file."
            ) from None
        except requests.exceptions.TooManyRedirects:
            raise RemoteAnswerError(f"{self._name}: the server redirects in circles. Check the URL.") from None
        except requests.exceptions.Timeout:
            raise TransientError("no answer in time") from None
        except requests.exceptions.ConnectionError as error:
            lasting = isinstance(getattr(error.args[0] if error.args else None, "reason", None), NewConnectionError)
            raise TransientError(_innermost(error), lasting=lasting) from None
        except requests.exceptions.ChunkedEncodingError as error:
            raise TransientError(_innermost(error)) from None
        except (requests.exceptions.RequestException, HTTPError, UnicodeError) as error:
            raise RemoteNotFoundError(
                f"{self._name}: not a URL that can be read: {_innermost(error)}. Check it."
            ) from None
        places = [answer.url.lower() for answer in [*response.history, response]]
        if places[0].startswith("https:") and not all(place.startswith("https:") for place in places):
            response.close()
            raise RemoteError(
                f"{self._name}: the server redirects from https to an unprotected URL, whose answer is refused. If you trust "
                "the way to it, give that URL itself."
            )
        return response

    def close(self) -> None:
        """Close all connections."""
        self._session.close()


class _Bearer:
    """Sends a token to the host of the URL; requests drops it where a redirect leads to another."""

    def __init__(self, token: str):
        self._token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _innermost(error: BaseException) -> str:
    """What the system said, without the layers of libraries around it."""
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
    # Redirects lead to signed URLs, and a refused one is quoted.
    text = re.sub(r"\?[^\s'\")]*", "", re.sub(r"//[^/@\s]*@", "//", text))
    return text.strip().rstrip(".") or type(error).__name__
