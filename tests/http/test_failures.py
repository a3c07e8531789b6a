"""What can be wrong with a server or the way to it: a class of error for each, words that help, and no output."""

import re
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from range_server import CERTIFICATE
from served_files import cut_sizes

import bstk
from bstk import http_answer, hub


def opened(url):
    with bstk.open(url) as file:
        return file.root


@pytest.mark.parametrize(
    ("status", "error", "code", "words"),
    [
        (404, bstk.RemoteError, 2, "no such file"),
        (410, bstk.RemoteError, 2, "no such file"),
        (401, bstk.RemoteError, 1, "HF_TOKEN"),
        (403, bstk.RemoteError, 1, "refuses access"),
        (400, bstk.RemoteError, 1, "answers 400"),
        (301, bstk.RemoteError, 1, "answers 301"),
        (204, bstk.RemoteError, 1, "answers 204"),
    ],
)
def test_refusals_are_not_repeated(model, serve, status, error, code, words):
    server = serve(model, statuses=[status] * 9)
    with pytest.raises(error, match=words) as caught:
        opened(server.url)
    assert type(caught.value) is error and caught.value.exit_code == code and len(server.asked) == 1
    assert str(caught.value).startswith(server.url)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 408, -1])
def test_disorders_are_repeated_a_few_times(model, serve, status):
    server = serve(model, statuses=[status] * 5)
    assert opened(server.url) and len(server.asked) == 6
    server = serve(model, statuses=[status] * 6)
    words = (
        "cannot be reached"
        if status == -1
        else f"cannot be read after 6 attempts: the server answers {status}. Try again later"
    )
    with pytest.raises(bstk.RemoteError, check=lambda error: not error.resumable and not error.missing, match=words):
        opened(server.url)
    assert len(server.asked) == 6


def test_delays_double_and_the_server_may_ask_for_more(model, serve, monkeypatch):
    waits = []
    monkeypatch.setattr("bstk.http.FIRST_DELAY", 0.5)
    monkeypatch.setattr("bstk.http.time", SimpleNamespace(sleep=waits.append))
    server = serve(model, statuses=[503] * 4)
    opened(server.url)
    server.statuses, server.retry_after = [429, 503], "7"
    opened(server.url)
    server.statuses, server.retry_after = [429], "86400"
    opened(server.url)
    assert waits == [0.5, 1, 2, 4, 7, 7, 60]


def test_disorders_in_the_middle(long_head, serve, tmp_path):
    server = serve(long_head, drop_after=50_000, drops=2, statuses=[0, 0, 503, 0, 500, -1])
    bstk.truncate(server.url, tmp_path / "out.bstk", 1000)
    assert (tmp_path / "out.bstk").read_bytes() == long_head
    server.statuses, server.etag = [0, 0] + [503] * 6, '"two"'
    with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable, match="answers 503") as caught:
        bstk.truncate(server.url, tmp_path / "other.bstk", 1000)
    assert caught.value.exit_code == 75


def test_nobody_there():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(
        bstk.RemoteError, check=lambda error: not error.resumable and not error.missing, match="Connection refused"
    ):
        opened(f"http://127.0.0.1:{port}/x.bstk")
    with pytest.raises(
        bstk.RemoteError,
        check=lambda error: not error.resumable and not error.missing,
        match=r"reached: Failed to resolve 'nobody\.invalid'",
    ):
        opened("http://nobody.invalid/x.bstk")


@pytest.mark.parametrize("url", ["http://", "https:///x", "http://a..b/x", "http://[::x/y", "http://localhost:99999/x"])
def test_no_url(url):
    with pytest.raises(bstk.RemoteError, check=lambda error: error.missing, match="not a URL that can be read"):
        opened(url)


def test_silence(model, serve, monkeypatch, tmp_path):
    monkeypatch.setattr("bstk.http.READ_TIMEOUT", 0.5)
    monkeypatch.setattr("bstk.http.RETRIES", 1)
    server = serve(model, pause=5)
    started = time.monotonic()
    with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable, match=r"no data for 0.5 s"):
        opened(server.url)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(
            bstk.RemoteError, check=lambda error: not error.resumable and not error.missing, match="no answer in time"
        ):
            opened(f"http://127.0.0.1:{listener.getsockname()[1]}/x.bstk")
    assert time.monotonic() - started < 60  # the pauses of an unlimited wait would add up to more


def test_tls(model, serve, monkeypatch):
    server = serve(model, tls=True)
    with pytest.raises(bstk.RemoteError, match=r"(?i)self.signed.*REQUESTS_CA_BUNDLE"):
        opened(server.url)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    assert opened(server.url)
    plain = serve(model)
    with pytest.raises(bstk.RemoteError):  # no TLS there
        opened(plain.url.replace("http:", "https:"))


def test_redirects(model, serve, monkeypatch):
    cdn = serve(model)
    hub = serve(b"", redirect=cdn.base)
    assert opened(f"{hub.base}/go/file.bstk") and cdn.asked[0].path == "/file.bstk"
    assert cdn.asked[0].headers["Range"] == "bytes=0-65535"
    hub.redirect = hub.base + "/go"
    with pytest.raises(bstk.RemoteError, match="in circles"):
        opened(f"{hub.base}/go/file.bstk")
    hub.redirect = "ftp://me:password@127.0.0.1/x?key=secret"
    with pytest.raises(bstk.RemoteError, check=lambda error: error.missing, match="No connection adapters") as caught:
        opened(f"{hub.base}/go/file.bstk")
    assert not re.search("password|secret", str(caught.value))
    secure = serve(b"", redirect=cdn.base, tls=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    with pytest.raises(bstk.RemoteError, match="from https to an unprotected URL"):
        opened(f"{secure.base}/go/file.bstk")


def test_each_request_follows_the_redirect_anew(long_head, serve, tmp_path):
    cdn = serve(long_head)
    hub = serve(b"", redirect=cdn.base)
    bstk.truncate(f"{hub.base}/go/file.bstk", tmp_path / "out.bstk", 1000)
    assert len(hub.asked) == len(cdn.asked) == 3  # a signed address may have expired meanwhile


def test_tokens_go_to_the_hub_alone(model, serve, monkeypatch):
    cdn = serve(model)
    hub = serve(b"", redirect=cdn.base.replace("127.0.0.1", "localhost"))
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.base}/go")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with bstk.open("hf://owner/repo/sub/file name.bstk") as file:
        assert file.source.name == "hf://owner/repo/sub/file name.bstk"
    assert hub.asked[0].path == "/go/owner/repo/resolve/main/sub/file%20name.bstk"
    assert hub.asked[0].headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in cdn.asked[0].headers
    opened("hf://owner/repo@v1/file.bstk")
    assert hub.asked[1].path == "/go/owner/repo/resolve/v1/file.bstk"
    opened(cdn.url)
    assert "Authorization" not in cdn.asked[-1].headers
    opened("hf://models/owner/repo@refs/pr/7/file.bstk")
    opened("hf://owner/repo@a%2Fb/file.bstk")
    assert [asked.path for asked in hub.asked[2:]] == [
        f"/go/owner/repo/resolve/{revision}/file.bstk" for revision in ("refs%2Fpr%2F7", "a%2Fb")
    ]
    for bad in ("hf://", "hf://owner", "hf://owner/", "hf:///repo/file", "hf://datasets/owner/repo/file.bstk"):
        with pytest.raises(bstk.RemoteError, check=lambda error: error.missing, match="hf://OWNER/REPO"):
            opened(bad)


_HUB_TOKEN = "import huggingface_hub, sys; sys.stdout.write(str(huggingface_hub.get_token()))"


@pytest.mark.parametrize(
    ("variables", "files", "wanted"),
    [
        ({}, {}, None),
        ({"HF_TOKEN": "one"}, {"cache/huggingface/token": "file"}, "one"),
        ({"HF_TOKEN": " one\n"}, {}, "one"),
        ({"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "two"}, {}, "two"),
        ({"HF_TOKEN": "one", "HUGGING_FACE_HUB_TOKEN": "two"}, {}, "one"),
        ({}, {"cache/huggingface/token": "file\n"}, "file"),
        ({"XDG_CACHE_HOME": None}, {".cache/huggingface/token": "file"}, "file"),
        ({"HF_HOME": "{home}/hub"}, {"hub/token": "of-home", "cache/huggingface/token": "no"}, "of-home"),
        ({"HF_HOME": "~/hub"}, {"hub/token": "of-home"}, "of-home"),
        ({"HF_TOKEN_PATH": "$HOME/mine"}, {"mine": "of-path", "cache/huggingface/token": "no"}, "of-path"),
        ({"HF_TOKEN": "  "}, {"cache/huggingface/token": "file"}, "file"),
        ({}, {"cache/huggingface/token": " \n"}, None),
    ],
)
def test_the_token_is_that_of_huggingface_hub(variables, files, wanted, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value.format(home=tmp_path))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert hub.token("hf://owner/repo/file.bstk") == wanted and hub.token("https://host/file.bstk") is None
    # Another process, because huggingface_hub reads these variables when it is imported.
    done = subprocess.run([sys.executable, "-c", _HUB_TOKEN], capture_output=True, text=True, check=True)
    assert done.stdout == str(wanted)


def test_netrc(model, serve, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serve(model)
    opened(server.url)
    assert server.asked[0].headers["Authorization"].startswith("Basic ")


def test_secrets_are_not_shown(model, serve):
    server = serve(model, statuses=[403])
    url = server.url.replace("//", "//me:password@") + "?signature=secret#part"
    with pytest.raises(bstk.RemoteError) as caught:
        opened(url)
    assert not re.search("password|secret", str(caught.value)) and server.url in str(caught.value)
    assert server.asked[0].path.endswith("?signature=secret")
    with bstk.open(url) as file:
        assert file.source.name == server.url


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"Content-Range": "bytes 1-65536/200000"}, "asked for bytes 0-"),
        ({"Content-Range": "bytes 0-9/200000"}, "asked for bytes 0-"),
        ({"Content-Range": "bytes 0-65535/*"}, "does not say how long"),
        ({"Content-Range": "octets 0-65535/200000"}, "does not say how long"),
        ({"Content-Range": ""}, "does not say how long"),
        ({"Content-Range": f"bytes 0-65535/{'9' * 30}"}, "does not say how long"),
        ({"Content-Length": "17"}, "announces 17 bytes instead of 65536"),
        ({"Content-Length": "65537"}, "announces 65537 bytes"),
    ],
)
def test_lies_about_ranges(long_head, serve, fields, words):
    server = serve(long_head, overwrite=fields)
    with pytest.raises(bstk.RemoteError, match=words) as caught:
        opened(server.url)
    assert len(server.asked) == 1 and "another tool" in str(caught.value)


def test_lies_about_the_length_of_the_file(model, serve, tmp_path):
    """The format knows how long the file is: too much is damage, too little is a cut."""
    length = len(model)
    server = serve(model + b"more")
    with pytest.raises(bstk.DamagedError, match="4 more than"):
        opened(server.url)
    server = serve(model, overwrite={"Content-Range": f"bytes 0-65535/{length - 1}"})
    with pytest.warns(bstk.PartialWarning):
        opened(server.url)
    server = serve(model, overwrite={"Content-Range": "bytes 0-65535/70000"})
    with pytest.raises((bstk.RemoteError, bstk.TruncatedError)):
        bstk.truncate(server.url, tmp_path / "out.bstk", 1000)
    assert not (tmp_path / "out.bstk").exists()


def test_short_bodies(long_head, serve, tmp_path, monkeypatch):
    """A body that always ends early brings a few bytes more with each attempt, until there were enough attempts."""
    monkeypatch.setattr("bstk.http.RETRIES_IN_ALL", 20)
    server = serve(long_head, drop_after=5000)
    with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable):
        bstk.truncate(server.url, tmp_path / "out.bstk", 1000)
    server = serve(long_head, drop_after=0)
    with pytest.raises(bstk.RemoteError, check=lambda error: error.resumable, match="early"):
        opened(server.url)
    assert len(server.asked) == 6


def test_no_length_and_no_ranges(model, serve):
    server = serve(model, ranges=False, chunked=True)
    with pytest.raises(bstk.RemoteError, match="serves no ranges and does not say how long"):
        opened(server.url)


@pytest.mark.parametrize("ranges", [True, False])
def test_compression(model, serve, ranges):
    server = serve(model, compress="always", ranges=ranges)
    with pytest.raises(bstk.RemoteError, match=r"compresses the file \(gzip\)"):
        opened(server.url)
    server = serve(model, compress="offered", ranges=ranges)
    assert opened(server.url)


def test_no_bstk_file(serve):
    for data, words in (
        (b"<!DOCTYPE html><title>Log in</title>" + b" " * 300, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-lfs pointer"),
        (b"", "the file is empty"),
    ):
        server = serve(data)
        with pytest.raises(bstk.NotBstkError, match=words) as caught:
            opened(server.url)
        assert caught.value.exit_code == 4 and str(caught.value).startswith(server.url)


def test_a_part_of_a_file(model, serve, tmp_path):
    sizes = cut_sizes(model)
    server = serve(model[: int(sizes[3] * bstk.MB) + 10])
    with pytest.warns(bstk.PartialWarning):
        opened(server.url)
    with pytest.raises(bstk.PartialError):
        bstk.open(server.url, strict=True)
    bstk.truncate(server.url, tmp_path / "out.bstk", 1000)
    with bstk.open(tmp_path / "out.bstk", strict=True) as file:
        assert file.length == round(sizes[3] * bstk.MB)
    with pytest.raises(bstk.TruncatedError):
        opened(serve(model[:5000]).url)


@pytest.mark.parametrize("tags", [('"one"', '"two"'), (None, None)])
def test_a_file_that_changes_is_read_anew_once(long_head, model, serve, tmp_path, tags):
    """With tags the answers differ in them; without, in the length."""
    out = tmp_path / "out.bstk"
    first, second = tags
    for number in (1, 2):  # while the header is read, or before the blocks are
        server = serve(long_head, etag=first, then={number: {"data": model, "etag": second}})
        bstk.truncate(server.url, out, 1000)
        assert out.read_bytes() == model
    server = serve(long_head, etag=first, drop_after=40_000, then={5: {"data": model, "etag": second}})
    bstk.truncate(server.url, out, 1000)
    assert out.read_bytes() == model


def test_a_file_that_keeps_changing_is_refused(long_head, serve, tmp_path):
    server = serve(long_head, then={number: {"etag": f'"{number}"'} for number in range(50)})
    with pytest.raises(bstk.RemoteChangedError, match="was replaced while it was read"):
        bstk.truncate(server.url, tmp_path / "out.bstk", 1000)
    assert not (tmp_path / "out.bstk").exists() and len(server.asked) < 10


def test_a_file_that_became_shorter(long_head, model, serve):
    server = serve(long_head, etag=None)
    with bstk.open(server.url) as file:
        server.data = model
        with pytest.raises(bstk.RemoteChangedError):
            file.read(file.chunks[-1])  # 416: it would begin behind the end
    server = serve(long_head, statuses=[0, 0, 416])
    with bstk.open(server.url) as file, pytest.raises(bstk.RemoteError, match="answers 416"):
        file.read(file.chunks[-1])


def test_same_length_and_another_tag(model, other, serve):
    assert len(model) == len(other)
    server = serve(model)
    with bstk.open(server.url) as file:
        server.data, server.etag = other, '"two"'
        with pytest.raises(bstk.RemoteChangedError):
            file.read(file.chunks[-1])


def test_without_the_package(model, serve, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "requests", None)
    with pytest.raises(bstk.BstkError, match=r"pip install 'bstack\[http\]'"):
        opened(serve(model).url)


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ((5, '"a"', None), (5, '"a"', "later"), True),
        ((5, '"a"', "now"), (5, '"b"', "now"), False),
        ((5, '"a"', None), (6, '"a"', None), False),
        ((5, None, "now"), (5, None, "later"), False),
        ((5, None, "now"), (5, '"a"', None), True),
        ((5, None, None), (5, None, None), True),
    ],
)
def test_versions(one, two, same):
    assert http_answer.Version(*one).is_same(http_answer.Version(*two)) == same
