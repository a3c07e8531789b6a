"""Whole SpQR files of a tiny model, made by the command, shown, cut, interrupted, read back."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager

import in_process
import pytest
import samples
import tiny_models
import torch

import bstack
import bstk
from bstack.cli.compress import command as compress_command
from bstack.compression.layers import layer_shapes
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton
from bstack.settings import Settings

pytestmark = pytest.mark.slow

SETTINGS = Settings(codec="spqr", bits=3, bpw=5.5, planes=1, samples=3, sequence_length=16)


def command(*arguments):
    return in_process.bstack(*arguments, cwd=".")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save("llama-tied", tmp_path_factory.mktemp("spqr") / "model")


@pytest.fixture(scope="module")
def made(model):
    path = model.parent / "out.bstk"
    done = command(
        "compress",
        model,
        "-o",
        path,
        "--codec",
        "spqr",
        "--bits",
        3,
        "--bpw",
        5.5,
        "--planes",
        1,
        "--samples",
        3,
        "--sequence-length",
        16,
    )
    assert done.returncode == 0, done.stderr
    return path


def test_stacks_are_dense_part_outliers_planes(made):
    with bstk.open(made) as file:
        linears = [
            name
            for name in dict.fromkeys(chunk.name for chunk in file.chunks)
            if name.startswith("model.layers.") and samples.chunks_of(file, name)[0].is_block
        ]
        assert len(linears) == 14
        for name in linears:
            kinds = [chunk.kind for chunk in samples.chunks_of(file, name)]
            assert kinds in ([bstk.SPQR, bstk.OUTLIERS, bstk.TRELLIS5], [bstk.SPQR, bstk.TRELLIS5])
            errors = [chunk.error for chunk in samples.chunks_of(file, name)]
            assert errors == sorted(errors, reverse=True)
        for layer in range(2):  # a layer has outliers; not each of its matrices need have some
            assert any(chunk.kind is bstk.OUTLIERS and f"layers.{layer}." in chunk.name for chunk in file.chunks)
        # Embedding and head, tied here, are stacks of the default codec.
        assert [chunk.kind for chunk in samples.chunks_of(file, "model.embed_tokens.weight")] == [bstk.TRELLIS5] * 4
        assert file.preamble.incompatible == 7
        # In the base model there are dense parts and no outliers.
        base = file.chunks[: file.base_count]
        assert {chunk.kind for chunk in base if chunk.is_block} == {bstk.SPQR, bstk.TRELLIS5}
        file.verify()


def test_inspect_counts_every_part(made):
    done = command("inspect", made, "--json")
    found = json.loads(done.stdout)["spqr"]
    with bstk.open(made) as file:
        names = {chunk.name for chunk in file.chunks if chunk.kind is bstk.SPQR}
        total = sum(chunk.raw_length for chunk in file.chunks if chunk.name in names)
        weights = sum(chunk.shape[0] * chunk.shape[1] for chunk in file.chunks if chunk.kind is bstk.SPQR)
        outliers = 0
        for chunk in file.chunks:
            if chunk.kind is bstk.OUTLIERS:
                outliers += int.from_bytes(file.read(chunk)[4 * chunk.shape[0] :][:4], "little")
    assert sum(found["bytes"].values()) == total and found["linears"] == 14 and found["weights"] == weights
    assert found["outliers"] == outliers and found["outlier_fraction"] == outliers / weights
    assert found["bits_per_weight"] == pytest.approx(8 * total / weights)
    # Every layer has the same matrices, so the bits of the whole come as near as those of a layer.
    assert 5.4 < found["level_bits_per_weight"] <= 5.5
    page = command("inspect", made).stdout
    for word in (
        "SpQR linears here",
        "permutation",
        "outliers",
        "spqr (3 bits in groups of 16)",
        f"{outliers:,} outliers",
    ):
        assert word in page


def test_inspect_says_nothing_of_it_where_there_is_none(model, tmp_path):
    bstack.compress(
        model, tmp_path / "sign.bstk", settings=Settings(codec="sign", planes=1, samples=2, sequence_length=16)
    )
    assert "spqr" not in json.loads(command("inspect", tmp_path / "sign.bstk", "--json").stdout)
    assert "SpQR" not in command("inspect", tmp_path / "sign.bstk").stdout


def test_the_same_settings_give_the_same_bytes_and_so_does_an_interrupted_run(made, model, tmp_path):
    class Stop(BaseException):
        pass

    @contextmanager
    def stop_after_a_layer(stage, _steps):
        def step():
            if stage == "layers":
                raise Stop

        yield step

    with pytest.raises(Stop):
        bstack.compress(model, tmp_path / "out.bstk", settings=SETTINGS, progress=stop_after_a_layer)
    assert (tmp_path / "out.bstk.work" / "layer-00000.json").exists()
    bstack.compress(model, tmp_path / "out.bstk", settings=SETTINGS)
    assert (tmp_path / "out.bstk").read_bytes() == made.read_bytes()


def test_every_cut_is_a_model_and_the_largest_is_near_the_original(made):
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original = tiny_models.make("llama-tied")(ids).logits.log_softmax(-1)
        with bstk.open(made) as file:
            sizes = [file.base.budget, (file.base.budget + file.complete.budget) // 2, file.complete.budget]
        found = []
        for size in sizes:
            model, _ = bstack.load(made, mb=size / bstk.MB)
            logs = model(ids).logits.log_softmax(-1)
            found.append(float((original.exp() * (original - logs)).sum(-1).mean()))
    assert found[2] < found[1] < found[0] and found[2] < 0.1


def test_no_outliers(model, tmp_path):
    done = command(
        "compress",
        model,
        "-o",
        tmp_path / "out.bstk",
        "--codec",
        "spqr",
        "--outliers",
        0,
        "--planes",
        1,
        "--samples",
        2,
        "--sequence-length",
        16,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(command("inspect", tmp_path / "out.bstk", "--json").stdout)["spqr"]
    assert found["bytes"]["outliers"] == found["outliers"] == 0
    without = sum(found["bytes"][part] for part in ("codes", "statistics", "permutation"))
    assert found["level_bits_per_weight"] == pytest.approx(8 * without / found["weights"])
    assert command("inspect", tmp_path / "out.bstk").returncode == 0


def test_no_planes(model, tmp_path):
    bstack.compress(
        model,
        tmp_path / "out.bstk",
        settings=Settings(codec="spqr", planes=0, samples=2, sequence_length=16, embeddings="dense"),
    )
    with bstk.open(tmp_path / "out.bstk") as file:
        assert {chunk.kind for chunk in file.chunks if chunk.is_block} == {bstk.SPQR, bstk.OUTLIERS}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", 4), "belongs to the spqr codec"),
        (("--codec", "spqr", "--bits", "four"), "not a valid integer"),
        (("--codec", "spqr", "--outliers", "few"), "neither a number nor auto"),
        (("--codec", "spqr", "--bpw", 4.5), "Or take 3 bits"),
        (("--codec", "spqr", "--bpw", 4.65), "Allowed is 5.552 to 12.312. Or take 3 bits."),
        (("--codec", "spqr", "--bpw", 15), "Allowed is 5.552 to 12.312."),
        (("--codec", "spqr", "--bpw", 100), "with 4 bits in groups of 16"),
        (("--preset", "paper", "--codec", "spqr"), "--preset paper is for --codec sign, not for --codec spqr"),
        (("--codec", "trellis", "--preset", "paper", "--planes", 3), "not for --codec trellis. Leave one of them out"),
        (("--codec", "spqr", "--rank", 4), "rank is 4, but the spqr codec has none; it belongs to the sign codec"),
    ],
)
def test_what_makes_no_sense_is_taught(model, tmp_path, arguments, words):
    done = command("compress", model, "-o", tmp_path / "out.bstk", *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())  # no work directory either


def test_a_preset_goes_with_its_own_codec_and_the_default_with_all(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "bstack.compression.api.compress", lambda *_, settings, **__: seen.append(settings) or sys.exit(0)
    )
    for arguments in (
        ["--preset", "paper", "--codec", "sign"],
        ["--preset", "default", "--codec", "spqr"],
        ["--preset", "paper"],
    ):
        with pytest.raises(SystemExit):
            compress_command.main(["model", "-o", str(tmp_path / "out.bstk"), *arguments])
    assert [settings.codec for settings in seen] == ["sign", "spqr", "sign"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_shapes_are_known_before_a_layer_is_run(name, tmp_path):
    folder = tiny_models.save(name, tmp_path / "model")
    bstack.compress(
        folder, tmp_path / "out.bstk", settings=Settings(codec="sign", planes=1, samples=2, sequence_length=16)
    )
    layers = list(layer_shapes(Skeleton(open_checkpoint(folder))))
    with bstk.open(tmp_path / "out.bstk") as file:
        for index, layer in enumerate(layers):
            found = [chunk.shape for chunk in file.chunks if chunk.is_block and f".{index}." in chunk.name]
            assert len(found) == len(layer)
            for shapes in layer:
                found.remove(next(shape for shape in found if shape in shapes))
            if name == "llama":
                assert all(len(shapes) == 1 for shapes in layer)
