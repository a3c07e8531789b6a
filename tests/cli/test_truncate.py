import json

import pytest

import bstk


@pytest.fixture
def whole(vector):
    return vector("whole.bstk")


@pytest.fixture
def sizes(whole):
    """The length of every cut in megabytes, with all its decimals."""
    with bstk.open(whole) as f:
        return [f"{chunk.end / bstk.MB:.20f}" for chunk in f.chunks[f.base_count - 1 :]]


def test_cut(bstack, whole, sizes, tmp_path):
    before = whole.read_bytes()
    done = bstack("truncate", whole, "--mb", sizes[1], "-o", "out.bstk")
    assert (done.returncode, done.stderr) == (0, "")
    assert "out.bstk: 1,870 bytes as a file and 148 bytes of weights in memory" in done.stdout
    assert "kept 3 of 5 blocks" in done.stdout and "bits per weight" in done.stdout
    assert bstack("inspect", "--strict", "out.bstk").returncode == 0
    assert whole.read_bytes() == before
    with bstk.open(tmp_path / "out.bstk") as f:
        assert f.state == "sealed" and len(f.chunks) == 6


def test_json(bstack, whole, sizes):
    found = json.loads(bstack("truncate", whole, "--mb", sizes[0], "-o", "out.bstk", "--json").stdout)
    assert found["schema"] == "bstack.truncate/1"
    assert (found["blocks"], found["blocks_total"], found["sealed"], found["dry_run"]) == (2, 5, True, False)
    assert found["file_bytes"] == round(float(sizes[0]) * bstk.MB) and found["output"] == "out.bstk"


def test_in_place(bstack, whole, sizes):
    assert bstack("truncate", whole, "--mb", sizes[1], "--in-place").returncode == 0
    assert bstack("truncate", whole, "--mb", sizes[0], "--in-place").returncode == 0
    with bstk.open(whole, strict=True) as f:
        assert f.state == "sealed" and len(f.chunks) == 5


def test_without_seal(bstack, whole, sizes, tmp_path):
    done = bstack("truncate", whole, "--mb", sizes[0], "-o", "out.bstk", "--no-seal")
    assert done.returncode == 0 and "not sealed" in done.stdout
    data = (tmp_path / "out.bstk").read_bytes()
    assert data == whole.read_bytes()[: len(data)]
    assert bstack("verify", "--strict", "out.bstk").returncode == 3


def test_dry_run_changes_nothing(bstack, whole, sizes, tmp_path):
    before = whole.read_bytes()
    for where in ([], ["-o", "out.bstk"], ["--in-place"]):
        done = bstack("truncate", whole, "--mb", sizes[2], "--dry-run", *where)
        assert (done.returncode, done.stderr) == (0, "")
        assert "would be" in done.stdout and "KLD" in done.stdout
        assert [line[0] for line in done.stdout.splitlines()[-2:]] == [">", " "]  # 1900 of the two measured sizes
    assert whole.read_bytes() == before and not (tmp_path / "out.bstk").exists()


def test_existing_output(bstack, whole, sizes, tmp_path):
    (tmp_path / "out.bstk").write_bytes(b"mine")
    done = bstack("truncate", whole, "--mb", sizes[0], "-o", "out.bstk")
    words = "the output exists. Name another output. Use --force to replace it."
    assert (done.returncode, done.stderr) == (2, f"Error: out.bstk: {words}\n")
    assert (tmp_path / "out.bstk").read_bytes() == b"mine"
    assert bstack("truncate", whole, "--mb", sizes[0], "-o", "out.bstk", "--force").returncode == 0
    assert bstack("verify", "out.bstk").returncode == 0


@pytest.mark.parametrize("mb", ["0", "-5", "nan", "inf", "abc", "", "3 MB"])
def test_no_budget(bstack, whole, mb):
    done = bstack("truncate", whole, "--mb", mb, "-o", "out.bstk")
    assert (done.returncode, done.stdout) == (2, "") and "positive number of MB" in done.stderr


def test_too_large_and_too_small(bstack, whole, sizes, tmp_path):
    for mb in (sizes[-1], 5000):
        done = bstack("truncate", whole, "--mb", mb, "-o", "out.bstk")
        assert done.returncode == 2 and "nothing to cut: all of it fits in 0.01 MB" in done.stderr
    done = bstack("truncate", whole, "--mb", "0.001", "-o", "out.bstk")
    assert done.returncode == 6 and "The smallest budget is 0.01 MB" in done.stderr
    assert not (tmp_path / "out.bstk").exists()


def test_where_to(bstack, whole, tmp_path):
    for args, words in (
        ([], "-o OUT, or --in-place"),
        (["-o", "out.bstk", "--in-place"], "exclude each other"),
        (["-o", whole, "--force"], "the output is the input"),
        (["-o", tmp_path, "--force"], "directory"),
    ):
        done = bstack("truncate", whole, "--mb", "0.0018", *args)
        assert done.returncode == 2 and words in done.stderr, args
    done = bstack("truncate", whole, "--mb", "0.0018", "-o", tmp_path / "none" / "out.bstk")
    assert done.returncode == 1 and "cannot write" in done.stderr


def test_partial_file_is_sealed_at_its_last_whole_chunk(bstack, vector):
    path = vector("partial-with-tail.bstk")
    done = bstack("truncate", path, "--mb", "1", "--in-place")
    assert (done.returncode, done.stderr) == (0, "")
    assert bstack("verify", "--strict", path).returncode == 0


def test_file_that_may_not_be_rewritten(bstack, vector):
    path = vector("read-only-compatible-flag.bstk")
    assert bstack("verify", path).returncode == 0
    done = bstack("truncate", path, "--mb", "0.0018", "--in-place")
    assert done.returncode == 4 and "not rewrite" in done.stderr


def test_the_exact_top_is_told(bstack, vector):
    path = vector("exact.bstk")
    with bstk.open(path) as file:
        cuts = [file.cut(count) for count in range(file.base_count, len(file.chunks))]
        first = file.model.chunks
    for cut in cuts:
        out = bstack("truncate", path, "--mb", f"{cut.budget / bstk.MB:.20f}", "--dry-run").stdout
        assert ("without the exact top" if cut.chunks <= first else "of no use without the rest") in out, out
    assert any(cut.chunks > first for cut in cuts)
