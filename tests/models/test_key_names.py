"""Names of tensors in checkpoints: bstack matches them with parameters as transformers does, whatever it renames and fuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bstack.models.safetensors import SafetensorsCheckpoint, _Header
from bstack.models.skeleton import parameters_on_meta

pytestmark = pytest.mark.slow

# All for which transformers has a table.
KINDS = sorted(
    kind
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if get_checkpoint_conversion_mapping(kind) or get_checkpoint_conversion_mapping(str(name))
)
# Those of which transformers' own default settings make no model.
NO_DEFAULT = {"dots1", "gemma3n_text", "hunyuan_v1_moe", "lfm2_moe"}


def build(kind):
    try:
        config = AutoConfig.for_model(kind, num_hidden_layers=2)
        with parameters_on_meta(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        if kind in NO_DEFAULT:
            pytest.skip(f"its default settings make no model: {error}")
        raise


@pytest.mark.parametrize("kind", KINDS)
def test_names_on_disk_and_names_of_the_model(kind):
    model = build(kind)
    expected = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    for tensors in (revert_weight_conversion(model, dict(state)), state):
        checkpoint = object.__new__(SafetensorsCheckpoint)
        checkpoint.name = kind
        checkpoint._headers = {name: _Header(None, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        assert checkpoint._matched(model).keys() == expected


def test_the_tables_are_there():
    assert {"mixtral", "deepseek_v3"} <= set(KINDS) and len(KINDS) > 20
