"""Our own runs state their own settings: nothing in a model's files changes them."""

import json
import shutil

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from bstack.calibration.selftext import write_windows
from bstack.models.plain import endless, plain_generation, plain_outputs
from bstack.models.safetensors import SafetensorsCheckpoint
from bstack.models.skeleton import Skeleton
from bstk.errors import BstkError

# Words that belong to the model: its start and end, of which its texts are made.
TOKENS = {"bos_token_id", "eos_token_id"}
FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in TOKENS)
VALUES = [3, 0.5, "static", ["x"]]
# They take only objects of their own.
OBJECTS = {"compile_config", "watermarking_config"}
# Booleans of a configuration that say what the model is, with what comes of the other value.
ARCHITECTURE = {"post_init_done", "is_encoder_decoder", "tie_word_embeddings", "attention_bias", "mlp_bias"}
FLAGS = sorted(
    name.removeprefix("_")
    for name, value in vars(LlamaConfig(**tiny_models.ARCHITECTURES["llama"][1])).items()
    if isinstance(value, bool) and name.removeprefix("_") not in ARCHITECTURE
)
IDS = torch.tensor([[5, 9, 44]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def expected(folder):
    return write_windows(Skeleton(SafetensorsCheckpoint(folder)), 2, 6, seed=0)


def with_config(folder, target, **changes):
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FIELDS, *FLAGS}))
def test_a_setting_in_the_configuration_changes_no_text(name, folder, expected, tmp_path):
    """Or the model is refused, as for a value that is none for this setting."""
    tried = 0
    for value in [True, False] if name in FLAGS else VALUES:
        try:
            skeleton = Skeleton(SafetensorsCheckpoint(with_config(folder, tmp_path / "model", **{name: value})))
        except BstkError as error:
            assert "model" in str(error)
            continue
        assert torch.equal(write_windows(skeleton, 2, 6, seed=0), expected), (name, value)
        tried += 1
    assert tried or name in OBJECTS


@pytest.mark.parametrize("value", [True, False, *VALUES, [[5, 6]], {"a": 1}], ids=str)
def test_generation_settings_of_a_model_are_set_aside(value):
    model = tiny_models.make("llama")
    plain = model.generate(IDS, generation_config=endless(model, 3))
    for name in FIELDS:
        setattr(model.generation_config, name, value)
        plain_generation(model)
        assert torch.equal(model.generate(IDS, generation_config=endless(model, 3)), plain)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("name", FLAGS)
def test_logits_come_in_an_object_whatever_the_configuration_says(name):
    model = tiny_models.make("mixtral")
    config = model.config
    before = model(IDS).logits
    setattr(config, name, not getattr(config, name)) if name != "output_attentions" else vars(config).update(
        _output_attentions=True
    )
    config.output_router_logits = True
    plain_outputs(model)
    out = model(input_ids=IDS, use_cache=False)
    assert torch.equal(out.logits, before) and set(out) == {"logits"}


def test_the_file_keeps_the_settings(folder, tmp_path):
    """What is set aside is set aside in our runs, not in the model."""
    checkpoint = SafetensorsCheckpoint(with_config(folder, tmp_path / "model", output_hidden_states=True))
    Skeleton(checkpoint)
    assert checkpoint.config.output_hidden_states
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.output_hidden_states
