"""The settings of a compression: what each may be."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import bstack
import bstk
from bstack.codecs import make_codec
from bstack.settings import PRESETS, Settings

# By field: values that are right, and values of a wrong type.
WHOLE = [True, np.True_, "4", 4.0, np.float64(4), np.array([4]), [4], float("nan")]
NUMBER = [True, np.True_, "4.75", 10**309, np.ones(2), 1j, (0.01,)]
TEXT = [True, None, 3, b"self", ["self"]]
VALUES = {
    "codec": (["sign", "spqr"], TEXT),
    "rank": ([4, "auto", None], [*WHOLE, "Auto", ""]),
    "planes": ([4, None], [*WHOLE, "auto"]),
    "bits": ([3, None], [*WHOLE, "auto"]),
    "group": ([32, None], [*WHOLE, "auto"]),
    "outliers": ([0.01, 0, "auto", None], [*NUMBER, "some"]),
    "bpw": ([4.75, 5, None], [*NUMBER, "auto"]),
    "order": (["gain", "paper"], TEXT),
    "embeddings": (["stack", "dense"], TEXT),
    "calibration": (["self", "corpus.txt"], TEXT),
    "samples": ([1, 64], [*WHOLE, None]),
    "sequence_length": ([8, 256], [*WHOLE, None]),
    "seed": ([0, 2**63 - 1], [*WHOLE, None]),
    "tokenizer": ([True, False], [None, 0, "no"]),
    "exact": ([True, False], [None, 1, "yes"]),
    "device": (["cpu", "cuda", "cuda:1"], [*TEXT, "gpu", "CUDA", "cuda:", "cuda:-1", "mps"]),
}


def test_every_field_is_tested():
    assert list(VALUES) == [field.name for field in fields(Settings)]


OWNERS = {"rank": "sign", "bits": "spqr", "group": "spqr", "outliers": "spqr", "bpw": "spqr"}
OWN = {
    "codec",
    "order",
    "embeddings",
    "calibration",
    "samples",
    "sequence_length",
    "seed",
    "tokenizer",
    "exact",
    "device",
}


def made(name, value):
    """The field's value as the settings have it, or for a codec's setting as the codec has it."""
    settings = (
        Settings(**{name: value}) if name in OWN else Settings(codec=OWNERS.get(name, "trellis"), **{name: value})
    )
    return settings.to_json() if name in OWN else make_codec(settings).settings()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (right, _) in VALUES.items() for value in right])
def test_what_is_right_is_taken(name, value):
    assert getattr(Settings(**{name: value}), name) == value
    found = made(name, value)[name]
    assert found == value or value is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("planes", np.int64(4)),
        ("rank", np.int16(4)),
        ("seed", np.uint8(3)),
        ("bpw", np.float32(4.75)),
        ("outliers", np.int32(0)),
    ],
)
def test_numbers_of_numpy_become_plain_ones(name, value):
    assert json.loads(json.dumps(made(name, value)))[name] == value
    assert made(name, value) == made(name, value.item())


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, wrong) in VALUES.items() for value in wrong])
@pytest.mark.parametrize("how", ["made", "changed"])
def test_another_type_is_refused_by_name(name, value, how):
    if how == "changed" and value is None:
        return  # stays as it was
    with pytest.raises(bstk.UsageError) as refused:
        if how == "made" or name not in OWN:
            made(name, value)
        else:
            PRESETS["default"].with_changes(**{name: value})
    words = str(refused.value)
    assert words.startswith(f"{name.replace('_', ' ')} is {value!r}; ")
    allowed = re.split("allowed|takes", words)[1]
    assert ("auto" in allowed) == ("auto" in VALUES[name][0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"order": "best"}, "order is 'best'; allowed are gain, paper."),
        ({"embeddings": "no"}, "embeddings is 'no'; allowed are stack, dense."),
        ({"samples": 0}, "samples is 0; allowed are 1 to 1048576."),
        ({"sequence_length": 7}, "sequence length is 7; allowed are 8 to 1048576."),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_values_out_of_range(given, words):
    with pytest.raises(bstk.UsageError, match=re.escape(words)):
        bstack.Settings(**given)


def test_a_path_is_a_name_of_a_text():
    assert Settings(calibration=Path("some") / "corpus.txt").calibration == str(Path("some") / "corpus.txt")
