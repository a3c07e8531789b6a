"""zstd frames against another library, zstandard: heads as it reads them, contents as it writes them."""

import random
from contextlib import suppress

import pytest
import zstandard

import bstk
from bstk import frames


def some_bytes(rng, length):
    return rng.choice([rng.randbytes(length), bytes(length), (rng.randbytes(50) * length)[:length]])


def test_heads_and_contents_are_those_of_another_library():
    rng = random.Random(0)
    for _ in range(150):
        raw = some_bytes(rng, rng.choice([1, 2, 255, 256, 300, 65_791, 65_792, 200_000]))
        parameters = zstandard.ZstdCompressionParameters.from_level(
            rng.randint(1, 5),
            window_log=rng.randint(10, 24),
            write_content_size=rng.random() < 0.8,
            write_checksum=rng.random() < 0.8,
        )
        stored = zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
        head = zstandard.get_frame_parameters(stored)
        window, content, dictionary, checksum = frames._head(stored)
        unknown = head.content_size == zstandard.CONTENTSIZE_UNKNOWN
        assert content == (None if unknown else head.content_size)
        assert (window, dictionary, checksum) == (head.window_size, head.dict_id, head.has_checksum)
        if checksum and not unknown and window <= bstk.limits.MAX_WINDOW_LENGTH:
            assert frames.unpack(stored, len(raw)) == b"".join(frames.unpack_pieces(stored, len(raw))) == raw
        else:
            with pytest.raises(bstk.DamagedError):
                frames.unpack(stored, len(raw))


def test_another_library_reads_what_is_packed():
    rng = random.Random(1)
    for _ in range(40):
        parts = [some_bytes(rng, rng.choice([0, 1, 3000, 140_000])) for _ in range(rng.randint(1, 3))]
        raw = b"".join(parts)
        for frame in [bstk.pack(raw, rng.randint(1, 5)), bstk.pack_parts(parts)] if raw else []:
            assert zstandard.ZstdDecompressor().decompress(frame.stored) == raw == frames.unpack(frame.stored, len(raw))


def test_damage_is_found():
    rng = random.Random(2)
    raw = some_bytes(rng, 70_000)
    stored = bstk.pack(raw).stored
    for _ in range(200):
        place = rng.randrange(len(stored))
        for damaged in (stored[:place], stored + bytes(rng.randint(1, 9)), stored + stored):
            with pytest.raises(bstk.DamagedError):
                frames.unpack(damaged, len(raw))
        changed = stored[:place] + bytes([stored[place] ^ 1 << rng.randrange(8)]) + stored[place + 1 :]
        with suppress(bstk.DamagedError):  # some bits mean nothing
            assert frames.unpack(changed, len(raw)) == raw
