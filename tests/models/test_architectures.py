"""One compression of each architecture, and what must hold of it, whatever the architecture calls its parts."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import tiny_models
import torch
from hypothesis import given, settings

import bstack
import bstk
from bstack.compression.encode import add_dense
from bstack.engine.container import dense_weights, plain_tensor
from bstack.models.names import MatrixName
from bstack.workdir import Part

pytestmark = pytest.mark.slow

# About equal bytes and equal errors at full depth.
SETTINGS = {
    "sign": bstack.Settings(codec="sign", planes=12, rank=6, samples=4, sequence_length=32),
    "trellis": bstack.Settings(codec="trellis", planes=5, samples=4, sequence_length=32),
}
IDS = torch.randint(3, tiny_models.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(5))


class Made(NamedTuple):
    name: str
    original: torch.nn.Module
    path: str
    planes: int


# Every architecture with the default codec; the other codec, which sees matrices only, with every form that a matrix has:
# plain, tied, with biases, inputs x outputs, of experts in either order, narrower embeddings.
OTHER_CODEC = ["llama", "llama-tied", "gpt2", "mixtral", "gpt-oss", "opt-projected"]


@pytest.fixture(
    scope="module",
    params=[f"{name} trellis" for name in tiny_models.ARCHITECTURES] + [f"{name} sign" for name in OTHER_CODEC],
)
def made(request, tmp_path_factory):
    name, codec = request.param.split()
    folder = tmp_path_factory.mktemp(name)
    tiny_models.save(name, folder / "model")
    bstack.compress(folder / "model", folder / "out.bstk", settings=SETTINGS[codec])
    return Made(name, tiny_models.make(name), str(folder / "out.bstk"), SETTINGS[codec].planes)


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=torch.ones_like(IDS)).logits.double()


def distance(model, original):
    """Relative error of the logits, the median over the positions.

    The median, because of experts: a token that stands between two of them may be sent to the other one by the smallest
    error, and a few positions then have other logits altogether. A shift of all logits of a position changes no
    probability and is left out.
    """
    a, b = logits(model), logits(original)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def test_logits_come_back(made):
    # Twelve planes of rank 6 leave a relative error of .2 to .5 % in each of these small matrices (each plane takes
    # about a factor 2). About 16 of them are passed through, and random models amplify what enters the first layers:
    # measured .5 to 2 %. A single lost matrix gives more than 15 %: the next test.
    model, tokenizer = bstack.load(made.path)
    assert distance(model, made.original) < 0.05
    assert tokenizer is None and not model.training
    # Logits of most positions say nothing of an expert that few tokens reach. Measured up to 1 %.
    state = model.state_dict()
    for name, parameter in made.original.state_dict().items():
        assert (state[name] - parameter).norm() <= 0.04 * parameter.norm(), name


def test_a_lost_matrix_would_show(made):
    """The tolerance above is one that a broken model exceeds."""
    broken = tiny_models.make(made.name)
    for name, parameter in broken.named_parameters():
        if parameter.dim() == 2 and min(parameter.shape) >= 16:
            kept = parameter.data.clone()
            parameter.data.zero_()
            assert distance(broken, made.original) > 0.15, name
            parameter.data.copy_(kept)


def test_closer_with_every_plane(made):
    """All linears cut at the same depth: each further plane brings the logits closer."""
    with bstk.open(made.path) as file:
        whole, _ = bstack.load(made.path)
        distances = []
        for depth in range(1, made.planes + 1):
            chunks = tuple(chunk for chunk in file.chunks if not chunk.is_block or chunk.level < depth)
            whole.load_state_dict(dict(dense_weights(file, chunks, whole, torch.float32)), strict=False)
            distances.append(distance(whole, made.original))
    # From the third sign plane, the second trellis block, on strictly. With less, logits are mostly noise, and noise may fall either way.
    first = 2 if made.planes > 6 else 1
    assert all(after < before for before, after in zip(distances[first:], distances[first + 1 :], strict=False)), (
        distances
    )
    middle = (made.planes - 1) // 2
    assert distances[middle] < distances[0] / 2 and distances[-1] < distances[middle] / 4, distances


def test_closer_with_every_budget(made):
    """In the file's own order: budgets far enough from each other that each admits many more blocks."""
    with bstk.open(made.path) as file:
        small, full = file.base_length, file.length
    budgets = [(small + (full - small) * i // 5 + 1) / bstk.MB for i in range(6)]
    found = [distance(bstack.load(made.path, mb=mb)[0], made.original) for mb in budgets]
    assert found == sorted(found, reverse=True), found
    assert found[-1] < found[0] / 8


def test_every_linear_of_the_layers_is_a_stack_and_nothing_else(made):
    """The oracle knows the module classes, which bstack does not."""
    from transformers.pytorch_utils import Conv1D

    expected = set()
    for name, module in made.original.named_modules():
        if ".layers." not in name and ".h." not in name:
            continue
        if isinstance(module, torch.nn.Linear | Conv1D):
            expected.add((f"{name}.weight", isinstance(module, Conv1D)))
        # Experts: parameters of three dimensions, one stack a slice. GPT-OSS keeps them as inputs x outputs.
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                expected |= {(f"{name}.{leaf}[{i}]", made.name == "gpt-oss") for i in range(parameter.shape[0])}
    # Routers have a side of 4 here: below the least that is worth a stack.
    small = {n for n, _ in expected if "[" not in n and min(made.original.get_parameter(n).shape) < 16}
    with bstk.open(made.path) as file:
        tables = {
            made.original.get_input_embeddings().weight.data_ptr(),
            made.original.get_output_embeddings().weight.data_ptr(),
        }
        tables = {n for n, p in made.original.named_parameters() if p.data_ptr() in tables}
        stacks = {(c.name, c.transposed) for c in file.chunks if c.is_block and c.name not in tables}
    assert stacks == {e for e in expected if e[0] not in small}
    assert len(stacks) >= 8


def test_what_is_dense_comes_back_bit_exact_and_all_is_there(made):
    state = made.original.state_dict()
    model, _ = bstack.load(made.path)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    with bstk.open(made.path) as file:
        dense = [c for c in file.chunks if c.is_weight and not c.is_block]
        stacked = {MatrixName.parse(c.name).parameter for c in file.chunks if c.is_block}
        for chunk in dense:
            original = state[chunk.name]
            assert file.read(chunk) == original.numpy().tobytes()
            assert loaded[chunk.name].numpy().tobytes() == original.numpy().tobytes()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    assert not {c.name for c in dense} & stacked
    assert {c.name for c in dense} | stacked == state.keys() - tied
    assert any(state[c.name].dim() == 1 for c in dense)


def test_tied_embeddings_are_stored_once(made):
    original, (model, _) = made.original, bstack.load(made.path)
    tied = original.get_input_embeddings().weight is original.get_output_embeddings().weight
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with bstk.open(made.path) as file:
        heads = [
            c for c in file.chunks if c.level == 0 and c.is_weight and c.shape and c.shape[0] == tiny_models.VOCABULARY
        ]
    assert len(heads) == (1 if tied else 2)


def test_both_kinds_of_embeddings_are_among_the_architectures():
    tied = {name: tiny_models.make(name).config.tie_word_embeddings for name in ("llama", "llama-tied")}
    assert tied == {"llama": False, "llama-tied": True}


# What a checkpoint on disk may look like.


def test_shards_give_the_same_file_as_one(tmp_path):
    tiny_models.save("llama", tmp_path / "one" / "model")
    tiny_models.save("llama", tmp_path / "many" / "model", shard="50KB")
    assert len(list((tmp_path / "many" / "model").glob("*.safetensors"))) > 3
    chunks = {}
    for name in ("one", "many"):
        bstack.compress(tmp_path / name / "model", tmp_path / f"{name}.bstk", settings=SETTINGS["sign"])
        with bstk.open(tmp_path / f"{name}.bstk") as file:
            chunks[name] = [(c.name, c.level, c.digest, c.importance) for c in file.chunks]
    assert chunks["one"] == chunks["many"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_checkpoints_of_other_precisions(name, dtype, tmp_path):
    tiny_models.save(name, tmp_path / "model", dtype=dtype)
    bstack.compress(tmp_path / "model", tmp_path / "out.bstk", settings=SETTINGS["sign"])
    original = tiny_models.make(name).to(dtype).float()
    model, _ = bstack.load(tmp_path / "out.bstk")
    # As in test_logits_come_back; the original is the rounded one.
    assert distance(model, original) < 0.05
    kept = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f32"}[dtype]
    with bstk.open(tmp_path / "out.bstk") as file:
        dense = [c for c in file.chunks if c.is_weight and not c.is_block]
    assert {c.dtype for c in dense} == {kept}
    for chunk in dense:
        assert torch.equal(model.state_dict()[chunk.name], original.state_dict()[chunk.name]), chunk.name


def test_dense_embeddings_come_back_bit_exact(tmp_path):
    tiny_models.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    bstack.compress(
        tmp_path / "model", tmp_path / "out.bstk", settings=SETTINGS["sign"].with_changes(embeddings="dense")
    )
    model, _ = bstack.load(tmp_path / "out.bstk", dtype=torch.bfloat16)
    original = tiny_models.make("llama").to(torch.bfloat16)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert torch.equal(model.get_output_embeddings().weight, original.get_output_embeddings().weight)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    dtype=st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
    ),
    data=st.data(),
)
def test_dense_tensors_round_trip(tmp_path_factory, shape, dtype, data):
    """Any shape, scalars too; every bit pattern of a finite number, minus zero and denormals too."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    width = torch.empty(0, dtype=dtype).element_size()
    raw = bytearray(data.draw(st.binary(min_size=count * width, max_size=count * width)))
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    stored = torch.frombuffer(raw, dtype=dtype).reshape(shape)
    if stored.is_floating_point():
        stored = torch.where(stored.isfinite(), stored, torch.zeros((), dtype=dtype))
    held = stored.float() if stored.is_floating_point() else stored  # as a checkpoint's load() gives it
    folder = tmp_path_factory.mktemp("part")
    part = Part(folder, "p")
    add_dense("x", held, dtype, part)
    part.close(finished=True)
    record = part.records[0]
    assert record["shape"] == shape and record["raw_length"] == count * width
    frame = (folder / "p.bin").read_bytes()
    from bstk.frames import unpack

    assert unpack(frame, record["raw_length"]) == stored.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    chunk = type("Chunk", (), {"dtype": record["dtype"], "shape": record["shape"]})
    assert torch.equal(plain_tensor(unpack(frame, record["raw_length"]), chunk).float(), held.float())


def test_packed_weights_give_the_dense_logits(made):
    """At several depths, for prompts (rows decoded) and for few tokens (packed products)."""
    with bstk.open(made.path) as file:
        small, full = file.base.budget, file.length
    model, _ = bstack.load(made.path, mode="packed", mb=(small + 1) / bstk.MB)
    for fraction in (0, 0.4, 1):
        mb = (small + (full - small) * fraction + 1) / bstk.MB
        bstack.resize(model, mb)
        dense, _ = bstack.load(made.path, mb=mb)
        # Products round their inputs to 16 bits, about 1e-4 of each; random models amplify that as they do every error.
        assert distance(model, dense) < 5e-3
        ids = IDS[:1, :5]
        with torch.no_grad():
            packed, expected = model(ids).logits, dense(ids).logits
        assert ((packed - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 2e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no operation without a packed form
        model(IDS)
