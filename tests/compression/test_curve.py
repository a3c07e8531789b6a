"""The quality curve that travels in the file."""

import math
from collections import Counter

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bstack
import bstack.compression.stages as stages
import bstk
from bstack.calibration.texts import HELD_OUT, open_text, token_windows
from bstack.models.names import MatrixName


def test_the_curve_is_that_of_a_plain_computation(tiny_llama, tmp_path):
    """As `bstack bench` counts: every position but the last of each held-out window, which no calibration saw."""
    (tmp_path / "text.txt").write_text(" ".join(f"word {n * 7919 % 1009} of a text" for n in range(2000)))
    settings = bstack.Settings(
        codec="sign", planes=2, samples=4, sequence_length=32, calibration=str(tmp_path / "text.txt")
    )
    bstack.compress(tiny_llama, tmp_path / "model.bstk", settings=settings)
    with bstk.open(tmp_path / "model.bstk") as file:
        curve = file.metadata["quality"]
    text = open_text(str(tmp_path / "text.txt"))
    windows = token_windows(text, AutoTokenizer.from_pretrained(tiny_llama), 4, 32, HELD_OUT)[4:]
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for point in (curve[0], curve[-1]):
        budget = max(point["file_bytes"], point["memory_bytes"])
        model, _ = bstack.load(tmp_path / "model.bstk", mb=f"{budget / bstk.MB:.20f}")
        with torch.no_grad():
            p, q = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (original, model))
        kl = (p.exp() * (p - q)).sum(-1)
        assert point["kld"] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert point["kld_se"] == pytest.approx(float(kl.mean(1).std()) / math.sqrt(HELD_OUT), rel=1e-2)
        assert point["same_top"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-6)
        loss = -q.gather(-1, windows[:, 1:, None]).mean()
        assert point["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_sizes_read_only_what_no_block_replaces(name, tmp_path, monkeypatch):
    """From the checkpoint; the rest of each size comes from the blocks."""
    folder, output = tiny_models.save(name, tmp_path / "model"), tmp_path / "model.bstk"
    reads: list[str] = []
    measure = stages.measure_curve

    def watched(skeleton, *arguments):
        load = skeleton.checkpoint.load

        def noted(model, names):
            reads.extend(names)
            load(model, names)

        monkeypatch.setattr(skeleton.checkpoint, "load", noted)
        return measure(skeleton, *arguments)

    monkeypatch.setattr(stages, "measure_curve", watched)
    bstack.compress(folder, output, settings=bstack.Settings(codec="sign", planes=2, samples=2, sequence_length=16))
    with bstk.open(output) as file:
        replaced = {MatrixName.parse(chunk.name).parameter for chunk in file.chunks if chunk.is_block}
        sizes = len(file.metadata["quality"])
        klds = [point["kld"] for point in file.metadata["quality"]]
    times = Counter(reads)
    assert sizes > 2 and replaced and klds[0] > klds[-1]
    # Once as the original's; the head, which may be the embedding, once more to compare with.
    assert max(times[parameter] for parameter in replaced) <= 3
    assert max(times[parameter] for parameter in replaced if "layers." in parameter or "h." in parameter) == 1
    norms = [name for name in times if "norm" in name or ".ln_" in name]
    assert norms and all(times[name] == 1 + sizes for name in norms)
