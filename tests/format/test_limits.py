"""Every limit of the table in SPEC.md: accepted at it, refused one past it."""

import dataclasses
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import pytest
import samples
import zstandard

import bstk
from bstk import frames, limits, preamble

pytestmark = pytest.mark.slow

SPEC = Path(__file__).parents[2] / "format" / "SPEC.md"


def opens(data):
    try:
        bstk.open(data)
    except bstk.TruncatedError:
        return True  # all that could be checked without the rest of the bytes was good
    except bstk.DamagedError:
        return False
    return True


def test_the_table_in_the_specification_is_the_module():
    stated = {
        "full length": limits.MAX_FILE_LENGTH,
        "chunk count": limits.MAX_CHUNKS,
        "names length": limits.MAX_NAMES_LENGTH,
        "one name": limits.MAX_NAME_LENGTH,
        "metadata length": limits.MAX_METADATA_LENGTH,
        "metadata nesting": limits.MAX_METADATA_DEPTH,
        "metadata structure": limits.MAX_METADATA_STRUCTURE,
        "dimensions": limits.MAX_NDIM,
        "one dimension": limits.MAX_DIMENSION,
        "raw length of a chunk": limits.MAX_RAW_LENGTH,
        "raw length of all files together": limits.MAX_FILES_LENGTH,
        "expansion of a chunk": (limits.EXPANSION_SLACK, limits.MAX_EXPANSION),
        "zstd window": limits.MAX_WINDOW_LENGTH,
    }
    section = SPEC.read_text().split("## 12. Limits")[1].split("##")[0]
    rows = dict(re.findall(r"^\| ([a-z ]+?) \| (.+?) \|$", section, re.MULTILINE))
    del rows["what"]
    assert rows.keys() == stated.keys()
    for what, text in rows.items():
        numbers = [_number(*match) for match in re.findall(r"\b(?:(2)\^)?(\d+)( - 1)?", text)]
        wanted = stated[what] if isinstance(stated[what], tuple) else (stated[what],)
        assert tuple(numbers[-len(wanted) :]) == wanted, what


def _number(base, digits, minus_one):
    value = int(base) ** int(digits) if base else int(digits)
    return value - 1 if minus_one else value


@pytest.mark.parametrize("past", [0, 1])
def test_preamble_limits(good, past):
    large = {"full_length": limits.MAX_FILE_LENGTH, "base_length": limits.MAX_FILE_LENGTH}
    base = preamble.parse(good[:256])
    cases = [
        {**large, "full_length": limits.MAX_FILE_LENGTH + past},
        {**large, "chunk_count": limits.MAX_CHUNKS + past},
        {**large, "names_length": limits.MAX_NAMES_LENGTH + past},
        {**large, "metadata_length": limits.MAX_METADATA_LENGTH + past},
    ]
    for case in cases:
        assert opens(dataclasses.replace(base, **case).to_bytes() + good[256:]) is not bool(past), case


@pytest.mark.parametrize("past", [0, 1])
def test_name_length(good, past):
    draft = samples.Draft(good)
    draft.names[1] = "é".encode() * 512 + b"x" * past
    assert opens(draft.bytes()) is not bool(past)


@pytest.mark.parametrize("past", [0, 1])
def test_metadata_limits(good, tmp_path, past):
    frame = len('{"a":""}')
    cases = [
        {"a": "x" * (limits.MAX_METADATA_LENGTH - frame + past)},
        {"a": _nested(limits.MAX_METADATA_DEPTH - 1 + past)},
        {"a": [0] * (limits.MAX_METADATA_STRUCTURE - 2 + past)},
    ]
    for case in cases:
        draft = samples.Draft(good)
        draft.put_metadata(json.dumps(case, separators=(",", ":")).encode())
        assert opens(draft.bytes()) is not bool(past)
        if past:
            with pytest.raises(bstk.UsageError):
                bstk.write(tmp_path / "x", case, samples.entries(), samples.BASE)
        else:
            bstk.write(tmp_path / "x", case, samples.entries(), samples.BASE)


def _nested(levels):
    return [_nested(levels - 1)] if levels > 1 else []


def test_brackets_in_strings_are_no_nesting(good):
    draft = samples.Draft(good)
    draft.put_metadata({"a": "[" * 1000, "b": '"\\"' + "{" * 1000})
    assert opens(draft.bytes())


@pytest.mark.parametrize(
    ("shape", "stored", "accepted"),
    [
        ((limits.MAX_DIMENSION,), 2**21, True),  # the raw length is one below its limit
        ((limits.MAX_DIMENSION + 1,), 2**21, False),
        ((2**30, 2), 2**21, True),
        ((2**30, 2, 1, 1), 2**21, True),
        ((3, 715827883), 2**21 + 1, False),  # 2**31 + 1 bytes, no dimension too long
        ((2**20 + 1024 * 40,), 40, True),
        ((2**20 + 1024 * 40 + 1,), 40, False),
    ],
)
def test_raw_length_and_expansion(good, shape, stored, accepted):
    draft = samples.Draft(good)
    draft.chunk(1, bytes(stored), dtype=6, raw=math.prod(shape))
    draft.set(1, shape=struct.pack("<4I", *((*shape, 0, 0, 0))[:4]), ndim=len(shape))
    assert opens(draft.bytes()) is accepted


def test_rank(good):
    for rank, accepted in ((4, True), (5, False)):
        draft = samples.Draft(good)
        draft.set(7, rank=rank, raw=8 + 28 * rank)
        assert opens(draft.bytes()) is accepted


def test_memory_of_a_hostile_index():
    """Every record has a name, a shape and numbers of its own, so nothing of it is shared: SECURITY.md says how much that is."""
    count = 50_000
    record = struct.Struct("<IHH QQQ 4I BBHI dd 24s 32s")
    names = b"".join(struct.pack("<I", 5) + b"%05x" % number for number in range(count))
    header = 256 + 128 * count + len(names) + 2
    offset, records = header, []
    for number in range(count):
        rows, columns, stored = 300 + number % 1500, 300 + number // 1500, 3000 + number
        fields = (
            number,
            2,
            0,
            offset,
            stored,
            rows * columns,
            rows,
            columns,
            1,
            1,
            6,
            4,
            0,
            0,
            1.0 + number,
            0.5 + number,
        )
        records.append(record.pack(*fields, bytes(24), struct.pack("<4Q", number, 1, 1, 1)))
        offset += stored
    tables = b"".join(records), names, b"{}"
    head = preamble.Preamble(
        offset, offset, count, count, len(names), 2, *(hashlib.sha256(part).digest() for part in tables)
    )
    data = head.to_bytes() + b"".join(tables)
    source = types.SimpleNamespace(
        name="hostile", length=offset, read=lambda at, length: data[at : at + length], close=lambda: None
    )
    del records
    tracemalloc.start()
    try:
        with bstk.open(source) as file:
            assert len(file.chunks) == count
        assert tracemalloc.get_traced_memory()[1] < 6 * header
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("past", [0, 1])
def test_length_of_the_files(good, past):
    draft = samples.Draft(good)
    draft.chunk(0, bytes(2**18), raw=limits.MAX_FILES_LENGTH - 12 + past)
    draft.set(1, kind=1, shape=bytes(16), ndim=0, dtype=0, raw=12)
    assert opens(draft.bytes()) is not bool(past)


_READ_FILE = """
import hashlib, sys
import bstk
from resource import RUSAGE_SELF, getrusage
def peak():
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before, digest, length = peak(), hashlib.sha256(), 0
with bstk.open(sys.argv[1]) as file:
    for piece in file.file_pieces("config.json"):
        digest.update(piece)
        length += len(piece)
print(length, digest.hexdigest(), peak() - before)
"""


@pytest.mark.skipif(os.name != "posix", reason="measures with getrusage")
def test_the_largest_file_is_read_in_little_memory(good, tmp_path):
    """A thousand times as long as what is stored of it."""
    writer = zstandard.ZstdCompressor(write_checksum=True).compressobj(size=limits.MAX_FILES_LENGTH)
    digest, parts = hashlib.sha256(), []
    for piece in [samples.noise("file", 2**18), *[bytes(2**18)] * (limits.MAX_FILES_LENGTH // 2**18 - 1)]:
        digest.update(piece)
        parts.append(writer.compress(piece))
    parts.append(writer.flush())
    draft = samples.Draft(good)
    draft.chunk(0, b"".join(parts), raw=limits.MAX_FILES_LENGTH)
    data = draft.bytes()
    assert len(data) < 2**19
    (tmp_path / "x.bstk").write_bytes(data)
    read = subprocess.run(
        [sys.executable, "-c", _READ_FILE, tmp_path / "x.bstk"], capture_output=True, text=True, check=True
    )
    length, found, memory = read.stdout.split()
    assert (int(length), found) == (limits.MAX_FILES_LENGTH, digest.hexdigest())
    assert int(memory) < 64 * 2**20


@pytest.mark.parametrize(("exponent", "accepted"), [(23, True), (24, False)])
def test_window(exponent, accepted):
    raw_length = 2**25
    head = b"\x28\xb5\x2f\xfd\xc4" + bytes([(exponent - 10) << 3]) + struct.pack("<Q", raw_length)
    if accepted:
        frames.check(head, raw_length)
    else:
        with pytest.raises(bstk.DamagedError, match="window has 16777216 bytes"):
            frames.check(head, raw_length)


@pytest.mark.parametrize("level", [0, 20, -1])
def test_pack_level(level):
    with pytest.raises(bstk.UsageError, match="1 to 19"):
        bstk.pack(b"x", level)


def test_pack_empty():
    with pytest.raises(bstk.UsageError, match="1 to 2147483648 bytes, found 0"):
        bstk.pack(b"")


@pytest.mark.parametrize("length", [2**20, 2**20 + 20_000, 40_000_000])
def test_what_shrinks_too_well_is_stored_longer(length):
    # A matrix of zeros is a legal weight.
    raw = bytes(length)
    frame = bstk.pack(raw)
    assert length <= frames.max_raw(frame.stored_length)
    assert frames.unpack(frame.stored, length) == raw
