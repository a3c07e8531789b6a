"""The reader in format/js, which was written from SPEC.md alone, comes to the verdicts of `bstk`."""

import itertools
import json
import random
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bad_files
import pytest
import samples
import zstandard
from javascript_reader import MARKS, expected_cut, node, sha256

import bstk

VECTORS = Path(__file__).parents[2] / "format" / "vectors"
VERDICTS = json.loads((VECTORS / "verdicts.json").read_text())
COMMAND = Path(__file__).parents[2] / "format" / "js" / "cli.js"

pytestmark = [*MARKS, pytest.mark.slow]


@pytest.fixture(scope="module")
def zstd():
    """The URL of a server that decodes zstd frames: node has no decoder before 22.15."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            frame = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                status, body = 200, zstandard.ZstdDecompressor().decompress(frame)
            except zstandard.ZstdError as error:
                status, body = 400, str(error).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def content(reader):
    """As `samples.content`, in JSON's terms, with digests for raw bytes and errors for what cannot be read."""
    found = []
    for c in reader.chunks:
        try:
            raw = sha256(reader.read(c))
        except bstk.BstkError as error:
            raw = type(error).__name__
        fields = [
            c.name,
            c.kind.code,
            c.level,
            list(c.shape),
            c.dtype or "none",
            c.rank,
            c.transposed,
            c.importance,
            c.error,
        ]
        found.append([*fields, raw])
    return found


def plain(found):
    return [[*fields, raw["error"] if isinstance(raw, dict) else raw] for *fields, raw in found]


def opened(data):
    """The class of the error on opening, or state, root and chunks."""
    try:
        with bstk.open(data) as f:
            return f.state, f.root.hex(), f.memory_bytes, content(f)
    except bstk.BstkError as error:
        return type(error).__name__


def in_javascript(result):
    if "error" in result:
        return result["error"]
    return result["state"], result["root"], result["memory"], plain(result["content"])


@pytest.mark.parametrize("how", ["path", "bytes", "blob"])
def test_golden_and_bad_vectors(how, zstd):
    jobs = [
        {"path": str(VECTORS / name), "from": how, "verify": True, "contents": True, "content": True, "zstd": zstd}
        for name in VERDICTS
    ]
    for (name, verdict), result in zip(VERDICTS.items(), node(jobs), strict=True):
        if verdict["open"] != "ok":
            assert result.get("error") == verdict["open"], name
            assert len(result["message"]) > 30, name
            continue
        assert in_javascript(result) == opened((VECTORS / name).read_bytes()), name
        assert (result["state"], result["root"]) == (verdict["state"], verdict["root"]), name
        assert result["warnings"] == (verdict["state"] == "partial"), name
        assert result["contents"].get("error", "ok") == verdict["verify"], name
        # Without decoding, what only the decoded bytes show is not found.
        unseen = verdict["verify"] == "ok" or re.match("bad-(outliers|spqr|exact)-", name)
        assert result["verify"].get("error", "ok") == ("ok" if unseen else "DamagedError"), name
        with bstk.open(VECTORS / name) as f:
            assert result["metadata"] == f.metadata


def test_named_bad_files(good, tmp_path, zstd):
    expected = {case: expected for case, (_, expected) in bad_files.OPEN.items()}
    changes = {case: change for case, (change, _) in bad_files.OPEN.items()}
    changes |= {case: change for case, (_, change) in bad_files.CHUNK.items()}
    for case, change in changes.items():
        (tmp_path / case).write_bytes(bad_files.build(change, good))
    jobs = [{"path": str(tmp_path / case), "content": True, "contents": True, "zstd": zstd} for case in changes]
    for case, result in zip(changes, node(jobs), strict=True):
        if case in expected:
            assert result.get("error") == expected[case], case
            assert result["message"].startswith(str(tmp_path / case)) and "undefined" not in result["message"], case
        else:
            number = bad_files.CHUNK[case][0]
            refused = [i for i, (*_, raw) in enumerate(result["content"]) if isinstance(raw, dict)]
            assert refused == [number] and result["content"][number][-1]["error"] == "DamagedError", case
            assert result["contents"]["error"] == "DamagedError", case


def test_stacks_of_all_kinds(good, tmp_path, zstd):
    """Each row of three kinds and fewer: both readers take it, or neither does."""
    every = [
        stack
        for length in (1, 2, 3)
        for stack in itertools.product(("sign", "trellis", "spqr", "outliers", "trellis5"), repeat=length)
    ]
    for number, stack in enumerate(every):
        draft = samples.Draft(good)
        samples.stack(draft, *stack)
        (tmp_path / str(number)).write_bytes(draft.bytes())
    jobs = [{"path": str(tmp_path / str(number)), "content": True, "zstd": zstd} for number in range(len(every))]
    taken = 0
    for number, (stack, result) in enumerate(zip(every, node(jobs), strict=True)):
        expected = opened((tmp_path / str(number)).read_bytes())
        assert in_javascript(result) == expected, stack
        taken += not isinstance(expected, str)
    assert 0 < taken < len(every)


def test_files_with_fields_set_to_anything(good, tmp_path, zstd):
    """Past the digests, so that the rules themselves are compared: each file is opened by both readers."""
    chosen = random.Random(7)
    fields = [(name, code) for name, (_, code) in samples.PREAMBLE.items() if code in "HIQ" and name != "crc"]
    record_fields = [(name, code) for name, (_, code) in samples.RECORD.items() if code in "BHIQ"]
    largest = {"B": 2**8, "H": 2**16, "I": 2**32, "Q": 2**64}
    jobs, files = [], []
    for i in range(400):
        draft = samples.Draft(good)
        for _ in range(chosen.choice([0, 0, 1])):
            name, code = chosen.choice(fields)
            near = draft.preamble[name] + chosen.choice([-1, 1])
            draft.forced[name] = chosen.choice([near, 0, 2**31, 2**63, chosen.randrange(20)]) % largest[code]
        for _ in range(chosen.choice([0, 1, 2])):
            name, code = chosen.choice(record_fields)
            draft.set(chosen.randrange(8), **{name: chosen.choice([*range(12), 2**31, 2**48, 2**63]) % largest[code]})
        data = draft.bytes()
        data = data[: chosen.choice([None, None, None, chosen.randrange(len(data))])]
        files.append(data)
        (tmp_path / str(i)).write_bytes(data)
        jobs.append({"path": str(tmp_path / str(i)), "content": True, "zstd": zstd})
    for i, (data, result) in enumerate(zip(files, node(jobs), strict=True)):
        assert in_javascript(result) == opened(data), (i, result)


TEXTS = [
    *(
        f'{{"a":{value}}}'
        for value in (
            "01",
            "1.",
            ".5",
            "+1",
            "-",
            "1e",
            "-0.0",
            "1e-999",
            "1e308",
            "0e999",
            "1.7976931348623159e308",
            "0x10",
            "1_0",
            "tru",
            "truee",
            "\uff11",
            '"\t"',
            '"\\x41"',
            '"\\u12"',
            '"\\/"',
            '"\x7f"',
            '"\\ud83d\\u0041"',
            '"\\ud83d\\ude00"',
            "[1,]",
            "[,]",
            "[}",
            "{1:1}",
            "1 2",
            "1]",
            "",
            "9" * 400,
            "9" * 5000,
            "0." + "1" * 5000,
        )
    ),
    " \t\r\n{ } ",
    "{}\0",
    "{}\v",
    "\xa0{}",
    "{,}",
    '{"a":1,}',
    '{"a" 1}',
    '{"a"',
    '{"',
    '{"\\',
    "[{}]",
    "  ",
    "{}//",
    '{"__proto__":1,"constructor":2}',
    '{"__proto__":1,"__proto__":1}',
    '{"":1,"":2}',
    '{"1":1,"01":2}',
    '{"\\ud83d\\ude00":1,"\U0001f600":2}',
    '{"\u2028\ufeff":1}',
]


def test_metadata_is_json_and_no_more(good, tmp_path, zstd):
    files = []
    for i, text in enumerate(TEXTS):
        draft = samples.Draft(good)
        draft.metadata = text.encode()
        files.append(draft.bytes())
        (tmp_path / str(i)).write_bytes(files[-1])
    results = node([{"path": str(tmp_path / str(i)), "content": True, "zstd": zstd} for i in range(len(TEXTS))])
    accepted = 0
    for text, data, result in zip(TEXTS, files, results, strict=True):
        assert in_javascript(result) == opened(data), text
        if "error" not in result:
            assert result["metadata"] == bstk.open(data).metadata, text
            accepted += 1
    assert 10 < accepted < 20


def test_bytes_flipped(good, tmp_path):
    positions = range(0, len(good), 3)
    for i in positions:
        (tmp_path / str(i)).write_bytes(good[:i] + bytes([good[i] ^ 0x80]) + good[i + 1 :])
    results = node([{"path": str(tmp_path / str(i)), "verify": True} for i in positions])
    for i, result in zip(positions, results, strict=True):
        assert "error" in result or "error" in result["verify"], i


def budgets(path):
    with bstk.open(path) as f:
        sizes = [size for c in f.chunks[f.base_count - 1 :] for size in (c.end - 1, c.end, c.end + 1, f.memory_bytes)]
    exact = [size / bstk.MB for size in sizes]
    return [*exact, "0.0001", "0.00177", ".0018", "1e-2", "1", 0.0018, 5]


@pytest.mark.parametrize("how", ["path", "bytes", "blob"])
def test_cuts_are_byte_for_byte_those_of_truncate(how, tmp_path):
    names = [name for name, verdict in VERDICTS.items() if verdict.get("verify") == "ok"]
    wide = tmp_path / "wide.bstk"  # its weights take more memory than the file has bytes
    blocks = [samples.sign("b", level) for level in range(3)]
    bstk.write(wide, {}, [samples.entry("a", bstk.TENSOR, bytes(10_000), shape=(2500,), dtype="f32"), *blocks], 2)
    paths = [*(VECTORS / name for name in names), wide]
    cuts = {path: [(mb, seal) for mb in budgets(path) for seal in (True, False)] for path in paths}
    results = node([{"path": str(path), "from": how, "cuts": cuts[path]} for path in paths])
    compared = 0
    for path, result in zip(paths, results, strict=True):
        for (mb, seal), cut in zip(cuts[path], result["cuts"], strict=True):
            cut = cut["error"] if isinstance(cut, dict) else cut
            assert cut == expected_cut(path, tmp_path / "out.bstk", mb, seal), (path.name, mb, seal)
            compared += len(cut) == 64
    assert compared > 100


@pytest.mark.parametrize("how", ["path", "bytes", "blob"])
def test_a_damaged_chunk_is_not_cut_out(how, good, tmp_path):
    with bstk.open(good) as f:
        chunk = f.chunks[f.base_count]
    damaged = tmp_path / "damaged.bstk"
    damaged.write_bytes(good[: chunk.offset] + bytes([good[chunk.offset] ^ 1]) + good[chunk.offset + 1 :])
    cuts = [(chunk.offset / bstk.MB, True), (chunk.end / bstk.MB, True)]
    (result,) = node([{"path": str(damaged), "from": how, "cuts": cuts, "verify": True}])
    assert result["cuts"][0] == expected_cut(damaged, tmp_path / "out.bstk", *cuts[0])
    assert result["cuts"][1]["error"] == result["verify"]["error"] == "DamagedError"
    assert f'("{chunk.name}") at offset {chunk.offset}' in result["verify"]["message"]


def test_a_chunk_that_is_checked_as_it_streams(tmp_path, zstd):
    length = 2**24 + 1000
    raw = random.Random(1).randbytes(length)
    path = tmp_path / "large.bstk"
    entries = [
        samples.entry("a", bstk.TENSOR, raw, shape=(length,), dtype="u8"),
        samples.sign("b", 0),
        samples.sign("b", 1),
    ]
    bstk.write(path, {}, entries, 2)
    data = path.read_bytes()
    with bstk.open(data) as f:
        start, end = f.chunks[0].offset, f.chunks[0].end
        mb = f.base_length / bstk.MB
    for name, at in {"first": start, "inside": start + 2**23, "last": end - 1}.items():
        (tmp_path / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    good = [{"path": str(path), "from": how, "cuts": [(mb, True)]} for how in ("path", "bytes", "blob")]
    bad = [{"path": str(tmp_path / name), "verify": True} for name in ("first", "inside", "last")]
    decoded, *results = node([{"path": str(path), "contents": True, "zstd": zstd}, *good, *bad])
    assert decoded["contents"]["contents"] is True
    assert [result["cuts"] for result in results[:3]] == [[expected_cut(path, tmp_path / "out.bstk", mb, True)]] * 3
    assert [result["verify"].get("error") for result in results[3:]] == ["DamagedError"] * 3


def test_root_strict_and_the_streaming_digest():
    path = {"path": str(VECTORS / "whole.bstk")}
    root = VERDICTS["whole.bstk"]["root"]
    results = node(
        [
            {**path, "root": root},
            {**path, "root": root.upper()},
            {**path, "root": "0" * 64},
            {**path, "root": "12"},
            {"path": str(VECTORS / "unsealed-cut.bstk"), "strict": True},
            {**path, "strict": True},
            {"digests": True},
            {"path": str(VECTORS)},
            {"path": str(VECTORS / "nothing.bstk")},
        ]
    )
    found = [result.get("error", "ok") if isinstance(result, dict) else result for result in results]
    assert found == [
        "ok",
        "ok",
        "RootMismatchError",
        "UsageError",
        "PartialError",
        "ok",
        "same",
        "UsageError",
        "UsageError",
    ]


def test_decoding_without_a_decoder_says_what_is_missing():
    (result,) = node([{"path": str(VECTORS / "whole.bstk"), "contents": True, "verify": True}])
    assert result["verify"]["chunks"] == 8
    # Node 22.15 and later decode themselves.
    contents = result["contents"]
    assert contents.get("contents") is True or (
        contents["error"] == "MissingZstdError" and "22.15" in contents["message"]
    )


def test_the_command(tmp_path):
    def command(*arguments):
        return subprocess.run(["node", str(COMMAND), *map(str, arguments)], capture_output=True, text=True)

    source, out = VECTORS / "whole.bstk", tmp_path / "out.bstk"
    mb = 1870 / 2**20
    assert json.loads(command("verify", source).stdout)["root"] == VERDICTS["whole.bstk"]["root"]
    assert command("truncate", source, "--mb", f"{mb:.20f}", "-o", out).returncode == 0
    assert out.read_bytes() == (VECTORS / "sealed.bstk").read_bytes()
    again = command("truncate", source, "--mb", "1", "-o", out)
    assert again.returncode == 2 and "--force" in again.stderr
    for arguments, code in [
        (("inspect", VECTORS / "bad-html.bstk"), 4),
        (("verify", VECTORS / "chunk-flip.bstk"), 5),
        (("truncate", source, "--mb", "0.0001", "-o", tmp_path / "new"), 6),
        (("truncate", VECTORS / "chunk-flip.bstk", "--mb", f"{1965 / 2**20:.20f}", "-o", tmp_path / "new"), 0),
        (("inspect", "--wrong"), 2),
    ]:
        run = command(*arguments)
        assert run.returncode == code and ("error: " in run.stderr) == bool(code), run.stderr
