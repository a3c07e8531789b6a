"""A stand-in for the hub on this machine: one repository, and a list of what was fetched from it.

It answers what huggingface_hub asks for to read files (model info, tree, resolve with ranges), and to upload some with its
plain transfer (create, validate-yaml, preupload, LFS batch with one PUT for each file, commit). It does not answer Xet, uploads
in parts, pull requests, branches, or a second repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class HubServer:
    """Serve a folder as the model ``owner/name``, ranges too; `fetched` has the names of the files that were read.

    With a `token` it takes commits from those who send it; `commits` has their messages. `licence` is what model info names.
    """

    def __init__(self, folder: Path, token: str | None = None, licence: str | None = None):
        hub = self
        stored: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.fetched: list[str] = []
        self.sent = 0  # bytes of them
        self.private = False
        self.asked: list[dict[str, object]] = []  # of repositories to make
        self.puts: list[int] = []  # bytes of uploads that arrived
        self.most = 2**60  # bytes of an upload that it takes

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments):
                pass

            def answer(self, body: bytes, status: int = 200, **headers: str):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self):
                path = self.path.partition("?")[0].strip("/")
                files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                sizes = {name: (folder / name).stat().st_size for name in files}
                if not path.removeprefix("api/models/").startswith("owner/name"):
                    self.answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})
                elif path.startswith("api/") and not re.search(f"/name(/|/.*/({COMMIT}|main)(/.*)?)?$", path):
                    self.answer(b"", 404, **{"X-Error-Code": "RevisionNotFound"})
                elif "/tree/" in path:
                    tree = [{"type": "file", "path": name, "size": sizes[name], "oid": name} for name in files]
                    self.answer_json(tree)
                elif path.startswith("api/"):
                    found = {
                        "id": "owner/name",
                        "sha": COMMIT,
                        "siblings": [{"rfilename": name} for name in files],
                        "private": hub.private,
                    }
                    self.answer_json(found | ({"cardData": {"license": licence}} if licence else {}))
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

            def answer_json(self, value: object, status: int = 200):
                self.answer(json.dumps(value).encode(), status, **{"Content-Type": "application/json"})

            def do_PUT(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if len(body) > hub.most:
                    return self.answer(b"", 400)
                hub.puts.append(len(body))
                stored[self.path.rpartition("/")[2]] = body
                self.answer(b"")

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.partition("?")[0]
                if path == "/api/validate-yaml":
                    header = json.loads(body)["content"].split("---")[1]
                    bad = "license: bad" in header
                    self.answer_json(
                        {"errors": [{"message": "no such license"}] if bad else [], "warnings": []}, 400 * bad or 200
                    )
                elif token is None or self.headers.get("Authorization") != f"Bearer {token}":
                    self.answer_json({"error": "You may not write here."}, 401)
                elif path == "/api/repos/create":
                    hub.asked.append(json.loads(body))
                    self.answer_json({"url": f"{hub.base}/owner/name"}, 409 if any(folder.iterdir()) else 200)
                elif path == "/api/models/owner/name/preupload/main":
                    modes = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith((".bstk", ".png")) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    self.answer_json({"files": modes})
                elif path == "/owner/name.git/info/lfs/objects/batch":
                    objects = [
                        wanted
                        if wanted["oid"] in stored
                        else {**wanted, "actions": {"upload": {"href": f"{hub.base}/lfs/{wanted['oid']}"}}}
                        for wanted in json.loads(body)["objects"]
                    ]
                    self.answer_json({"transfer": "basic", "objects": objects})
                elif path == "/api/models/owner/name/commit/main":
                    for line in map(json.loads, body.splitlines()):
                        value = line["value"]
                        if line["key"] == "header":
                            hub.commits.append(value["summary"])
                            continue
                        if line["key"] == "deletedFile":
                            (folder / value["path"]).unlink()
                            continue
                        lfs = line["key"] == "lfsFile"
                        content = stored[value["oid"]] if lfs else base64.b64decode(value["content"])
                        assert not lfs or hashlib.sha256(content).hexdigest() == value["oid"]
                        (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                        (folder / value["path"]).write_bytes(content)
                    self.answer_json({"commitUrl": f"{hub.base}/owner/name/commit/{COMMIT}", "commitOid": COMMIT})
                else:
                    self.answer(b"", 404)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_arguments):
        self._server.shutdown()
        self._server.server_close()
