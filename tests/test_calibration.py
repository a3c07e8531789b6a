"""Statistics of the streamed pass against plain hooks, sensitivities against plain autograd, and where texts come from."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import tiny_models
import torch
from bstack.calibration import texts
from bstack.calibration.selftext import draw, token_steps, write_windows
from bstack.calibration.sensitivity import layer_parameters, output_sensitivity
from bstack.calibration.statistics import InputStatistics, gather
from bstack.calibration.stream import LayerStream
from bstack.calibration.texts import TextSource, open_text, token_windows
from bstack.errors import CalibrationError, TextNotFoundError
from bstack.models.safetensors import SafetensorsCheckpoint
from bstack.models.skeleton import Skeleton

IDS = torch.randint(3, tiny_models.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(3))
BATCHES = list(IDS.split(2))
# Plain ones, Conv1D, fused projections, experts, shared rotary tables, layers of two kinds of attention.
SOME = ["llama", "qwen3", "gemma3", "phi3", "gpt2", "opt-projected", "gpt-neox", "falcon", "stablelm", "mixtral", "gpt-oss"]


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Skeleton(SafetensorsCheckpoint(tiny_models.save(name, tmp_path_factory.mktemp(name) / "model")))
        return made[name]

    return get


def streamed_tables(skeleton, batches=BATCHES):
    """The statistics of every layer, by the streamed pass."""
    tables = []
    with skeleton.loaded(skeleton.outer_names), LayerStream(skeleton, batches) as stream:
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                tables.append(gather(stream, index, layer_parameters(skeleton, index)))
    return tables, stream.results


def exact(name):
    """The ordinary model in float64, which not every way to run experts knows."""
    model = tiny_models.make(name).double()
    model.set_experts_implementation("eager")
    return model


def linears(model):
    from transformers.pytorch_utils import Conv1D

    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and (".layers." in name or ".h." in name)
    }


def hooked_moments(name):
    """X^T X and rows of every linear's input: ordinary model, one forward pass, float64."""
    model = exact(name)
    moments = {}

    def hook(parameter):
        def note(_module, inputs, _output):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            moment, count = moments.get(parameter, (0, 0))
            moments[parameter] = moment + rows.t() @ rows, count + rows.shape[0]

        return note

    for parameter, module in linears(model).items():
        module.register_forward_hook(hook(parameter))
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
    return moments, hidden


@pytest.mark.parametrize("name", SOME)
def test_moments_are_those_of_a_plain_forward_pass(skeletons, name):
    tables, results = streamed_tables(skeletons(name))
    wanted, hidden = hooked_moments(name)
    found = {n: table.statistics(n) for table in tables for n in table.operands}
    assert wanted.keys() <= found.keys()
    # Float32 sums of 96 products against float64; the passes before add their own rounding: 1e-4 of the moment's size.
    # With experts a token at the border may be sent elsewhere: then whole rows would differ, but these seeds have none.
    for parameter, (moment, rows) in wanted.items():
        assert found[parameter].tokens == rows == IDS.numel()
        assert (found[parameter].moment - moment).norm() <= 1e-4 * moment.norm(), parameter
    last = torch.cat([result.last_hidden_state for result in results])
    assert (last - hidden).norm() <= 1e-5 * hidden.norm()


@pytest.mark.parametrize(("name", "leaf"), [("mixtral", "gate_up_proj"), ("gpt-oss", "down_proj")])
def test_moments_of_experts(skeletons, name, leaf):
    """Against the experts' own equations: which tokens the router sends where, written out."""
    tables, _ = streamed_tables(skeletons(name))
    model = exact(name)
    seen = []
    experts = model.model.layers[0].mlp.experts

    def note(_module, arguments, named):
        seen.append((*arguments, *named.values()))

    experts.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(IDS)
    hidden = next(t for t in seen[0] if t.is_floating_point() and t.shape[-1] == 48).reshape(-1, 48)
    choice = next(t for t in seen[0] if not t.is_floating_point())
    for expert in range(4):
        rows = hidden[(choice == expert).any(-1)]
        if leaf == "down_proj":
            gate_up = rows @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
            gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
            rows = (up + 1) * gate * torch.sigmoid(gate * 1.702)
        statistics = tables[0].statistics(f"model.layers.0.mlp.experts.{leaf}[{expert}]")
        assert statistics.tokens == len(rows) and 0 < len(rows) < IDS.numel()
        assert (statistics.moment - rows.t() @ rows).norm() <= 1e-4 * (rows.t() @ rows).norm()


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"o_proj"}, {"down_proj"}]),
        ("gpt-neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
        # Parallel: attention and feed-forward read the same normed state.
        ("falcon", [{"query_key_value", "dense_h_to_4h"}, {"dense"}, {"dense_4h_to_h"}]),
    ],
)
def test_linears_of_one_input_share_its_statistics(skeletons, name, groups):
    tables, _ = streamed_tables(skeletons(name))
    for table in tables:
        found = {}
        for operand in table.operands:
            found.setdefault(id(table.statistics(operand)), set()).add(operand.split(".")[-2])
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, groups))


def test_batches_do_not_matter(skeletons):
    one, _ = streamed_tables(skeletons("llama"), [IDS])
    four, _ = streamed_tables(skeletons("llama"), list(IDS.split(1)))
    for first, second in zip(one, four, strict=True):
        for name in first.operands:
            a, b = first.statistics(name), second.statistics(name)
            assert a.tokens == b.tokens and (a.moment - b.moment).norm() <= 1e-4 * a.moment.norm()


def test_one_layer_at_a_time_is_in_memory(skeletons):
    skeleton = skeletons("llama")

    def held():
        return {n for n, p in skeleton.model.named_parameters() if p.device.type != "meta"}

    assert not held()
    with skeleton.loaded(skeleton.outer_names), LayerStream(skeleton, BATCHES) as stream:
        outer = held()
        assert not any(".layers." in name for name in outer)
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                assert held() == outer | set(skeleton.layer_names(index))
                stream.run_all(index)
    assert not held()


def test_a_stream_that_is_left_early_ends_its_threads(skeletons):
    skeleton, before = skeletons("llama"), threading.active_count()
    with pytest.raises(ZeroDivisionError), skeleton.loaded(skeleton.outer_names), LayerStream(skeleton, BATCHES) as stream:
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                raise ZeroDivisionError
    assert threading.active_count() <= before, "those of other tests may have ended meanwhile"
    streamed_tables(skeleton)  # and the skeleton is as good as new


# Sensitivities.


def plain_sensitivity(name, draws, batches):
    """Sum over tokens of squared gradients at every linear's output: the whole model, float64, one backward pass."""
    model = exact(name)
    outputs, squares = {}, {}

    def note(parameter, output):
        outputs[parameter] = output
        output.retain_grad()

    for parameter, module in linears(model).items():
        module.register_forward_hook(lambda _m, _i, output, p=parameter: note(p, output))
    first = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)[0]

    def note_input(_module, arguments, named):
        note("", arguments[0] if arguments else named["hidden_states"])

    first.register_forward_pre_hook(note_input, with_kwargs=True)
    for batch, drawn in zip(batches, draws, strict=True):
        logits = model(batch).logits
        chosen = logits.log_softmax(-1).reshape(-1, logits.shape[-1]).gather(1, drawn)
        (-chosen.sum()).backward()
        for parameter, output in outputs.items():
            total = output.grad.square().reshape(-1, output.shape[-1]).sum(0)
            squares[parameter] = squares.get(parameter, 0) + total
    tokens = sum(batch.numel() for batch in batches)
    return {parameter: total / tokens for parameter, total in squares.items()}


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "opt-projected", "gpt-neox", "falcon", "olmo2"])
def test_sensitivities_are_those_of_plain_autograd(skeletons, name, tmp_path, monkeypatch):
    draws, original = [], torch.multinomial

    def recording(*arguments, **named):
        draws.append(original(*arguments, **named))
        return draws[-1]

    monkeypatch.setattr(torch, "multinomial", recording)
    found = output_sensitivity(skeletons(name), BATCHES, seed=1, scratch=tmp_path)
    wanted = plain_sensitivity(name, draws, BATCHES)
    assert len(draws) == len(BATCHES)
    # Gradients in float32 through the whole model: 1e-3 of the size of the vector.
    for parameter, squares in wanted.items():
        mine = found.outputs[parameter] if parameter else found.embedding
        assert mine.shape == squares.shape
        assert (mine - squares).norm() <= 1e-3 * squares.norm(), parameter
    assert not list(tmp_path.iterdir())


def test_sensitivity_of_the_head_predicts_the_divergence(skeletons, tmp_path):
    """At the logits: a small error d costs 1/2 sum_i E[p_i (1 - p_i)] d_i^2 when the d_i are independent."""
    skeleton = skeletons("llama")
    found = output_sensitivity(skeleton, [IDS], seed=0, scratch=tmp_path).outputs[skeleton.output_name]
    with torch.no_grad():
        logits = tiny_models.make("llama")(IDS).logits.double()
    divergences = []
    for seed in range(40):
        error = 0.05 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        p, q = logits.log_softmax(-1), (logits + error).log_softmax(-1)
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    predicted = 0.5 * 0.05**2 * float(found.sum())
    # Second order in d: terms of third order are about 5 % of it; the mean of 40 x 96 positions is good to 1 %.
    assert sum(divergences) / 40 == pytest.approx(predicted, rel=0.05)


def test_sensitivities_predict_the_divergence_of_damaged_outputs(skeletons, tmp_path):
    """Finite differences: noise on one linear's output, the divergence measured, against 1/2 sum_i F_i E[d_i^2]."""
    skeleton = skeletons("llama")
    batches = [torch.randint(3, tiny_models.VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(9))] * 8
    found = output_sensitivity(skeleton, batches, seed=0, scratch=tmp_path).outputs
    model = tiny_models.make("llama").double()
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        generator = torch.Generator().manual_seed(4)
        module = model.get_submodule(name)
        with torch.no_grad():
            reference = model(batches[0]).logits.log_softmax(-1)
            hook = module.register_forward_hook(
                lambda _m, _i, output: output + 0.02 * torch.randn(output.shape, generator=generator, dtype=output.dtype)
            )
            divergences = []
            for _ in range(4):
                damaged = model(batches[0]).logits.log_softmax(-1)
                divergences.append(float((reference.exp() * (reference - damaged)).sum(-1).mean()))
            hook.remove()
        predicted = 0.5 * 0.02**2 * float(found[f"{name}.weight"].sum())
        # Eight draws a position estimate the expectation over the draw: the sum is good to about 10 %. A factor lost
        # anywhere (a 2, a mean in place of a sum) would be at least 2.
        assert sum(divergences) / 4 == pytest.approx(predicted, rel=0.25), name


# Texts.


def test_a_model_writes_its_own_text(skeletons):
    skeleton = skeletons("llama")
    state = torch.get_rng_state()
    windows = write_windows(skeleton, 3, 20, seed=4)
    assert windows.shape == (3, 20) and windows.dtype == torch.int64
    assert (windows[:, 0] == 1).all(), "the start token"
    assert 0 <= windows.min() and windows.max() < tiny_models.VOCABULARY
    assert torch.equal(write_windows(skeleton, 3, 20, seed=4), windows)
    assert not torch.equal(write_windows(skeleton, 3, 20, seed=5), windows)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are the caller's"


def test_long_windows_are_made_of_several_texts(skeletons):
    windows = write_windows(skeletons("llama"), 2, 300, seed=0)
    assert windows.shape == (2, 300)
    assert (windows[:, [0, 100, 200]] == 1).all(), "three texts of 100 tokens, each with its start token"
    steps = []
    write_windows(skeletons("llama"), 140, 3, seed=0, progress=lambda: steps.append(1))
    assert len(steps) == token_steps(140, 3) == 4


def test_an_ended_text_is_followed_by_another(skeletons):
    windows = write_windows(skeletons("llama"), 64, 100, seed=0)
    ends = (windows[:, :-1] == 2).nonzero()
    assert len(ends) > 10, "a model of 211 words ends often"
    assert (windows == 0).sum() < 200, "no padding after an end"
    assert all(windows[row, at + 1] == 1 for row, at in ends), "the start token after each end"


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 2.0, -1.0, -torch.inf, 1.0]).expand(20000, 5)
    counts = torch.bincount(draw(logits, generator).squeeze(1), minlength=5)
    expected = 20000 * logits[0].softmax(0)
    assert counts[3] == 0
    # Each count within five standard deviations.
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()
    assert draw(torch.tensor([[-torch.inf, -torch.inf, 0.0]] * 100), generator).eq(2).all()


@pytest.mark.parametrize("width", [1, 383, 384, 385, 1000])
def test_moments_of_any_width(width):
    rows = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(width))
    statistics = InputStatistics(width)
    for _ in range(2):  # reading must not disturb what is added later
        statistics.add(rows)
        flat = rows.reshape(-1, width).double()
        expected = statistics.tokens // 21 * flat.t() @ flat
        assert (statistics.moment - expected).norm() <= 1e-5 * expected.norm()


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text, **_options):
        return {"input_ids": [ord(c) for c in text]}


def test_windows_are_spread_over_the_text():
    text = TextSource("t", "".join(chr(i) for i in range(1000)))
    windows = token_windows(text, Letters(), 4, 10)
    assert windows[:, 0].tolist() == [0, 250, 500, 750] and windows[3].tolist() == list(range(750, 760))
    assert token_windows(TextSource("t", "x" * 40), Letters(), 4, 10).shape == (4, 10)
    assert token_windows(text, Letters(), 4, 10, held_out=2).shape == (6, 10)
    with pytest.raises(CalibrationError, match="39 tokens, but 4 samples of 10 need 40"):
        token_windows(TextSource("t", "x" * 39), Letters(), 4, 10)


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("Füße\n", encoding="utf-8")
    assert open_text(str(tmp_path / "a.txt")) == TextSource("a.txt", "Füße\n")
    (tmp_path / "b.JSONL").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert open_text(str(tmp_path / "b.JSONL")).text == "one\n\ntwo"


def test_folders_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in {"z.md": "last", "a.txt": "first", "deep/m.txt": "middle", "picture.png": "no"}.items():
        (tmp_path / name).write_text(text)
    assert open_text(str(tmp_path)).text == "first\n\nmiddle\n\nlast"
    assert open_text(str(tmp_path)).name == tmp_path.name


def test_no_more_is_read_than_the_bound(tmp_path, monkeypatch):
    read = []
    original = texts._records

    def counting(path):
        for text in original(path):
            read.append(text)
            yield text

    monkeypatch.setattr(texts, "_records", counting)
    monkeypatch.setattr(texts, "LONGEST", 20)
    (tmp_path / "a.jsonl").write_text('{"text":"abcdef"}\n' * 50)
    (tmp_path / "b.txt").write_text("x" * 50)
    (tmp_path / "c.txt").write_bytes(b"\xff" * 50)  # would be refused
    assert open_text(str(tmp_path / "a.jsonl")).text == "abcdef\n\nabcdef\n\nabcd"
    assert len(read) == 3
    assert open_text(str(tmp_path / "b.txt")).text == "x" * 20
    assert open_text(str(tmp_path)).text == "abcdef\n\nabcdef\n\nabcd"
    (tmp_path / "a.jsonl").write_text('{"text": "this is too long"}\n')
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 1: longer than 20 characters"):
        open_text(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("line", ["[1]", '"text"', "{", '{"txt": "x"}', "7"])
def test_records_that_are_none(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(CalibrationError, match="line 2"):
        open_text(str(tmp_path / "a.jsonl"))


def test_hub_data_sets(monkeypatch):
    asked = []

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert open_text("owner/set") == TextSource("owner/set", "one\ntwo")
    open_text("owner/set:small")
    open_text("set:small:validation")
    assert asked == [
        ("owner/set", None, "train", True), ("owner/set", "small", "train", True), ("set", "small", "validation", True),
    ]  # fmt: skip


def test_hub_data_sets_without_texts(monkeypatch):
    rows = [{"label": 1, "content": "x"}]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_a, **_k: rows))
    with pytest.raises(CalibrationError, match='no "text" column, only content, label'):
        open_text("owner/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextNotFoundError, match="pip install"):
        open_text("owner/set")
