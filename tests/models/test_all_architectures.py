"""A part of tests/sweep_architectures.py: one model type of each way in which architectures have gone wrong."""

import architectures
import pytest

pytestmark = pytest.mark.slow

WORK = """bert camembert bigbird_pegasus cpmant git llama4_text mamba minimax nanochat olmo3 openai-gpt qwen3_5_text xglm xlnet
zamba2""".split()
REFUSED = {"hrm_text": "runs layers more than once", "reformer": "does not run one layer at a time"}


@pytest.mark.parametrize("kind", WORK)
def test_it_works(kind, tmp_path):
    found = architectures.try_out(kind, tmp_path)
    assert found.outcome == "works", found


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_before_any_work(kind, tmp_path):
    found = architectures.try_out(kind, tmp_path)
    assert found.outcome == "refused" and REFUSED[kind] in found.detail
    assert not list(tmp_path.glob("out.bstk*")), "no work directory is left"


def test_every_type_has_a_tiny_configuration():
    made = []
    for kind in architectures.KINDS:
        try:
            made.append(architectures.tiny_config(kind))
        except Exception:  # a few have no default configuration
            continue
    assert len(made) >= 0.95 * len(architectures.KINDS)
