"""The golden files: written once, each with the verdict that every reader must come to."""

import importlib.util
import json
from pathlib import Path

import pytest

VECTORS = Path(__file__).parents[2] / "format" / "vectors"
VERDICTS = json.loads((VECTORS / "verdicts.json").read_text())

_spec = importlib.util.spec_from_file_location("make_vectors", VECTORS / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.mark.parametrize("name", sorted(VERDICTS))
def test_verdict(name):
    assert make.verdict(VECTORS / name) == VERDICTS[name]


def test_every_file_has_a_verdict():
    assert {path.name for path in VECTORS.glob("*.bstk")} == VERDICTS.keys() == make.FILES.keys()
