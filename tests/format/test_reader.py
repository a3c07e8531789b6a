"""Reading good files: what a reader says, cuts of every length, sources that fail."""

import os
import struct
import subprocess
import sys
import warnings
from typing import ClassVar

import pytest
import samples
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bstk
from bstk import frames


def test_reads_what_was_written(good):
    with bstk.open(good, strict=True) as f:
        assert f.state == "whole"
        assert f.metadata == samples.METADATA
        assert f.base_count == samples.BASE
        assert (f.length, f.full_length, f.seal) == (len(good), len(good), 0)
        names = ["config.json", "norm.weight", "scale", "layers.0.up", "layers.0.down"]
        assert list(dict.fromkeys(chunk.name for chunk in f.chunks)) == names
        assert f.file("config.json") == b'{"model_type": "tiny"}'
        assert list(f.files) == ["config.json"]
        assert [c.level for c in samples.chunks_of(f, "layers.0.up")] == [0, 1, 2]
        above = [(c.name, c.level) for c in f.chunks[f.base_count :]]
        assert above == [("layers.0.up", 1), ("layers.0.down", 1), ("layers.0.up", 2)]
        assert [c.transposed for c in samples.chunks_of(f, "layers.0.down")] == [True, True]
        for chunk, entry in zip(f.chunks, samples.entries(), strict=True):
            assert (chunk.name, chunk.kind, chunk.level, chunk.shape) == (
                entry.name,
                entry.kind,
                entry.level,
                entry.shape,
            )
            assert (chunk.rank, chunk.importance, chunk.error) == (entry.rank, entry.importance, entry.error)
        # 12 + 2 of tensors; blocks 4 * 2 + 28 * k bytes (up), 6 + 28 * k (down).
        assert f.memory_bytes == 14 + 3 * 36 + (6 + 56) + (6 + 28)
        assert f.bits_per_weight() == 8 * (f.memory_bytes - 14) / (40 + 48)
        f.verify()


def test_draft_puts_together_the_same_bytes(good):
    # So that what a bad file differs in is only what its test changed.
    assert samples.Draft(good).bytes() == good


def test_path_bytes_and_source_are_read_alike(good, good_path):
    for what in (good, bytearray(good), memoryview(good), good_path, str(good_path), bstk.BytesSource(good)):
        with bstk.open(what) as f:
            assert samples.content(f) == samples.content(bstk.open(good))
    with pytest.raises(TypeError, match="path, a URL, bytes, or an object"):
        bstk.open(7)


@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
def test_every_length(good):
    whole = samples.content(bstk.open(good))
    with bstk.open(good) as f:
        smallest, ends, root = f.base_length, [c.end for c in f.chunks], f.root
    for length in range(len(good) + 1):
        prefix = good[:length]
        if length == 0:
            with pytest.raises(bstk.NotBstkError, match="empty"):
                bstk.open(prefix)
        elif length < smallest:
            with pytest.raises(bstk.TruncatedError) as caught:
                bstk.open(prefix)
            if length >= 256:
                assert f"{length} bytes" in str(caught.value) and f"{smallest} of" in str(caught.value)
        else:
            with bstk.open(prefix) as f:
                present = sum(end <= length for end in ends)
                assert samples.content(f) == whole[:present]
                assert f.state == ("whole" if length == len(good) else "partial")
                assert f.root == root
                f.verify()


def test_partial_warns_or_is_refused(good):
    prefix = good[:-1]
    with pytest.warns(bstk.PartialWarning, match="not sealed"):
        bstk.open(prefix)
    with pytest.raises(bstk.PartialError, match=f"{len(prefix)} of {len(good)} bytes"):
        bstk.open(prefix, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bstk.open(prefix, warn=False).state == "partial"
    with pytest.raises(bstk.PartialError):
        bstk.open(prefix, strict=True, warn=False)


def test_fit(good):
    with bstk.open(good) as f:
        assert f.fit() == f.fit(1) == f.complete == bstk.Cut(8, len(good), f.memory_bytes)
        for count in range(f.base_count, len(f.chunks) + 1):
            end = f.chunks[count - 1].end
            assert f.fit(end / bstk.MB).chunks == f.fit(f"{end / bstk.MB:.40f}").chunks == count
            assert f.fit_bytes(end).file_bytes == end
        assert f.fit_bytes(f.base_length) == f.base
        with pytest.raises(bstk.BudgetError, match=r"smallest budget is 0.01 MB") as caught:
            f.fit((f.base_length - 1) / bstk.MB)
        assert caught.value.smallest_bytes == f.base_length
        assert f.fit("0.01") == f.complete


def test_cuts_count_what_is_in_them(good):
    with bstk.open(good) as f:
        for count in range(len(f.all_chunks) + 1):
            chunks = f.all_chunks[:count]
            cut = f.cut(count)
            end = chunks[-1].end if chunks else f.all_chunks[0].offset
            assert cut == (count, end, sum(c.raw_length for c in chunks if c.is_weight))
            blocks = [c for c in chunks if c.is_block]
            weights = sum(c.shape[0] * c.shape[1] for c in blocks if c.level == 0)
            assert f.bits_per_weight(cut) == (8 * sum(c.raw_length for c in blocks) / weights if weights else None)
        assert f.cut(f.base_count) == f.base and f.cut(len(f.chunks)) == f.fit()
        for count in (-1, len(f.all_chunks) + 1):
            with pytest.raises(bstk.UsageError):
                f.cut(count)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_even_cuts(good, count):
    with bstk.open(good) as f:
        cuts = f.even_cuts(count)
        assert next(iter(cuts)) == f.base and list(cuts)[-1] == f.complete and list(cuts) == sorted(cuts)
        assert 2 <= len(cuts) <= count
        step = (f.complete.budget - f.base.budget) / (count - 1)
        for cut, budget in cuts.items():
            assert f.fit_bytes(budget) == cut
            assert (budget - f.base.budget) / step == pytest.approx(
                round((budget - f.base.budget) / step), abs=1 / step
            )


def test_fit_bounds_memory_too(tmp_path):
    zeros = bytes(2 * 4000 * 2)
    chunks = [samples.sign("a", 0), samples.entry("b", bstk.TENSOR, zeros, shape=(8000,), dtype="f16")]
    chunks.append(samples.sign("a", 1))
    bstk.write(tmp_path / "x.bstk", {}, chunks, 2)
    with bstk.open(tmp_path / "x.bstk") as f:
        assert f.memory_bytes == 16000 + 36 + 36 > f.length
        assert f.fit_bytes(16000 + 36 + 35).chunks == 2
        assert f.fit_bytes(16000 + 36 + 36).chunks == 3


@pytest.mark.parametrize(
    "mb", [0, -5, "0", "nan", "inf", "-inf", "abc", "", float("nan"), float("inf"), True, None, b"3", [3]]
)
def test_no_budget(mb):
    with pytest.raises(bstk.UsageError, match="positive number of MB"):
        bstk.budget_bytes(mb)


@pytest.mark.parametrize(
    ("mb", "size"),
    [(1, 2**20), ("1.5", 3 * 2**19), (0.1, 104857), ("62.3", 65326284), ("1e-400000000", 0), ("1e999999999", 2**48)],
)
def test_budget_is_exact(mb, size):
    assert bstk.budget_bytes(mb) == size


@pytest.mark.parametrize("size", [1, 2**20, 2**20 + 1, 10**9, 123456789])
def test_named_megabytes_are_enough(size):
    assert 0 <= bstk.budget_bytes(bstk.mb_ceil(size)) - size <= bstk.MB / 100 + 1


@given(size=st.integers(0, 2**48))
@example(size=10**7)
def test_a_budget_as_text_is_read_back(size):
    text = bstk.mb_text(size)
    assert bstk.budget_bytes(text) == size if size else text == "0"
    assert len(text.partition(".")[2]) <= 7


@pytest.mark.parametrize("typed", ["0.03", "62.3", "80.1", "3000", "0.000954", "99.99", "1234.567"])
def test_a_budget_as_text_is_what_was_typed(typed):
    assert bstk.mb_text(bstk.budget_bytes(typed)) == typed


@pytest.mark.parametrize("mb", ["0.0003", 0.0003])
def test_messages_name_the_budget_that_was_given(good, good_path, tmp_path, mb):
    with bstk.open(good) as f:
        for refused in (
            lambda: f.fit(mb),
            lambda: f.fit(budget=bstk.budget_bytes(mb)),
            lambda: bstk.plan(f, budget=bstk.budget_bytes(mb)),
            lambda: bstk.truncate(f, tmp_path / "out", mb),
            lambda: bstk.truncate(good_path, None, mb),
            lambda: bstk.truncate(good_path, None, budget=bstk.budget_bytes(mb)),
        ):
            with pytest.raises(bstk.BudgetError, match=r": 0\.0003 MB is below"):
                refused()
        with pytest.raises(bstk.UsageError, match=r"the budget is 62\.3 MB\."):
            bstk.truncate(good_path, None, "62.3")


@pytest.mark.parametrize("budgets", [{}, {"mb": 1, "budget": 2**20}])
def test_a_budget_is_given_once(good, good_path, budgets):
    with bstk.open(good) as f:
        calls = [
            lambda: bstk.truncate(good_path, None, **budgets),
            lambda: bstk.grow(good_path, budgets.get("mb"), good_path, budget=budgets.get("budget")),
        ]
        for refused in calls + ([lambda: f.fit(**budgets)] if budgets else []):
            with pytest.raises(bstk.UsageError, match="Give one of them"):
                refused()
    assert good_path.read_bytes() == good


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_closed_reader_is_not_a_damaged_file(good, good_path, on_disk):
    with bstk.open(good_path if on_disk else good) as f:
        pass
    for read in (lambda: f.read(f.chunks[0]), lambda: list(f.file_pieces("config.json")), f.verify):
        with pytest.raises(ValueError, match=r"closed|released"):
            read()


class Failing(bstk.BytesSource):
    """Does something wrong at its n-th read."""

    def __init__(self, data, fail_at, short):
        super().__init__(data)
        self.calls, self.fail_at, self.short = 0, fail_at, short

    def read(self, offset, length):
        self.calls += 1
        if self.calls != self.fail_at:
            return super().read(offset, length)
        if self.short:
            return super().read(offset, length)[:-1]
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("short", [False, True])
def test_every_read_may_fail(good, short):
    whole = samples.content(bstk.open(good))
    for fail_at in range(1, 100):
        source = Failing(good, fail_at, short)
        try:
            with bstk.open(source) as f:
                got = samples.content(f)
        except (OSError, bstk.DamagedError) as error:
            assert isinstance(error, bstk.DamagedError if short else OSError)
        else:
            assert got == whole and source.calls < fail_at
            break
    assert fail_at > 5


def test_reads_few_and_small_pieces(good):
    class Recording(bstk.BytesSource):
        asked: ClassVar[list[tuple[int, int]]] = []

        def read(self, offset, length):
            self.asked.append((offset, length))
            return super().read(offset, length)

    with bstk.open(Recording(good)) as f:
        # Over HTTP each read is a request.
        assert Recording.asked == [(0, 256), (256, f.preamble.header_length - 256)]


def test_missing_files(good):
    with bstk.open(good) as f, pytest.raises(KeyError):
        f.file("tokenizer.json")


@pytest.mark.filterwarnings("ignore::bstk.PartialWarning")
def test_chunk_that_is_cut_off(good):
    with bstk.open(good[:-1]) as f, pytest.raises(bstk.UsageError, match="Read it from a larger cut"):
        f.read(f.all_chunks[-1])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)
    with pytest.raises(bstk.UsageError, match="not a regular file"):
        bstk.open(tmp_path / "pipe")
    os.close(descriptor)


def test_missing_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        bstk.open(tmp_path / "none.bstk")


def test_import_is_lean():
    heavy = ("torch", "transformers", "numpy", "click", "tqdm")
    code = f"import bstk, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(bstk.UsageError, match="not a regular file"):
        bstk.open(tmp_path / "pipe")


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.one_of(st.binary(min_size=1, max_size=300), st.integers(1, 300_000).map(bytes)), min_size=1, max_size=4
    ),
    level=st.integers(1, 19),
    damage=st.none() | st.tuples(st.integers(0, 2**32), st.integers(1, 255)),
    more=st.binary(max_size=600),
)
def test_a_frame_in_pieces_is_the_frame_at_once(parts, level, damage, more):
    raw = b"".join(parts)
    stored = bytearray(bstk.pack(raw, level).stored + more)
    if damage is not None:
        stored[damage[0] % len(stored)] ^= damage[1]
    stored = bytes(stored)

    def result(unpack):
        try:
            return unpack(stored, len(raw))
        except bstk.DamagedError:
            return None

    assert result(frames.unpack) == result(lambda *what: b"".join(frames.unpack_pieces(*what)))


def test_a_frame_in_pieces_yields_no_more_than_it_declares():
    """zstd alone finds out at the end of the frame if the declared size is larger than the window, 8 MiB here."""
    raw_length, block = 16 * 2**20, 128 * 2**10
    head = b"\x28\xb5\x2f\xfd" + bytes([2 << 6 | 1 << 2, (23 - 10) << 3]) + struct.pack("<I", raw_length)
    blocks = [struct.pack("<I", 1 << 1 | block << 3)[:3] + b"\0"] * 1000  # each is one byte, repeated
    yielded = 0
    with pytest.raises(bstk.DamagedError, match="more than"):
        for piece in frames.unpack_pieces(head + b"".join(blocks), raw_length):
            yielded += len(piece)
    assert raw_length // 2 <= yielded <= raw_length
