"""The reader in format/js over HTTP: what it asks for, what it cuts, and servers that cannot be relied on."""

import pytest
from javascript_reader import MARKS, expected_cut, node
from range_server import RangeServer
from served_files import cut_sizes

pytestmark = [*MARKS, pytest.mark.slow]


def by_url(server, **job):
    (result,) = node([{"url": server.url, "from": "url", **job}])
    return result


@pytest.mark.parametrize(("which", "to_open"), [("model", 1), ("long_head", 2)])
def test_from_a_url(which, to_open, request, tmp_path):
    data = request.getfixturevalue(which)
    (tmp_path / "model.bstk").write_bytes(data)
    mb = cut_sizes(data)[20]
    with RangeServer(data) as server:
        assert by_url(server)["requests"] == to_open
        result = by_url(server, cuts=[(mb, True)])
        asked = server.asked[to_open:]
        ranges = server.ranges_asked()[to_open:]
    assert result["cuts"] == [expected_cut(tmp_path / "model.bstk", tmp_path / "out.bstk", mb, True)]
    length = (tmp_path / "out.bstk").stat().st_size
    assert result["requests"] == len(asked) == to_open + 1
    assert [first for first, _ in ranges[1:]] == [last + 1 for _, last in ranges[:-1]] and ranges[-1][1] == length - 1
    assert all(a.headers.get("accept-encoding", a.headers.get("Accept-Encoding")) == "identity" for a in asked)
    assert [a.headers.get("if-range", a.headers.get("If-Range")) for a in asked] == [None] + ['"one"'] * to_open


def test_a_small_file_from_a_server_without_ranges(good):
    with RangeServer(good, ranges=False) as server:
        assert by_url(server, verify=True)["verify"]["chunks"] == 8


def test_a_large_file_from_a_server_without_ranges_is_not_fetched(model):
    data = model + bytes(2**26)
    with RangeServer(data, ranges=False) as server:
        assert by_url(server)["error"] == "RemoteAnswerError"
        assert server.sent < len(data)


def test_no_user_in_a_url(model):
    with RangeServer(model) as server:
        (result,) = node([{"url": server.url.replace("//", "//me:secret@"), "from": "url"}])
        assert result["error"] == "UsageError" and "secret" not in result["message"] and not server.asked


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"compress": "always"}, "RemoteAnswerError"),
        ({"statuses": [404]}, "RemoteNotFoundError"),
        ({"statuses": [403]}, "RemoteAccessError"),
        ({"statuses": [503]}, "RemoteAnswerError"),
        ({"statuses": [-1]}, "UnreachableError"),
        ({"drop_after": 1000}, "TransferError"),
        ({"then": {1: {"etag": '"two"'}}}, "RemoteChangedError"),
        ({"then": {1: {"overwrite": {"ETag": '"two"'}}}}, "RemoteChangedError"),
        ({"etag": None, "modified": "x", "then": {1: {"modified": "y"}}}, "RemoteChangedError"),
        ({"overwrite": {"Content-Range": ""}}, "RemoteAnswerError"),
        ({"overwrite": {"Content-Range": "bytes 1-65536/200000"}}, "RemoteAnswerError"),
        ({"overwrite": {"Content-Range": "bytes 0-65535/*"}}, "RemoteAnswerError"),
        ({"overwrite": {"Content-Range": "bytes 0-65535/99999999999999999999"}}, "RemoteAnswerError"),
        ({"overwrite": {"Content-Range": "bytes 0-9/10"}, "chunked": True}, "RemoteAnswerError"),
    ],
)
def test_servers_that_cannot_be_relied_on(attributes, expected, long_head):
    with RangeServer(long_head, **attributes) as server:
        result = by_url(server)
    assert result.get("error") == expected, result
    assert result["message"].startswith(server.url)
