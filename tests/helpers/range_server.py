"""A small HTTP server on localhost with every bad habit that a reader must survive, each switched on by an attribute."""

from __future__ import annotations

import gzip
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CERTIFICATE = Path(__file__).with_name("self-signed.pem")


@dataclass
class Asked:
    """One request, and how many bytes of body went into the answer."""

    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    connection: int = 0  # the client's port


@dataclass
class RangeServer:
    """Serves `data` under every path. Use as a context manager."""

    data: bytes = b""
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    compress: str = ""  # "always", or "offered": only where the client accepts it
    drop_after: int | None = None  # bytes of each body
    drops: int = -1  # answers that are dropped; -1 for all
    statuses: list[int] = field(default_factory=list)  # of the first answers; 0 for a normal one, -1 for none at all
    retry_after: str | None = None
    overwrite: dict[str, str] = field(default_factory=dict)  # header fields of the answers with a body
    chunked: bool = False
    pause: float = 0.0  # seconds before each 4 KiB of body
    hold_from: int | None = None  # offset in `data` from which bytes wait for `released`
    released: threading.Event = field(default_factory=threading.Event)
    redirect: str | None = None  # prefix of the address that paths under /go/ lead to, with status 307
    then: dict[int, dict[str, object]] = field(default_factory=dict)  # number of a request -> attributes from then on
    tls: bool = False
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> RangeServer:
        self._server = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.base = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"
        self.url = f"{self.base}/model.bstk"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def sent(self) -> int:
        """Bytes of all bodies."""
        return sum(asked.sent for asked in self.asked)

    def ranges_asked(self) -> list[tuple[int, int]]:
        """First and last byte of each request."""
        return [tuple(map(int, asked.headers["Range"].removeprefix("bytes=").split("-"))) for asked in self.asked]


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients of these tests go away in every way


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: RangeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.owner
        asked = Asked(self.path, dict(self.headers), connection=self.client_address[1])
        for name, value in server.then.get(len(server.asked), {}).items():
            setattr(server, name, value)
        server.asked.append(asked)
        if server.redirect is not None and self.path.startswith("/go/"):
            self._head(307, {"Location": server.redirect + self.path.removeprefix("/go"), "Content-Length": "0"}, asked)
            return
        forced = server.statuses.pop(0) if server.statuses else 0
        if forced == -1:
            self.close_connection = True
            return
        if forced:
            fields = {"Retry-After": server.retry_after} if server.retry_after else {}
            self._head(forced, {"Content-Length": "5", **fields}, asked)
            self.wfile.write(b"sorry")
            return
        self._serve(server, asked)

    def _serve(self, server: RangeServer, asked: Asked) -> None:
        data, status, fields, first = server.data, 200, {}, 0
        if server.etag:
            fields["ETag"] = server.etag
        if server.modified:
            fields["Last-Modified"] = server.modified
        current = self.headers.get("If-Range") in (None, server.etag)
        if server.ranges and "Range" in self.headers and current:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            if first >= len(data):
                self._head(416, {**fields, "Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}, asked)
                return
            last = min(last, len(data) - 1)
            fields["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if server.compress == "always" or (server.compress and "gzip" in self.headers.get("Accept-Encoding", "")):
            data = gzip.compress(data)
            fields["Content-Encoding"] = "gzip"
        fields |= {"Transfer-Encoding": "chunked"} if server.chunked else {"Content-Length": str(len(data))}
        fields |= server.overwrite
        self._head(status, {name: value for name, value in fields.items() if value}, asked)
        self._body(server, asked, data, first)

    def _body(self, server: RangeServer, asked: Asked, data: bytes, first: int) -> None:
        stop, pause = len(data), server.pause
        if server.drop_after is not None and server.drops and stop > server.drop_after:
            server.drops -= 1
            stop = server.drop_after
            self.close_connection = True
        try:
            for start in range(0, stop, 4096):
                piece = data[start : min(start + 4096, stop)]
                time.sleep(pause)
                if server.hold_from is not None and first + start + len(piece) > server.hold_from:
                    server.released.wait()
                asked.sent += len(piece)  # first: the client, and the test, may go on before this thread does
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if server.chunked else piece)
            if server.chunked and stop == len(data):
                self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client has what it wants
            self.close_connection = True

    def _head(self, status: int, fields: dict[str, str], asked: Asked) -> None:
        asked.status = status
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
