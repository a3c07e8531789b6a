"""What a model of billions of weights takes of the address space before any weight is read: limits on it count what is not used, too."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import re
from types import SimpleNamespace

from bstack.models.skeleton import _build
from transformers import LlamaConfig, LlamaForCausalLM


def megabytes():
    return int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024


widths = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
config, before = LlamaConfig(num_hidden_layers=32, **widths), megabytes()
model = _build(SimpleNamespace(config=config, name="large", code=None))
print(megabytes() - before, sum(parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the address space from")
def test_building_a_model_leaves_no_hollow_heap():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, weights = map(int, done.stdout.split())
    assert weights > 7e9
    assert grown < 200  # MB; it was 1008
