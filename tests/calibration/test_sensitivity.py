"""Sensitivities against plain autograd, and against divergences that were measured."""

import pytest
import tiny_models
import torch
from passes import BATCHES, IDS, exact, linears

from bstack.calibration.sensitivity import output_sensitivity


def plain_sensitivity(name, draws, batches):
    """Mean over tokens of squared gradients at every linear's output, and the weight of each token by linear: the whole
    model, float64, one backward pass."""
    model = exact(name)
    outputs, squares, tokens = {}, {}, {}
    sizes = {parameter: power(module) for parameter, module in linears(model).items()}

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
            each = output.grad.square().reshape(-1, output.shape[-1])
            squares[parameter] = squares.get(parameter, 0) + each.sum(0)
            if parameter:
                tokens.setdefault(parameter, []).append(each @ sizes[parameter])
    weights = {parameter: torch.cat(parts) for parameter, parts in tokens.items()}
    count = sum(batch.numel() for batch in batches)
    return {parameter: total / count for parameter, total in squares.items()}, weights


def power(module):
    """Mean square of each row of a linear; those of GPT-2 keep outputs as columns."""
    return module.weight.square().mean(0 if type(module).__name__ == "Conv1D" else 1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "opt-projected", "gpt-neox", "falcon", "olmo2"])
def test_sensitivities_are_those_of_plain_autograd(skeletons, name, tmp_path, monkeypatch):
    draws, original = [], torch.multinomial

    def recording(*arguments, **named):
        draws.append(original(*arguments, **named))
        return draws[-1]

    monkeypatch.setattr(torch, "multinomial", recording)
    monkeypatch.setattr("bstack.calibration.head.LOGITS_TOGETHER", 1000)  # some positions of a batch
    found = output_sensitivity(skeletons(name), BATCHES, seed=1, scratch=tmp_path)
    chosen = torch.cat(draws).split([batch.numel() for batch in BATCHES])
    wanted, weights = plain_sensitivity(name, chosen, BATCHES)
    assert len(draws) > len(BATCHES)
    # Gradients in float32 through the whole model: 1e-3 of the size of the vector.
    for parameter, squares in wanted.items():
        mine = found.outputs[parameter] if parameter else found.embedding
        assert mine.shape == squares.shape
        assert (mine - squares).norm() <= 1e-3 * squares.norm(), parameter
    assert found.tokens.keys() == weights.keys()
    for parameter, expected in weights.items():
        assert (found.tokens[parameter] - expected / expected.mean()).norm() <= 1e-3 * len(expected) ** 0.5, parameter
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
                lambda _m, _i, output: (
                    output + 0.02 * torch.randn(output.shape, generator=generator, dtype=output.dtype)  # noqa: B023
                )
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
