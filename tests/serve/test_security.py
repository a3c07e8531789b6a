"""What the server refuses, and how it ends."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from bstack.serve.guard import Guard, is_loopback
from bstack.serve.requests import ApiError

pytestmark = pytest.mark.slow
SAID = {"messages": [{"role": "user", "content": "the river"}], "max_tokens": 3}


def ask(server, method="GET", path="/v1/models", body=None, **headers):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), given)
    answer = connection.getresponse()
    raw = answer.read()
    connection.close()
    parsed = json.loads(raw) if answer.headers["content-type"] == "application/json" else raw
    return SimpleNamespace(status=answer.status, headers=answer.headers, body=parsed)


def checked(guard, method="GET", path="/v1/models", **headers):
    from starlette.datastructures import Headers

    try:
        guard.check(method, path, Headers({"host": "localhost", **headers}))
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("192.168.1.7", 200),
        ("box.lan:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example@localhost.evil", 403),
        ("localhost:port", 403),
        ("", 403),
    ],
)
def test_hosts(host, status):
    pytest.importorskip("starlette")
    assert checked(Guard(None, ["box.lan"], []), host=host) == status


def test_pages_of_other_origins():
    pytest.importorskip("starlette")
    guard = Guard(None, [], ["https://mine.example"])
    for origin, status in (
        ("http://localhost", 200),
        ("https://mine.example", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost:81", 403),
    ):
        assert checked(guard, "POST", origin=origin) == status, origin


def test_addresses_that_others_reach():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.9.9.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "box.lan")))


def test_a_key(start):
    key = "sk-0123456789abcdef"
    server = start("--api-key", key, "--allow-origin", "https://mine.example")
    for given in (None, "Bearer", "Bearer x", f"Basic {key}", f"Bearer {key}x", "Bearer kéy"):
        headers = {} if given is None else {"Authorization": given}
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/budget"), ("GET", "/x")):
            answer = ask(server, method, path, **headers)
            assert answer.status == 401 and answer.body["error"]["code"] == "invalid_api_key"
    assert ask(server, Authorization=f"Bearer {key}").status == 200
    assert ask(server, "GET", f"/v1/models?key={key}").status == 401
    assert ask(server, path="/health").status == ask(server, path="/").status == 200
    assert key not in str(ask(server, path="/").body)
    assert ask(server, "POST", "/v1/chat/completions", SAID, Authorization=f"Bearer {key}").status == 200
    assert ask(server, "POST", "/v1/chat/completions", b"{", Authorization=f"Bearer {key}").status == 400
    for origin, status in (("https://mine.example", 200), ("https://evil.example", 403)):
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        answer = ask(server, "OPTIONS", "/v1/chat/completions", **asked)
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == (origin if status == 200 else None)
    assert server.stop() == 0 and key not in server.log


def test_without_a_key_the_network_is_refused(served_model):
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason="the server needs it")

    def run(*options):
        command = [sys.executable, "-m", "bstack", "serve", served_model, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = run("--host", "0.0.0.0")
    assert done.returncode == 2 and "could use the model. Use --api-key" in done.stderr
    done = run("--api-key", "a key")
    assert done.returncode == 2 and "a key" not in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("--port", str(taken.getsockname()[1]))
    assert done.returncode == 2 and "Use --port for another one" in done.stderr


@pytest.mark.parametrize(
    "path", ["/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page.html", "/v1/models/../../x", "/v1"]
)
def test_there_are_no_files(server, path):
    answer = ask(server, path=path)
    assert answer.status == 404 and answer.body["error"]["message"]


def test_methods(server):
    assert ask(server, "GET", "/v1/chat/completions").status == 405
    assert ask(server, "DELETE", "/v1/budget").status == 405
    assert ask(server, "POST", "/").status == 405


def test_the_page_runs_nothing_of_others(server):
    answer = ask(server, path="/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    text = answer.body.decode()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    assert not re.search(r"<[a-z][^>]*\s(?:on[a-z]+|style)\s*=", text), "the policy forbids them"
    assert len(re.findall("<script", text)) == len(re.findall("<style", text)) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100000,
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": {"0": 1}}',
        b'{"messages": [[]]}',
        b'{"messages": [{"role": "user", "content": 5}]}',
        b'{"messages": [{"role": {}, "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "model": []}',
        b'{"messages": [{"role": "user", "content": "x"}], "stream_options": 5}',
    ],
)
def test_bodies_that_are_no_requests(server, body):
    answer = ask(server, "POST", "/v1/chat/completions", body)
    assert answer.status in (400, 404) and answer.body["error"]["message"], answer.body
    for path in ("/v1/completions", "/v1/budget"):
        assert ask(server, "POST", path, body).status in (400, 404)


@pytest.mark.parametrize("prompt", [[], [[]], [-1], [10**9], [1.5], [True], ["x", 5], [[5], "x"], {"a": 1}, None])
def test_prompts_that_are_none(server, prompt):
    answer = ask(server, "POST", "/v1/completions", {"prompt": prompt})
    assert answer.status == 400 and answer.body["error"]["param"] == "prompt"


def test_limits(server):
    large = b" " * (5 * 2**20)
    with contextlib.suppress(ConnectionError):  # the answer came before the whole body was sent
        assert ask(server, "POST", "/v1/chat/completions", large).status == 413
    assert ask(server, "GET", "/v1/models", X_Large="x" * 60000).status in (400, 431)
    address = urlsplit(server.url)
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 50,
        b"POST / HTTP/1.1\r\nHost: x\r\n",
    ):
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 200 " not in connection.recv(4096)
    assert ask(server).status == 200


def test_clients_that_wait(monkeypatch):
    """A reader that takes nothing ends its text, and a body that does not come is refused."""
    anyio = pytest.importorskip("anyio")
    app = pytest.importorskip("bstack.serve.app", reason="the server needs its packages", exc_type=ImportError)
    monkeypatch.setattr(app, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
    ended = []

    async def events():
        while True:
            yield "data: x\n\n"

    async def never(_message=None):
        await anyio.sleep(60)

    async def run(version):
        scope = {"type": "http", "asgi": {"spec_version": version}, "method": "POST", "headers": []}
        await app._Stream(events(), lambda: ended.append(version))(scope, never, never)
        with pytest.raises(ApiError) as caught:
            await app._body(app.Request(scope, never))
        assert caught.value.status == 408

    for version in ("2.3", "2.4"):
        anyio.run(run, version)
    assert ended == ["2.3", "2.4"]


def test_a_full_queue(start):
    server = start("--parallel", "1", "--queue", "1")
    address = urlsplit(server.url)
    body = json.dumps({**SAID, "max_tokens": 900, "stream": True, "logit_bias": {"2": -100}}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    held = [socket.create_connection((address.hostname, address.port), timeout=60) for _ in range(2)]
    for connection in held:
        connection.sendall(request)
        assert b"200 OK" in connection.recv(100)
    answer = ask(server, "POST", "/v1/chat/completions", SAID)
    for connection in held:
        connection.close()
    assert (
        answer.status == 429
        and int(answer.headers["retry-after"]) >= 1
        and answer.body["error"]["code"] == "queue_full"
    )
    deadline = time.monotonic() + 30
    while ask(server, "POST", "/v1/chat/completions", SAID).status != 200:
        assert time.monotonic() < deadline
    assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_texts_end(start, number):
    server = start()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        body = json.dumps({**SAID, "max_tokens": 400, "stream": True, "logit_bias": {"2": -100}}).encode()
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        text = connection.recv(2000)
        server.process.send_signal(number)
        while part := connection.recv(65536):
            text += part
    assert b"[DONE]" in text and text.count(b"data: ") > 300
    assert server.process.wait(60) == 0
    assert server.stop() == 0 and "Stopped." in server.log and "Traceback" not in server.log


@pytest.mark.parametrize("size", ["100", "auto"])
def test_nobody_asks(start, size):
    """The model becomes small, and grows back with the first request."""
    server = start("--idle-after", "2", "--mb", size)

    def now():
        return ask(server, path="/v1/budget").body

    full = now()["all_blocks"]
    deadline = time.monotonic() + 60
    while not now()["idle"] or now()["blocks"] == full:
        assert time.monotonic() < deadline
    # It may shrink again before anybody looks.
    while ask(server, "POST", "/v1/chat/completions", SAID).status != 200 or now()["blocks"] < full:
        assert time.monotonic() < deadline
    assert server.stop() == 0
