"""Writing: round trips, equal bytes for equal input, refusals, and faults of the disk at every step."""

import errno
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st

import bstk
from bstk import atomic

OLD = b"what was there before"


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


def test_equal_input_gives_equal_bytes(tmp_path):
    first = samples.write(tmp_path / "a.bstk")
    bstk.write(tmp_path / "b.bstk", dict(reversed(samples.METADATA.items())), iter(samples.entries()), samples.BASE)
    assert (tmp_path / "b.bstk").read_bytes() == first


_dtypes = st.sampled_from(["f32", "f16", "bf16", "f64", "i8", "u8", "i16", "i32", "i64", "bool"])
_SIZES = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "i64": 8, "bool": 1}
_names = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Zl", "Zp")), min_size=1, max_size=20)
_finite = st.floats(allow_nan=False, allow_infinity=False)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | _finite | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=10,
)


@st.composite
def _files(draw):
    names = draw(st.lists(_names, min_size=1, max_size=6, unique=True))
    base, stacks = [], []
    for name in names:
        what = draw(st.sampled_from(["tensor", "sign"]))
        if what == "tensor":
            dtype = draw(_dtypes)
            shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
            size = _SIZES[dtype]
            for length in shape:
                size *= length
            base.append(
                samples.entry(
                    name, bstk.TENSOR, draw(st.binary(min_size=size, max_size=size)), shape=shape, dtype=dtype
                )
            )
        else:
            shape = (draw(st.integers(1, 9)), draw(st.integers(1, 17)))
            ranks = draw(st.lists(st.integers(1, min(shape)), min_size=1, max_size=4))
            transposed = draw(st.booleans())
            blocks = [
                samples.sign(
                    name,
                    level,
                    shape,
                    rank,
                    transposed=transposed,
                    importance=draw(_finite),
                    error=draw(st.floats(0, 1e300)),
                )
                for level, rank in enumerate(ranks)
            ]
            base.append(blocks[0])
            stacks.append(blocks[1:])
    rest = []
    while any(stacks):
        stack = draw(st.sampled_from([stack for stack in stacks if stack]))
        rest.append(stack.pop(0))
    return draw(st.dictionaries(st.text(st.characters(codec="utf-8")), _json, max_size=3)), base, rest


@settings(max_examples=60, deadline=None)
@given(_files())
def test_round_trip(tmp_path_factory, made):
    metadata, base, rest = made
    path = tmp_path_factory.mktemp("round") / "x.bstk"
    bstk.write(path, metadata, base + rest, len(base))
    with bstk.open(path, strict=True) as f:
        assert f.metadata == metadata
        expected = [
            (e.name, e.kind.code, e.level, e.shape, e.dtype, e.rank, e.transposed, e.importance, e.error, _raw(e))
            for e in base + rest
        ]
        assert samples.content(f) == expected
    assert samples.Draft(path.read_bytes()).bytes() == path.read_bytes()


def _raw(entry):
    import zstandard

    return zstandard.ZstdDecompressor().decompress(entry.stored)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"level": 3}, "level 3 follows level 1; allowed: 2"),
        ({"level": -1}, "level is -1; allowed: a whole number"),
        ({"rank": 0}, "layers.0.up' level 2: the rank of a 4 x 10 sign block is 1 to 4, found 0"),
        ({"rank": 2}, "raw length is 36; allowed: 64"),
        ({"shape": (3, 12)}, "but the block below it has"),
        ({"shape": (1, 2, 3, 4, 5)}, "5 dimensions"),
        ({"shape": (4.0, 10)}, "a whole number"),
        ({"dtype": "f8"}, "dtype 'f8'; allowed: none, f32"),
        ({"dtype": "bf16"}, "factors of a sign block are f16"),
        ({"importance": float("nan")}, "importance is nan"),
        ({"error": -0.5}, "error is -0.5"),
        ({"name": "new"}, "first appears after the base model"),
        ({"name": "config.json"}, "only blocks stack"),
        ({"name": "a\nb"}, "control character U\\+000A"),
        ({"name": ""}, "length 0"),
        ({"name": "x" * 1025}, "longer than 1024"),
        ({"name": "\ud800"}, "not Unicode"),
        ({"digest": b""}, "32 of SHA-256"),
        ({"stored": b"12345678"}, "8 stored bytes came"),
        ({"digest": bytes(32)}, "do not match its digest"),
        ({"raw_length": 2**40}, "raw_length is 1099511627776"),
        ({"kind": bstk.FILE}, "a file has no shape"),
    ],
)
def test_refuses_what_a_reader_would_refuse(tmp_path, change, words):
    import dataclasses

    path = tmp_path / "x.bstk"
    path.write_bytes(OLD)
    chunks = samples.entries()
    chunks[-1] = dataclasses.replace(chunks[-1], **change)
    with pytest.raises(bstk.UsageError, match=words):
        bstk.write(path, {}, chunks, samples.BASE)
    assert path.read_bytes() == OLD and not leftovers(tmp_path)


def test_refuses_a_frame_that_is_none(tmp_path):
    import hashlib

    stored = b"not a zstd frame"
    entry = bstk.Entry(
        name="x",
        kind=bstk.FILE,
        raw_length=3,
        stored_length=len(stored),
        digest=hashlib.sha256(stored).digest(),
        stored=stored,
    )
    with pytest.raises(bstk.UsageError, match="does not start with a zstd frame"):
        bstk.write(tmp_path / "x.bstk", {}, [entry], 1)


@pytest.mark.parametrize(
    "metadata", [[], None, {"a": float("nan")}, {"a": b""}, {1: 2, "1": 3}, {"a": "\ud800"}, {"a": {1, 2}}]
)
def test_refuses_metadata_that_is_no_json(tmp_path, metadata):
    with pytest.raises(bstk.UsageError, match="metadata"):
        bstk.write(tmp_path / "x.bstk", metadata, samples.entries(), samples.BASE)


@pytest.mark.parametrize("count", [0, 9, -1])
def test_refuses_a_wrong_base_count(tmp_path, count):
    with pytest.raises(bstk.UsageError, match="base_count"):
        bstk.write(tmp_path / "x.bstk", {}, samples.entries(), count)


class FaultyOs:
    """The module `os`, but the n-th call of those that change the disk fails, or every write is short."""

    def __init__(self, fail_at=0, code=errno.ENOSPC, short=False):
        self.calls, self.fail_at, self.code, self.short = 0, fail_at, code, short

    def __getattr__(self, name):
        return getattr(os, name)

    def _count(self):
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(self.code, os.strerror(self.code))

    def write(self, descriptor, data):
        self._count()
        return os.write(descriptor, data[: max(1, len(data) // 3)] if self.short else data)

    def open(self, *args):
        self._count()
        return os.open(*args)

    def fsync(self, descriptor):
        self._count()
        os.fsync(descriptor)

    def close(self, descriptor):
        os.close(descriptor)
        self._count()

    def replace(self, *args):
        self._count()
        os.replace(*args)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("job", ["write", "truncate"])
def test_every_step_of_writing_may_fail(tmp_path, monkeypatch, good, job, code):
    source = tmp_path / "source.bstk"
    source.write_bytes(good)
    path = tmp_path / "x.bstk"
    expected = bstk.ResourceError if code != errno.EIO else bstk.OutputError
    failures = 0
    for fail_at in range(1, 100):
        path.write_bytes(OLD)
        faulty = FaultyOs(fail_at, code)
        for module in (atomic,):
            monkeypatch.setattr(module, "os", faulty)
        try:
            if job == "write":
                samples.write(path)
            else:
                bstk.truncate(source, path, mb=(len(good) - 1) / bstk.MB)
        except bstk.BstkError as error:
            assert type(error) is expected and str(path) in str(error)
            assert path.read_bytes() == OLD
            failures += 1
        else:
            # Only what follows the rename, which is there to survive a power cut, may fail without a word.
            assert bstk.open(path).state == ("whole" if job == "write" else "sealed")
            if faulty.calls < fail_at:
                break
        assert not leftovers(tmp_path)
    assert failures >= 5


def test_short_writes_are_continued(tmp_path, monkeypatch, good):
    monkeypatch.setattr(atomic, "os", FaultyOs(short=True))
    assert samples.write(tmp_path / "x.bstk") == good


def test_interruption_leaves_the_old_file(tmp_path):
    import dataclasses

    def interrupted():
        raise KeyboardInterrupt

    path = tmp_path / "x.bstk"
    path.write_bytes(OLD)
    chunks = samples.entries()
    chunks[4] = dataclasses.replace(chunks[4], stored=interrupted)
    with pytest.raises(KeyboardInterrupt):
        bstk.write(path, {}, chunks, samples.BASE)
    assert path.read_bytes() == OLD and not leftovers(tmp_path)


_KILLED = """
import dataclasses, sys, time
sys.path.insert(0, {tests!r})
import bstk, samples
chunks = samples.entries()
stop = int(sys.argv[2])
def wait():
    print("here", flush=True)
    time.sleep(60)
if stop < len(chunks):
    chunks[stop] = dataclasses.replace(chunks[stop], stored=wait)
bstk.write(sys.argv[1], samples.METADATA, chunks, samples.BASE)
wait()
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("stop", [0, 4, 7, 8])
def test_killed_while_writing(tmp_path, good, stop):
    path = tmp_path / "x.bstk"
    path.write_bytes(OLD)
    code = _KILLED.format(tests=str(Path(samples.__file__).parent))
    with subprocess.Popen([sys.executable, "-c", code, str(path), str(stop)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == (OLD if stop < 8 else good)


def test_writes_through_a_link_and_not_over_a_device(tmp_path, good):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link.bstk"
    link.symlink_to(tmp_path / "folder" / "real.bstk")
    samples.write(link)
    assert link.is_symlink() and (tmp_path / "folder" / "real.bstk").read_bytes() == good
    for path in (tmp_path / "folder", "/dev/null"):
        with pytest.raises(bstk.OutputError, match="not a regular file"):
            bstk.write(path, {}, samples.entries(), samples.BASE)
    with pytest.raises(bstk.OutputError, match=r"cannot write: the folder .* does not exist. Create it"):
        bstk.write(tmp_path / "none" / "x.bstk", {}, samples.entries(), samples.BASE)


def test_lazy_entries_need_little_memory(tmp_path):
    raw = os.urandom(2**20)
    frame = bstk.pack(raw)
    (tmp_path / "part").write_bytes(frame.stored)
    chunks = [
        bstk.Entry(
            name=f"{i}",
            kind=bstk.TENSOR,
            shape=(2**20,),
            dtype="u8",
            raw_length=2**20,
            stored_length=frame.stored_length,
            digest=frame.digest,
            stored=(tmp_path / "part").read_bytes,
        )
        for i in range(24)
    ]
    tracemalloc.start()
    bstk.write(tmp_path / "x.bstk", {}, chunks, len(chunks))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**20 < (tmp_path / "x.bstk").stat().st_size
