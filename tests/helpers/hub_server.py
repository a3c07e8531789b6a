"""A stand-in for the hub on this machine: one repository, and a list of what was fetched from it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class HubServer:
    """Serve a folder as the model ``owner/name``, ranges too; `fetched` has the names of the files that were read."""

    def __init__(self, folder: Path):
        hub = self
        self.fetched: list[str] = []
        self.sent = 0  # bytes of them

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments):
                pass

            def answer(self, body: bytes, status: int = 200, **headers: str):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self):
                path = self.path.partition("?")[0].strip("/")
                files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                sizes = {name: (folder / name).stat().st_size for name in files}
                if not path.removeprefix("api/models/").startswith("owner/name"):
                    self.answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})
                elif "/tree/" in path:
                    tree = [{"type": "file", "path": name, "size": sizes[name], "oid": name} for name in files]
                    self.answer(json.dumps(tree).encode(), **{"Content-Type": "application/json"})
                elif path.startswith("api/"):
                    found = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                    self.answer(json.dumps(found).encode(), **{"Content-Type": "application/json"})
                elif (name := re.sub(f"^owner/name/resolve/({COMMIT}|main)/", "", path)) in files:
                    body = (folder / name).read_bytes()
                    headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
                    if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(body))
                        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
                        body = body[start:stop]
                    if self.command == "GET":
                        hub.fetched.append(name)
                        hub.sent += len(body)
                    self.answer(body, 206 if asked else 200, **headers)
                else:
                    self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_arguments):
        self._server.shutdown()
        self._server.server_close()
