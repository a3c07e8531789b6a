"""A part of tests/sweep_architectures.py: one model type of each way in which architectures have gone wrong."""

import copy
import re
from pathlib import Path

import architectures
import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

WORK = """bert camembert deepseek_v4 bigbird_pegasus cpmant gemma4_text git llama4_text mamba minimax mistral mixtral nanochat olmo3 openai-gpt qwen3_5_text xglm xlnet
zamba2""".split()
REFUSED = {"hrm_text": "runs layers more than once", "reformer": "does not run one layer at a time"}
# Their configurations refuse small sizes: experts of layers by number, and a part for another model.
NO_CONFIG = {"dots3_note", "gemma4_assistant"}


@pytest.mark.parametrize("kind", WORK)
def test_it_works(kind, tmp_path):
    found = architectures.try_out(kind, tmp_path)
    assert found.outcome == "works", found


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_before_any_work(kind, tmp_path):
    found = architectures.try_out(kind, tmp_path)
    assert found.outcome == "refused" and REFUSED[kind] in found.detail
    assert not list(tmp_path.glob("out.bstk*")), "no work directory is left"


def test_the_page_says_what_the_tests_say():
    """Which is written by the sweep of all of them."""
    page = (Path(__file__).parents[2] / "docs" / "research" / "architectures.md").read_text("utf-8")
    parts = {part.partition("\n")[0]: set(re.findall(r"`([^` ]+)`", part)) for part in page.split("\n## ")}
    assert parts["Refused"] == set(REFUSED) and set(WORK) <= parts["Works"] and "Fails" not in parts


def test_the_measure_sees_a_lost_window():
    model = architectures.make(architectures.tiny_config("mistral"))
    config = copy.deepcopy(model.config)
    config.sliding_window = None
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict())
    found = architectures.logits(other), architectures.logits(model)
    assert architectures._distance(*found) > 0.5 and architectures._distance(*found, experts=True) > 0.1


def test_every_type_has_a_tiny_configuration():
    for kind in architectures.KINDS:
        if kind not in NO_CONFIG:
            architectures.tiny_config(kind)
