import json
import re

import pytest

import bstk


def test_page(bstack, vector):
    done = bstack("inspect", vector("whole.bstk"))
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "tiny",
        "TinyForCausalLM",
        "whole: nothing is cut off",
        "2 with 88 weights",
        "5 here; 2 in the base model, 5 in the",
        "sign (rank 1 to 2)",
        "1: config.json",
        "e5c7c759bf12d750",
        "bits/weight",
        "KLD",
        "0.2",
    ):
        assert words in done.stdout, words
    assert "\x1b" not in done.stdout


def test_the_field_called_rank_is_told_in_the_words_of_the_kind(bstack, vector):
    assert "sign (rank 1 to 2), trellis (2 bits per weight)" in bstack("inspect", vector("weights.bstk")).stdout


@pytest.mark.parametrize(("name", "marks"), [("smallest", "--"), ("whole", " -")])
def test_measured_sizes_that_the_file_does_not_hold_are_marked(bstack, vector, name, marks):
    # 1821 and 1966 bytes; measured were 1900 and 2100.
    head, rows = (
        bstack("inspect", vector(f"{name}.bstk")).stdout.split("Quality measured")[1].split("\n\n")[0].split("KLD\n")
    )
    assert "(-: larger than this file)" in head
    assert "".join(row[0] for row in rows.splitlines()) == marks


@pytest.mark.parametrize(("name", "state"), [("whole", "whole"), ("sealed", "sealed"), ("unsealed-cut", "partial")])
def test_json(bstack, vector, name, state):
    path = vector(f"{name}.bstk")
    done = bstack("inspect", "--json", "--blocks", path)
    assert done.returncode == 0
    assert ("Warning" in done.stderr) == (state == "partial")
    found = json.loads(done.stdout)
    assert found["schema"] == "bstack.inspect/2" and found["state"] == state
    assert found["file_bytes"] == path.stat().st_size
    assert found["metadata"]["model"]["name"] == "tiny"
    assert found["cuts"][0]["file_bytes"] == found["base"]["file_bytes"]
    assert found["cuts"][-1]["file_bytes"] == found["file_bytes"]
    assert len(found["stack"]) == found["blocks"]
    assert [block["in_base"] for block in found["stack"]][:2] == [True, True]
    assert "stack" not in json.loads(bstack("inspect", "--json", path).stdout)


def test_speeds_are_those_of_the_kernels_here(bstack, vector):
    speeds = [
        cut["tokens_per_second"] for cut in json.loads(bstack("inspect", "--json", vector("whole.bstk")).stdout)["cuts"]
    ]
    assert all(speed > 0 for speed in speeds) and speeds[0] > speeds[-1]
    page = bstack("inspect", vector("whole.bstk")).stdout
    assert re.search(r"tokens/s: what \w+ kernels allow here", page)
    assert re.search(r"^ +--mb .* tokens/s\n.* [0-9.,]+$", page, re.MULTILINE)


def test_nothing_is_said_of_speed_without_kernels_and_of_experts(vector, monkeypatch):
    from bstack.packed import speed

    with bstk.open(vector("whole.bstk")) as file:
        cuts = [file.base, file.complete]
        with monkeypatch.context() as patch:
            patch.setattr(speed, "library", lambda: None)
            assert speed.expected_speeds(file, cuts) == [None, None]
        patched = [chunk._replace(name="model.layers.0.mlp.experts.gate_up_proj[1]") for chunk in file.all_chunks]
        monkeypatch.setattr(file, "all_chunks", patched)
        assert speed.expected_speeds(file, cuts) == [None, None]


def test_blocks(bstack, vector):
    out = bstack("inspect", "--blocks", vector("whole.bstk")).stdout
    table = out.split("Blocks (* in the base model)\n")[1].splitlines()
    assert table[0].split()[:4] == ["offset", "linear", "level", "kind"]
    assert [re.findall(r"layers\.\S+ +\d", line)[0].split() for line in table[1:]] == [
        ["layers.0.up", "0"],
        ["layers.0.down", "0"],
        ["layers.0.up", "1"],
        ["layers.0.down", "1"],
        ["layers.0.up", "2"],
    ]
    assert [line[0] for line in table[1:]] == ["*", "*", " ", " ", " "]


def test_partial(bstack, vector):
    path = vector("partial-with-tail.bstk")
    done = bstack("inspect", path)
    assert done.returncode == 0 and "not sealed" in done.stderr and "partial" in done.stdout
    assert bstack("inspect", "-q", path).stderr == ""
    done = bstack("inspect", "--strict", path)
    assert (done.returncode, done.stdout) == (3, "") and "the file is partial" in done.stderr


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"model": "a name", "quality": 7},
        {"model": {"name": None, "layers": [1]}, "quality": [3, {}, {"file_bytes": 5, "kld": [1]}, {"file_bytes": 9}]},
        {
            "model": {"name": "\x1b[31mred\x1b[0m\u202e"},
            "note": "bell\x07",
            "calibration": {"tokens": 12, "texts": ["a"]},
        },
    ],
)
def test_any_metadata(bstack, tmp_path, metadata):
    frame = bstk.pack(b"{}")
    entry = bstk.Entry(
        name="config.json",
        kind=bstk.FILE,
        stored=frame.stored,
        raw_length=2,
        stored_length=frame.stored_length,
        digest=frame.digest,
    )
    bstk.write(tmp_path / "x.bstk", metadata, [entry], 1)
    done = bstack("inspect", "--blocks", tmp_path / "x.bstk")
    assert (done.returncode, done.stderr) == (0, "")
    assert not set(done.stdout) & {"\x1b", "\x07", "\u202e"}
    assert json.loads(bstack("inspect", "--json", tmp_path / "x.bstk").stdout)["metadata"] == metadata


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("bad-html", 4, "web page"),
        ("bad-git-lfs-pointer", 4, "git lfs pull"),
        ("bad-major-2", 4, "Upgrade"),
        ("bad-level-gap", 5, "level 3 follows level 1"),
        ("bad-below-smallest", 5, "ends after 1500 bytes"),
    ],
)
def test_bad_files(bstack, vector, name, code, words):
    done = bstack("inspect", vector(f"{name}.bstk"))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("Error: ") and words in done.stderr and done.stderr.count("\n") == 1


def test_reads_only_the_head(bstack, vector):
    path = vector("whole.bstk")
    with bstk.open(path) as f:
        chunk = f.chunks[-1]
    data = bytearray(path.read_bytes())
    data[chunk.offset : chunk.end] = bytes(chunk.stored_length)
    path.write_bytes(data)
    assert bstack("inspect", path).returncode == 0


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        ({"original_bytes": 98362432}, ["original  93.81 MB of weight files"]),  # as version 0.1 wrote it
        (
            {"original_bytes": 269060552, "original_dtype": "bfloat16", "original_dtype_bytes": 269030016},
            ["original  256.57 MB as bfloat16"],
        ),
        (
            {
                "original_bytes": 98362432,
                "original_dtype": "bfloat16",
                "original_dtype_bytes": 269030016,
                "source_quantisation": "GGUF Q4_1",
            },
            [
                "original  256.57 MB as bfloat16 (source: 93.81 MB, GGUF Q4_1)",
                "          above 93.81 MB the source file itself is the better choice: it is exact",
            ],
        ),
        ({"original_bytes": "many"}, []),
        ({"original_bytes": 2**20, "original_dtype_bytes": 2**21, "source_quantisation": "\x1b[31m"}, None),
    ],
)
def test_what_the_original_takes(bstack, tmp_path, model, lines):
    """It must not look as if compressing a quantised source made the model larger."""
    frame = bstk.pack(b"{}")
    entry = bstk.Entry(
        name="config.json",
        kind=bstk.FILE,
        raw_length=2,
        stored_length=frame.stored_length,
        digest=frame.digest,
        stored=frame.stored,
    )
    bstk.write(tmp_path / "x.bstk", {"model": {"name": "a", **model}}, [entry], 1)
    done = bstack("inspect", tmp_path / "x.bstk")
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    if lines is not None:
        page = done.stdout.split("Sizes\n")[0]
        assert [line[2:] for line in page.splitlines()[3:] if line.strip() and "name " not in line] == lines
