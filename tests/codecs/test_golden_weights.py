"""The matrices that the golden file's blocks stand for, pinned in numbers: a later decoder must find the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import samples

import bstk
from bstack.codecs import codec_of_kind

VECTORS = Path(__file__).parents[2] / "format" / "vectors"
EXPECTED = {
    file: json.loads((VECTORS / f"expected-{file}.json").read_text()) for file in ("weights", "spqr", "trellis5")
}


@pytest.mark.parametrize(
    ("golden", "name"), [(golden, name) for golden, found in EXPECTED.items() for name in sorted(found)]
)
def test_blocks_add_up_to_the_pinned_matrix(golden, name):
    with bstk.open(VECTORS / f"{golden}.bstk") as file:
        blocks = samples.chunks_of(file, name)
        for depth, rows in enumerate(EXPECTED[golden][name], 1):
            part = blocks[:depth]
            rebuilt = codec_of_kind(part[0].kind).rebuild(
                [file.read(b) for b in part], [b.kind for b in part], [b.rank for b in part], part[0].shape
            )
            expected = np.array(rows)
            assert np.abs(rebuilt.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
