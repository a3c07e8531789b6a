"""What the server refuses, and how it ends."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

import bstk
from bstack.serve.guard import Guard, check_names, is_loopback
from bstack.serve.requests import ApiError

pytestmark = pytest.mark.slow
SAID = {"messages": [{"role": "user", "content": "the river"}], "max_tokens": 3}


def ask(server, method="GET", path="/v1/models", body=None, **headers):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
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
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

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
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n"
        connection.sendall(head + b" " * (4 * 2**20 + 1))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert ask(server, "GET", "/v1/models", X_Large="x" * 20000).status == 431
    assert ask(server, "GET", "/v1/models", X_Large="x" * 60000).status in (400, 431)
    address = urlsplit(server.url)
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 50,
        b"POST / HTTP/1.1\r\nHost: x\r\n",
    ):
        with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 200 " not in connection.recv(4096)
    assert ask(server).status == 200


def test_a_body_that_does_not_come(monkeypatch):
    anyio = pytest.importorskip("anyio")
    app = pytest.importorskip("bstack.serve.app", reason="the server needs its packages", exc_type=ImportError)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)

    async def never():
        await anyio.sleep(60)

    async def run():
        with pytest.raises(ApiError) as caught:
            await app._body(app.Request({"type": "http", "method": "POST", "headers": []}, never))
        assert caught.value.status == 408

    anyio.run(run)


def test_connections_on_which_nothing_moves(monkeypatch):
    """Without a request, with half of one, also after an answer, and where nobody takes what is sent."""
    uvicorn = pytest.importorskip("uvicorn", reason="the server needs it")
    from starlette.responses import PlainTextResponse

    from bstack.serve import app, connection

    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.4)
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.4)
    monkeypatch.setattr(connection, "LAST_SECONDS", 0.4)
    ended = []

    async def endless():
        while True:
            yield "data: " + "x" * 10000 + "\n\n"
            await asyncio.sleep(0)

    async def application(scope, receive, send):
        if scope["path"] == "/endless":
            answer = app._Stream(endless(), lambda: ended.append(1))
        else:
            answer = PlainTextResponse("x" * (2**20 if scope["path"] == "/large" else 1))
        await answer(scope, receive, send)

    config = uvicorn.Config(application, http=connection.Connection, ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    monkeypatch.setattr(server, "capture_signals", contextlib.nullcontext)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    get = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"
    try:
        opened = []
        for sent in (b"", b"GET / HTTP/1.1\r\nHo", get % b"/" + b"GET / HT", get % b"/endless", get % b"/large"):
            opened.append(socket.socket())
            opened[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            opened[-1].connect(sock.getsockname())
            opened[-1].sendall(sent)
        deadline = time.monotonic() + 300
        while len(ended) < 1 or server.server_state.connections or server.server_state.total_requests < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for one in opened:
            one.close()
        monkeypatch.setattr(connection, "SEND_SECONDS", 5.0)
        monkeypatch.setattr(connection, "LAST_SECONDS", 5.0)
        with socket.create_connection(sock.getsockname(), timeout=300) as one:  # who reads slowly, but reads, gets all
            one.sendall(get % b"/large")
            found = 0
            while found < 2**20:
                part = one.recv(2**17)
                assert part, "it was cut off"
                found += len(part)
                time.sleep(0.05)
    finally:
        server.should_exit = True
        thread.join()


def test_pages_elsewhere_read_what_is_refused(start):
    server = start("--api-key", "secret", "--allow-origin", "https://Mine.example/")
    mine = {"Origin": "https://mine.example"}
    for key, status in (("secret", 200), ("wrong", 401)):
        answer = ask(server, Authorization=f"Bearer {key}", **mine)
        assert answer.status == status and answer.headers["access-control-allow-origin"] == mine["Origin"]
    assert "access-control-allow-origin" not in ask(server, Origin="https://evil.example").headers
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("hosts", "origins"),
    [
        (["box.lan:80"], []),
        (["http://box"], []),
        ([""], []),
        ([], ["*"]),
        ([], ["mine.example"]),
        ([], ["https://a/b"]),
    ],
)
def test_names_that_no_request_has(hosts, origins):
    pytest.importorskip("starlette")
    check_names(["box.lan", "10.0.0.1", "::1"], ["http://localhost:3000", "https://Mine.example/"])
    with pytest.raises(bstk.UsageError):
        check_names(hosts, origins)


def test_a_full_queue(start):
    server = start("--parallel", "1", "--queue", "1")
    address = urlsplit(server.url)
    body = json.dumps({**SAID, "max_tokens": 900, "stream": True, "logit_bias": {"2": -100}}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def ask_behind_two():
        held = [socket.create_connection((address.hostname, address.port), timeout=300) for _ in range(2)]
        for connection in held:
            connection.sendall(request)
            connection.recv(100)
        answer = ask(server, "POST", "/v1/chat/completions", SAID)
        for connection in held:
            connection.close()
        return answer

    deadline = time.monotonic() + 300
    while (answer := ask_behind_two()).status != 429:  # where this process waits, a text may have ended by then
        assert answer.status == 200 and time.monotonic() < deadline
    assert int(answer.headers["retry-after"]) >= 1 and answer.body["error"]["code"] == "queue_full"
    assert ask(server, "POST", "/v1/chat/completions", {**SAID, "n": 3}).status == 400, "that many never fit"
    while ask(server, "POST", "/v1/chat/completions", SAID).status != 200:
        assert time.monotonic() < deadline
    assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_texts_end(start, number):
    server = start()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
        body = json.dumps({**SAID, "max_tokens": 400, "stream": True, "logit_bias": {"2": -100}}).encode()
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        text = connection.recv(2000)
        server.process.send_signal(number)
        while part := connection.recv(65536):
            text += part
    assert b"[DONE]" in text and text.count(b"data: ") > 300
    assert server.process.wait(300) == 0
    assert server.stop() == 0 and "Stopped." in server.log and "Traceback" not in server.log


def test_a_second_signal_does_not_wait(start):
    server = start()
    address = urlsplit(server.url)
    body = json.dumps({**SAID, "max_tokens": 900, "n": 8, "stream": True, "logit_bias": {"2": -100}}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
        connection.sendall(head + body)
        connection.recv(100)
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # it takes no more connections
            while ask(server, "POST", "/v1/chat/completions", SAID).status == 200:
                pass
        assert server.process.poll() is None
        assert server.stop(signal.SIGINT) == 0 and "Traceback" not in server.log, server.log


@pytest.mark.parametrize("size", ["100", "auto"])
def test_nobody_asks(start, size):
    """The model becomes small, and grows back with the first request."""
    server = start("--idle-after", "2", "--mb", size)

    def now():
        return ask(server, path="/v1/budget").body

    full = now()["all_blocks"]
    deadline = time.monotonic() + 300
    while not now()["idle"] or now()["blocks"] == full:
        assert time.monotonic() < deadline
    while now()["blocks"] < full:
        assert ask(server, "POST", "/v1/chat/completions", SAID).status == 200
        assert time.monotonic() < deadline
    while not now()["idle"]:
        assert time.monotonic() < deadline
    asked = time.monotonic()
    assert ask(server, "POST", "/v1/budget", {"mb": now()["max_mb"]}).status == 200
    while now()["blocks"] < full or time.monotonic() < asked + 1.2:  # longer than between two looks
        assert not now()["idle"] or time.monotonic() > asked + 2
    assert server.stop() == 0
