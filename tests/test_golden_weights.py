"""The matrices that the golden file's blocks stand for, pinned in numbers: a later decoder must find the same."""

import json
from pathlib import Path

import numpy as np
import pytest

import bstk
from bstack.codecs import codec_of_kind

VECTORS = Path(__file__).parents[1] / "format" / "vectors"
EXPECTED = json.loads((VECTORS / "expected-weights.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_blocks_add_up_to_the_pinned_matrix(name):
    with bstk.open(VECTORS / "weights.bstk") as file:
        blocks = file.stack(name)
        for depth, rows in enumerate(EXPECTED[name], 1):
            part = blocks[:depth]
            rebuilt = codec_of_kind(part[0].kind).rebuild(
                [file.read(b) for b in part], [b.kind for b in part], [b.rank for b in part], part[0].shape
            )
            expected = np.array(rows)
            assert np.abs(rebuilt.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
