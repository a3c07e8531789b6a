"""Which part of a parameter each stack of a file fills: all of it together, and nothing twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch

import bstack
import bstack.codecs
import bstk
from bstack.engine.container import dense_weights
from bstack.engine.parts import check_depth, parts_of
from bstack.errors import UnsupportedModelError

SETTINGS = bstack.Settings(codec="sign", planes=1, rank=1, samples=2, sequence_length=16)


def write_stacks(path, shapes):
    """Write a file of one stack of one block for each name."""
    entries = []
    for name, shape in shapes.items():
        blocks = bstack.codecs.TrellisCodec(1).encode(torch.randn(shape), torch.eye(shape[1]), 9, torch.ones(shape[0]))
        frame = bstk.pack(next(iter(blocks)).payload)
        entries.append(
            bstk.Entry(
                name=name,
                kind=bstk.TRELLIS5,
                level=0,
                shape=shape,
                dtype="f16",
                rank=2,
                raw_length=frame.raw_length,
                stored_length=frame.stored_length,
                digest=frame.digest,
                stored=frame.stored,
            )
        )
    bstk.write(path, {}, entries, len(entries))
    return path


@pytest.mark.parametrize(
    "shapes",
    [
        {"w[07": (4, 8)},
        {"lm_head.weight[0:9]": (4, 8)},
        {"lm_head.weight[2]": (4, 8)},
        {"lm_head.weight": (1, 8)},
        {"lm_head.weight[0:4]": (4, 8)},
        {"lm_head.weight[0:4]": (4, 8), "lm_head.weight[0:4][0:1]": (4, 8)},
        {"lm_head.weight[0:5]": (5, 8), "lm_head.weight[4:7]": (3, 8)},
        {"lm_head.weight[1:5]": (4, 8), "lm_head.weight[4:8]": (4, 8)},
        {"lm_head.weight[0:4]": (4, 8), "lm_head.weight[4:99]": (4, 8)},
        {"lm_head.weight[0:4]": (4, 8), "lm_head.weight[00:4]": (4, 8)},
        {"lm_head.weight": (8, 8), "lm_head.weight[0:4]": (4, 8)},
        {"experts[0]": (4, 8), "experts[00]": (4, 8), "experts[2]": (4, 8)},
        {"experts[1]": (4, 8), "experts[2]": (4, 8)},
    ],
    ids=lambda shapes: " ".join(shapes),
)
def test_stacks_that_do_not_fit_the_model_are_damage(tmp_path, shapes):
    """Broadcast, left empty, written twice or named against the convention: never weights that nobody wrote."""
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(8, 8, bias=False)
    model.experts = torch.nn.Parameter(torch.zeros(3, 4, 8))
    with (
        bstk.open(write_stacks(tmp_path / "odd.bstk", shapes)) as file,
        pytest.raises(bstk.DamagedError, match=r"odd.bstk"),
    ):
        dict(dense_weights(file, file.chunks, model, torch.float32))


def test_parts_of_a_parameter_may_stand_in_any_order(tmp_path):
    shapes = {"lm_head.weight[5:8]": (3, 8), "experts[1]": (4, 8), "lm_head.weight[0:5]": (5, 8), "experts[0]": (4, 8)}
    with bstk.open(write_stacks(tmp_path / "good.bstk", shapes)) as file:
        found = parts_of(file.chunks, {"lm_head.weight": (8, 8), "experts": (2, 4, 8)})
    assert {name: [str(matrix) for matrix, _ in parts] for name, parts in found.items()} == {
        "lm_head.weight": ["lm_head.weight[0:5]", "lm_head.weight[5:8]"],
        "experts": ["experts[0]", "experts[1]"],
    }


@pytest.mark.parametrize("mode", ["dense", "stack"])
def test_rows_that_are_there_twice_are_damage(tmp_path, mode):
    """As many weights as the parameter has, but some rows of it twice and others never."""
    folder = tiny_models.add_tokenizer(tiny_models.save("llama", tmp_path / "model", vocab_size=2200))
    bstack.compress(folder, tmp_path / "model.bstk", settings=SETTINGS)
    wrong = {"lm_head.weight[2048:2200]": "lm_head.weight[2040:2192]"}
    with bstk.open(tmp_path / "model.bstk") as file:
        entries = [
            bstk.Entry(
                name=wrong.get(c.name, c.name),
                kind=c.kind,
                level=c.level,
                shape=c.shape,
                dtype=c.dtype,
                rank=c.rank,
                transposed=c.transposed,
                raw_length=c.raw_length,
                stored_length=(frame := bstk.pack(file.read(c))).stored_length,
                digest=frame.digest,
                stored=frame.stored,
            )
            for c in file.chunks
        ]
        assert any(chunk.name in wrong for chunk in file.chunks)
        bstk.write(tmp_path / "twice.bstk", file.metadata, entries, file.base_count)
    with pytest.raises(bstk.DamagedError, match="2040"):
        bstack.load(tmp_path / "twice.bstk", mode=mode)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([(bstk.TRELLIS5, 2)] * 16, None),
        ([(bstk.SIGN, 16)], None),
        ([(bstk.SPQR, 128 + 4), (bstk.OUTLIERS, 0), (bstk.TRELLIS5, 2)], None),
        ([(bstk.TRELLIS5, 2)] * 17, "17 blocks.*levels 0 to 15.*mode='dense'"),
        ([(bstk.SIGN, 17)], "rank 17.*1 to 16"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(blocks, words):
    stack = [
        SimpleNamespace(name="w", kind=kind, rank=rank, level=level, shape=(40, 40))
        for level, (kind, rank) in enumerate(blocks)
    ]
    if words is None:
        check_depth([(None, stack)], "file")
        return
    with pytest.raises(UnsupportedModelError, match=words):
        check_depth([(None, stack)], "file")
