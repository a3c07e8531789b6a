"""Let through what may ask: a known Host, no page of a stranger, and the key."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from bstack.serve.requests import ApiError
from bstk.errors import UsageError

__all__ = ["HEADERS", "Guard", "check_names", "is_loopback"]

# Bytes of the headers of a request.
HEADERS = 16 * 1024

# Answered without the key: the page, which has no secrets, and whether the server lives.
_OPEN = {"/", "/health"}


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address to listen at."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_names(hosts: Iterable[str], origins: Iterable[str]) -> None:
    """Raise UsageError for a name or an origin that no request can have."""
    for host in hosts:
        if not re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]+", host, re.ASCII):
            raise UsageError(f"{host!r} is no name of a machine. Write it without a port and a path.")
    for origin in origins:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[\w.-]+(:\d+)?/?", origin, re.ASCII | re.IGNORECASE):
            raise UsageError(
                f"{origin!r} is no origin of pages. Write it as https://example.org, with a port where it has one."
            )


class Guard:
    """Checks the headers of a request.

    A name in the Host header that is not known may be that of a page elsewhere whose name now leads here (DNS rebinding);
    addresses cannot be rebound. A page of another origin is refused, unless it is one of `origins`.
    """

    def __init__(self, key: str | None, hosts: Iterable[str], origins: Iterable[str]):
        self._key = None if key is None else key.encode()
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        #: Origins as browsers write them.
        self.origins = [origin.lower().rstrip("/") for origin in origins]

    def check(self, method: str, path: str, headers: Any) -> None:
        """Raise ApiError for a request that is refused."""
        if sum(len(name) + len(value) for name, value in headers.raw) > HEADERS:
            raise ApiError(431, f"The headers have more than {HEADERS} bytes.")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._knows(hosts[0]):
            raise ApiError(
                403,
                "This Host is not known here. Whoever runs the server can allow it (option allow-host).",
                code="host",
            )
        origin = headers.get("origin")
        if origin is not None and not self._same(origin.lower(), hosts[0].lower()):
            raise ApiError(
                403,
                "Pages of other origins may not ask. Whoever runs the server can allow one (option allow-origin).",
                code="origin",
            )
        if self._key is None or path in _OPEN or method == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            port = urlsplit(f"//{host}").port  # noqa: F841 - raises for what is no port
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _same(self, origin: str, host: str) -> bool:
        return origin in self.origins or origin.partition("://")[2] == host
