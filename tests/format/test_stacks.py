"""Of which kinds a stack may be: what both readers take, and what the codecs can rebuild."""

import pytest
import samples

import bstk
from bstack.codecs import codec_of_kind
from bstk import kinds

GOOD = [
    ("sign",),
    ("sign", "sign", "sign"),
    ("trellis",),
    ("trellis", "trellis", "trellis"),
    ("spqr",),
    ("spqr", "outliers"),
    ("spqr", "outliers", "trellis"),
    ("spqr", "trellis", "trellis"),
    ("trellis5",),
    ("trellis5", "trellis5", "trellis5"),
    ("spqr", "outliers", "trellis5"),
    ("spqr", "trellis5", "trellis5"),
]


@pytest.mark.parametrize("stack", GOOD)
def test_good_stacks_are_read_and_rebuilt(stack, good):
    draft = samples.Draft(good)
    samples.stack(draft, *stack)
    with bstk.open(draft.bytes()) as file:
        file.verify()
        blocks = samples.chunks_of(file, "layers.0.up")
        payloads = [file.read(block) for block in blocks]
    assert [block.kind.name for block in blocks] == list(stack)
    for depth in range(1, len(blocks) + 1):
        part = blocks[:depth]
        matrix = codec_of_kind(part[0].kind).rebuild(
            payloads[:depth], [block.kind for block in part], [block.rank for block in part], part[0].shape
        )
        assert matrix.shape == (4, 10)


@pytest.mark.parametrize("first", ["trellis", "trellis5", "spqr", "sign"])
def test_a_stack_of_any_depth_is_rebuilt(first, good):
    # Packed matrices take 16 blocks; the format has no such limit.
    draft = samples.Draft(good)
    samples.stack(draft, first, "trellis5" if first == "spqr" else first)
    with bstk.open(draft.bytes()) as file:
        below, above = map(file.read, samples.chunks_of(file, "layers.0.up"))
        kind, other = (block.kind for block in samples.chunks_of(file, "layers.0.up"))
        rank, shape = samples.chunks_of(file, "layers.0.up")[0].rank, samples.chunks_of(file, "layers.0.up")[0].shape
    kinds_, ranks = [kind, *[other] * 20], [rank, *[1 if first == "sign" else 2] * 20]
    assert codec_of_kind(kind).rebuild([below, *[above] * 20], kinds_, ranks, shape).shape == shape


def test_every_kind_that_a_stack_begins_with_has_a_codec():
    blocks = [kind for kind in kinds.BY_CODE.values() if kind.is_block]
    for kind in blocks:
        if kind.first:
            assert kind in codec_of_kind(kind).kinds
        else:
            with pytest.raises(KeyError):
                codec_of_kind(kind)
    assert {name for kind in blocks for name in kind.on} <= {kind.name for kind in blocks}
