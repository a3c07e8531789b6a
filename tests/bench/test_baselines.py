"""The baselines against what they are defined to be, in float64 and without their code."""

import math

import in_process
import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import bstk
from bstack.bench.baselines.gptq import DAMPING, gptq
from bstack.bench.baselines.rtn import GROUP, packed_bits, round_to_nearest
from bstack.bench.options import BITS, Choice, parse_against
from bstack.bench.results import frontier
from bstack.bench.tables import as_csv, as_tables

pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(0)


def problem(rows=24, columns=160, tokens=400, spread=1.0):
    """A weight, and the Hessian of inputs that hang together."""
    weight = torch.randn(rows, columns, generator=GENERATOR) * 0.05
    mixing = torch.randn(columns, columns, generator=GENERATOR) * torch.logspace(0, -1.5, columns)
    inputs = torch.randn(tokens, columns, generator=GENERATOR) @ mixing * spread
    return weight, inputs.t() @ inputs


def objective(weight, hessian, matrix):
    error = (weight - matrix.dense()).double()
    return float((error @ hessian.double() * error).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(2, 8), st.floats(-5, 3), st.integers(0, 10**6))
def test_rounding_to_nearest(rows, columns, bits, magnitude, seed):
    generator = np.random.default_rng(seed)
    weight = (generator.normal(size=(rows, columns)) + generator.normal()) * 10**magnitude
    found = round_to_nearest(torch.from_numpy(weight).float(), bits)
    assert found.codes.shape == (rows, columns) and int(found.codes.max()) < 2**bits
    dense = found.dense().double().numpy()
    for start in range(0, columns, GROUP):
        group = weight[:, start : start + GROUP]
        low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
        step = (high - low) / (2**bits - 1)
        # Half a step, and what the grid is off by its zero's and its scale's rounding.
        bound = 1.01 * step[:, None] + 2**-10 * np.abs(group) + 2.0**-14
        assert (np.abs(dense[:, start : start + GROUP] - group) <= bound).all()


def test_nothing_on_the_grid_is_nearer():
    weight, _ = problem()
    found = round_to_nearest(weight, 3)
    scale = found.scale.float().repeat_interleave(GROUP, 1)[:, :160]
    zero = found.zero.float().repeat_interleave(GROUP, 1)[:, :160]
    every = torch.stack([(code - zero) * scale for code in range(8)])
    best = (every - weight).abs().amin(0)
    torch.testing.assert_close((found.dense() - weight).abs(), best)


def test_zero_stays_zero():
    weight = torch.zeros(3, 70)
    weight[0, :5] = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    for bits in (2, 4, 8):
        dense = round_to_nearest(weight, bits).dense()
        assert dense[1:].count_nonzero() == 0 and dense[0, 5:].count_nonzero() == 0


def plain_gptq(weight, hessian, bits):
    """The paper's algorithm step by step: the inverse itself is updated, nothing is factored, nothing comes in blocks."""
    weight = weight.astype(np.float64).copy()
    columns = weight.shape[1]
    inverse = np.linalg.inv(hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(columns))
    quantised = np.zeros_like(weight)
    for j in range(columns):
        if j % GROUP == 0:
            group = weight[:, j : j + GROUP]
            low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
            scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
            zero = np.round(-low / scale)
        codes = np.clip(np.round(weight[:, j] / scale + zero), 0, 2**bits - 1)
        quantised[:, j] = (codes - zero) * scale
        error = (weight[:, j] - quantised[:, j]) / inverse[j, j]
        weight[:, j:] -= np.outer(error, inverse[j, j:])
        # Optimal brain surgeon: the inverse of H without row and column j.
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :], inverse[:, j] = 0, 0
        inverse[j, j] = 1
    return quantised


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [48, 64, 160, 300])
def test_gptq_is_the_plain_algorithm(bits, columns):
    weight, hessian = problem(rows=8, columns=columns, tokens=4 * columns)
    found = gptq(weight, hessian, bits).dense().double().numpy()
    expected = plain_gptq(weight.numpy(), hessian.double().numpy(), bits)
    # A weight half-way between two codes may go either way, and then all that follow in its row differ.
    same_rows = np.isclose(found, expected, rtol=1e-3, atol=1e-5).all(1)
    assert same_rows.mean() >= 0.6
    mine, theirs = (
        ((weight.numpy() - q) @ hessian.double().numpy() * (weight.numpy() - q)).sum() for q in (found, expected)
    )
    assert mine == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_rounding_where_inputs_hang_together(bits):
    weight, hessian = problem()
    mine = objective(weight, hessian, gptq(weight, hessian, bits))
    assert mine < 0.7 * objective(weight, hessian, round_to_nearest(weight, bits))


@pytest.mark.parametrize("columns", [40, 64, 100, 300])
def test_gptq_is_rounding_where_they_do_not(columns):
    weight, _ = problem(columns=columns)
    hessian = torch.diag(torch.rand(columns, generator=GENERATOR) + 0.1)
    mine, rounded = gptq(weight, hessian, 3), round_to_nearest(weight, 3)
    assert torch.equal(mine.codes, rounded.codes)
    assert torch.equal(mine.scale, rounded.scale) and torch.equal(mine.zero, rounded.zero)


def test_gptq_takes_inputs_that_are_always_zero_or_the_same():
    weight, hessian = problem(columns=70)
    hessian[3], hessian[:, 3] = 0, 0
    hessian[10], hessian[:, 10] = hessian[9], hessian[:, 9]
    hessian[10, 10] = hessian[9, 10] = hessian[10, 9] = hessian[9, 9]
    found = gptq(weight, hessian, 4)
    assert found.dense().isfinite().all() and found.dense()[:, 3].count_nonzero() == 0
    assert objective(weight, hessian, found) < objective(weight, hessian, round_to_nearest(weight, 4))
    assert gptq(weight, torch.zeros(70, 70), 4).dense().count_nonzero() == 0


def test_gptq_leaves_its_arguments_alone():
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, 2)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@given(st.integers(2, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_packing(bits, values):
    values = [value % 2**bits for value in values]
    data = packed_bits(torch.tensor(values, dtype=torch.uint8), bits)
    assert len(data) == math.ceil(len(values) * bits / 8)
    number = int.from_bytes(data, "little")
    assert [number >> (i * bits) & (2**bits - 1) for i in range(len(values))] == values


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.28125), (3, 3.296875), (4, 4.3125), (8, 8.375)])
def test_bits_per_weight_count_scales_and_zeros(bits, expected):
    weight = torch.randn(32, 192, generator=GENERATOR)
    payload = round_to_nearest(weight, bits).payload()
    assert 8 * len(payload) / weight.numel() == expected


def test_which_baselines():
    assert [c[:4] for c in parse_against("rtn:4, gptq:3,rtn:4")] == [("rtn", 4, True, None), ("gptq", 3, True, None)]
    assert parse_against("gguf:a/b@4:x.gguf,rtn:4") == [
        Choice("gguf", 0, True, None, "a/b@4:x.gguf"),
        Choice("rtn", 4, True),
    ]
    assert [c[:4] for c in parse_against("spqr:4@4.75,spqr:4,spqr:3@4,spqr:4@4.750")] == [
        ("spqr", 4, True, 4.75),
        ("spqr", 4, True, None),
        ("spqr", 3, True, 4.0),
    ]
    assert [c.name for c in parse_against("spqr:4@4.75,spqr:4,rtn:8,spqr:3@4.0")] == [
        "spqr:4@4.75",
        "spqr:4",
        "rtn:8",
        "spqr:3@4",
    ]
    assert [(c.method, c.bits) for c in parse_against("gptq,rtn")] == [(m, b) for m in ("gptq", "rtn") for b in BITS[m]]
    assert not any(c.asked for c in parse_against("gptq"))
    for bad in (
        "",
        "awq",
        "gguf",
        "gguf:",
        "rtn,",
        "rtn:",
        "rtn:1",
        "rtn:9",
        "rtn:4.5",
        "rtn:-4",
        "GPTQ",
        "gptq:4:4",
        "gptq: 4",
        "spqr:2",
        "spqr:5",
        "spqr@4.75",
        "spqr:@4.75",
        "spqr:4@",
        "spqr:4@nan",
        "spqr:4@-5",
        "spqr:4@1e2",
        "spqr:2@4.75",
        "spqr:4@4.7@4",
    ):
        with pytest.raises(bstk.UsageError, match=r"not a baseline|not a number of bits"):
            parse_against(bad)
    with pytest.raises(bstk.UsageError, match="gptq has no outliers"):
        parse_against("gptq:4@4.75")


# The whole of a baseline on a model.


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gpt2", "mixtral"])
def prepared(request, tmp_path_factory):
    import bstack
    from bstack.bench.quality import original_reference
    from bstack.models.open import open_checkpoint
    from bstack.models.skeleton import Skeleton

    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.save(request.param, folder / "model")
    settings = bstack.Settings(codec="sign", planes=3, samples=4, sequence_length=32)
    bstack.compress(folder / "model", folder / "out.bstk", settings=settings)
    windows = torch.randint(3, tiny_models.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        skeleton = Skeleton(open_checkpoint(folder / "model"))
        (folder / "scratch").mkdir()
        reference = original_reference(skeleton, windows, folder / "scratch")
        yield request.param, folder, skeleton, windows, reference


def logits_of(name, change):
    """Logits of an architecture after `change(parameter name, tensor) -> tensor`, without bstack."""
    model = tiny_models.make(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(change(key, parameter))
    return model


def test_rounded_models_are_what_the_formula_says(prepared):
    from bstack.bench.baselines.model import Baselines

    name, folder, skeleton, windows, reference = prepared
    with bstk.open(folder / "out.bstk") as file:
        stacks = {chunk.name: chunk.transposed for chunk in file.chunks if chunk.is_block}
        baselines = Baselines(file, skeleton, windows, reference, folder / "scratch")
        twice = [baselines.measure("rtn", 4, None) for _ in range(2)]
        other = sum(c.stored_length for c in file.chunks if not c.is_block)
        dense = sum(c.raw_length for c in file.chunks if c.is_weight and not c.is_block)
    # Again the same: what was altered for one measurement must not be there in the next.
    assert twice[0] == twice[1] and list((folder / "scratch").iterdir()) == []
    original = logits_of(name, lambda key, tensor: tensor)
    tables = {original.get_input_embeddings().weight.data_ptr(), original.get_output_embeddings().weight.data_ptr()}
    tables = {key for key, parameter in original.named_parameters() if parameter.data_ptr() in tables}
    raw = 0

    for found in twice[0]:
        packed = []

        def change(key, tensor, bits=found.embedding_bits, packed=packed):
            if key in tables:
                packed.append(round_to_nearest(tensor, bits))
                return packed[-1].dense()
            parts = [(part, stacks[part]) for part in stacks if part.partition("[")[0] == key]
            changed = tensor.clone()
            for part, transposed in parts:
                index = int(part[part.index("[") + 1 : -1]) if "[" in part else slice(None)
                view = changed[index].t() if transposed else changed[index]
                packed.append(round_to_nearest(view.clone(), 4))
                view.copy_(packed[-1].dense())
            return changed

        model = logits_of(name, change)
        with torch.no_grad():
            p = original(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            q = model(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        assert found.quality.kld.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=5e-3)
        raw = sum(len(matrix.payload()) for matrix in packed)
        assert found.sizes.memory_bytes == raw + dense
        assert found.sizes.file_bytes == sum(bstk.pack(matrix.payload()).stored_length for matrix in packed) + other


def measured(prepared, *runs):
    """What one `Baselines` finds for some methods and bits, one after the other."""
    from bstack.bench.baselines.model import Baselines

    _, folder, skeleton, windows, reference = prepared
    calibration = torch.randint(3, tiny_models.VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(6))
    with bstk.open(folder / "out.bstk") as file:
        baselines = Baselines(file, skeleton, windows, reference, folder / "scratch")
        return [baselines.measure(method, bits, None if method == "rtn" else calibration) for method, bits in runs]


def test_gptq_models_improve_on_rounded_ones(prepared):
    first, again, rounded = measured(prepared, ("gptq", 4), ("gptq", 4), ("rtn", 4))
    assert first == again
    assert first[0].sizes.memory_bytes == rounded[0].sizes.memory_bytes
    assert first[0].quality.kld.value < rounded[0].quality.kld.value, prepared[0]


def test_the_frontier_keeps_what_is_best_at_its_bytes():
    class Fake:
        def __init__(self, method, size, kld):
            self.method = method
            self.sizes = type("S", (), {"file_bytes": size})
            self.quality = type("Q", (), {"kld": type("E", (), {"value": kld})})

    a, b, c, d, e = (Fake("m", 10, 5.0), Fake("m", 20, 6.0), Fake("m", 30, 2.0), Fake("m", 30, 1.0), Fake("n", 40, 9.0))
    assert frontier([c, b, e, a, d]) == [a, d, e]


def test_spqr_models_improve_on_gptq(prepared):
    first, again, gptq_ = measured(prepared, ("spqr", 3), ("spqr", 3), ("gptq", 3))
    assert first == again
    assert first[0].name == "spqr 3 bits, embeddings 8"
    assert first[0].sizes.memory_bytes > gptq_[0].sizes.memory_bytes
    assert first[0].quality.kld.value < gptq_[0].quality.kld.value, prepared[0]


def test_spqr_meets_a_target(prepared):
    from bstack.bench.baselines.model import Baselines
    from bstack.bench.results import Baseline

    _, folder, skeleton, windows, reference = prepared
    calibration = torch.randint(3, tiny_models.VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(6))
    with bstk.open(folder / "out.bstk") as file:
        baselines = Baselines(file, skeleton, windows, reference, folder / "scratch")
        small, large = (baselines.measure("spqr", 3, calibration, bpw=bpw)[0] for bpw in (6.0, 7.0))
        weights = sum(math.prod(chunk.shape) for chunk in baselines._linears.values())
    assert small.name == "spqr 3@6 bits, embeddings 8" and small.to_json()["bpw"] == 6.0
    assert Baseline.from_plain(small.to_plain()) == small
    # Experts that no token reached are rounded to nearest, in fewer bits.
    assert 0.5 < 8 * (large.sizes.memory_bytes - small.sizes.memory_bytes) / weights < 1.05


def test_a_target_that_shapes_rule_out_is_refused_with_the_choice():
    from bstack.bench.baselines.spqr import check_targets

    layers = [[(64, 64), (128, 64)]]
    check_targets(parse_against("rtn,spqr:4,spqr:4@5"), layers)
    for choice, words in (
        ("spqr:4@4.7", r"against spqr:4@4.7: bpw is 4.7; .* Allowed is 4\.\d+ to"),
        ("spqr:3@100", "3 bits in groups of 16"),
    ):
        with pytest.raises(bstk.UsageError, match=words):
            check_targets(parse_against(choice), layers)


@pytest.mark.slow
def test_a_gguf_file_is_measured_as_it_is(tiny_llama, tmp_path, monkeypatch):
    import bstack
    from bstack.bench.options import Options
    from bstack.bench.run import run_bench
    from bstack.progress import no_progress

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("bstack.bench.run.ask", in_process.measure)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.mul_(8).round_().div_(8)
    tiny_gguf.write(tmp_path / "rounded.gguf", rounded)
    tiny_gguf.write(tmp_path / "other.gguf", tiny_models.make("llama", vocab_size=99))
    bstack.compress(
        tiny_llama, tmp_path / "model.bstk", settings=bstack.Settings(planes=1, samples=2, sequence_length=16)
    )

    text = "The old river went round the town, and nobody knew how deep it was there. " * 20
    (tmp_path / "text.txt").write_text(text)

    def bench(name):
        options = Options(
            budgets=[10 * bstk.MB],
            speed=False,
            text=str(tmp_path / "text.txt"),
            windows=2,
            sequence_length=24,
            original=str(tiny_llama),
            against=parse_against(f"gguf:{tmp_path / name}"),
        )
        return run_bench(tmp_path / "model.bstk", options, no_progress)[0]

    report = bench("rounded.gguf")
    (found,) = report.baselines
    assert found.sizes.file_bytes == (tmp_path / "rounded.gguf").stat().st_size
    assert found.name == "rounded.gguf" and "gguf:rounded.gguf" in as_csv(report)
    assert "| gguf" in as_tables(report) and "rounded.gguf" in as_tables(report)
    with torch.no_grad():
        ids = AutoTokenizer.from_pretrained(tiny_llama)(text, add_special_tokens=False)["input_ids"]
        windows = torch.tensor(ids[:48]).view(2, 24)
        p, q = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in (original, rounded))
    assert found.quality.kld.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    with pytest.raises(bstk.UsageError, match=r"other\.gguf has a vocabulary of 99, but the original has one of"):
        bench("other.gguf")
