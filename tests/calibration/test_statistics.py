"""Statistics of the streamed pass against plain hooks and the experts' own equations."""

import pytest
import torch
from passes import IDS, exact, linears, streamed_tables

from bstack.calibration.statistics import InputStatistics

# Plain ones, Conv1D, fused projections, experts, shared rotary tables, layers of two kinds of attention.
SOME = [
    "llama",
    "qwen3",
    "gemma3",
    "phi3",
    "gpt2",
    "opt-projected",
    "gpt-neox",
    "falcon",
    "stablelm",
    "mixtral",
    "gpt-oss",
]


def hooked_hessians(name):
    """X^T X and rows of every linear's input: ordinary model, one forward pass, float64."""
    model = exact(name)
    hessians = {}

    def hook(parameter):
        def note(_module, inputs, _output):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            hessian, count = hessians.get(parameter, (0, 0))
            hessians[parameter] = hessian + rows.t() @ rows, count + rows.shape[0]

        return note

    for parameter, module in linears(model).items():
        module.register_forward_hook(hook(parameter))
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
    return hessians, hidden


@pytest.mark.parametrize("name", SOME)
def test_hessians_are_those_of_a_plain_forward_pass(skeletons, name):
    tables, results = streamed_tables(skeletons(name))
    wanted, hidden = hooked_hessians(name)
    found = {n: table.statistics(n) for table in tables for n in table.operands}
    assert wanted.keys() <= found.keys()
    # Float32 sums of 96 products against float64; the passes before add their own rounding: 1e-4 of the hessian's size.
    # With experts a token at the border may be sent elsewhere: then whole rows would differ, but these seeds have none.
    for parameter, (hessian, rows) in wanted.items():
        assert found[parameter].tokens == rows == IDS.numel()
        assert (found[parameter].hessian - hessian).norm() <= 1e-4 * hessian.norm(), parameter
    last = torch.cat(list(results))
    assert (last - hidden).norm() <= 1e-5 * hidden.norm()


@pytest.mark.parametrize(("name", "leaf"), [("mixtral", "gate_up_proj"), ("gpt-oss", "down_proj")])
def test_hessians_of_experts(skeletons, name, leaf):
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
        assert (statistics.hessian - rows.t() @ rows).norm() <= 1e-4 * (rows.t() @ rows).norm()


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
            assert a.tokens == b.tokens and (a.hessian - b.hessian).norm() <= 1e-4 * a.hessian.norm()


@pytest.mark.parametrize("width", [1, 383, 384, 385, 1000])
def test_hessians_of_any_width(width):
    rows = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(width))
    statistics = InputStatistics(width)
    for _ in range(2):  # reading must not disturb what is added later
        statistics.add(rows)
        flat = rows.reshape(-1, width).double()
        expected = statistics.tokens // 21 * flat.t() @ flat
        assert (statistics.hessian - expected).norm() <= 1e-5 * expected.norm()
