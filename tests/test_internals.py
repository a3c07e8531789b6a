"""What rests on internals of other libraries, listed here alone.

A new version of a library may change these without notice. The first test fails if the code uses one that is not listed, the
second if an installed version lacks one or takes other arguments.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "torch", "huggingface_hub", "safetensors", "click", "tokenizers")

# Modules below the top of a library that its documentation does not promise: {module: {name: arguments that we give}}.
INTERNALS = {
    "transformers.cache_utils": {
        "DynamicCache": ("config",),
        "DynamicLayer": (),
        "DynamicLayer.lazy_initialization": ("key_states", "value_states"),
        "DynamicLayer.update": ("key_states", "value_states"),
        "DynamicSlidingWindowLayer": ("sliding_window",),
    },
    "transformers.conversion_mapping": {"get_model_conversion_mapping": ("model",)},
    "transformers.core_model_loading": {
        "Concatenate": (),
        "MergeModulelist": (),
        "WeightConverter": (),
        "WeightRenaming": (),
        "convert_and_load_state_dict_in_model": ("model", "state_dict", "load_config"),
        "rename_source_key": ("source_key", "weight_renamings", "weight_converters"),
        "revert_weight_conversion": ("model", "state_dict"),
    },
    "transformers.dynamic_module_utils": {"get_relative_import_files": ("module_file",)},
    "transformers.generation.streamers": {"BaseStreamer": ()},
    "transformers.generation.utils": {"GenerationMixin._supports_default_dynamic_cache": ()},
    "transformers.integrations.gguf.gguf_tokenizer_mapping": {"GGUF_PRE_TOKENIZER_SPLITS": ()},
    "transformers.modeling_gguf_pytorch_utils": {
        "TENSOR_PROCESSORS": (),
        "TensorProcessor": ("config",),
        "get_gguf_hf_weights_map": ("hf_model", "processor"),
    },
    "transformers.modeling_outputs": {"CausalLMOutputWithPast": ("logits",)},
    "transformers.modeling_utils": {
        "LoadStateDictConfig": (),
        "PreTrainedModel._adjust_missing_and_unexpected_keys": (),
        "PreTrainedModel._keys_to_ignore_on_save": (),
    },
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": ()},
    "transformers.models.auto.modeling_auto": {"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ()},
    "transformers.quantizers.auto": {"register_quantization_config": ("method",), "register_quantizer": ("name",)},
    "transformers.quantizers.base": {"HfQuantizer": ()},
    "transformers.utils.quantization_config": {"QuantizationConfigMixin": ("quant_method",)},
    "transformers.utils": {"CHAT_TEMPLATE_DIR": ()},
    "torch": {"Tensor._make_wrapper_subclass": (), "_C.DisableTorchFunctionSubclass": (), "_C": ()},
    "torch.nn.modules.module": {
        "_global_forward_hooks": (),
        "_global_forward_pre_hooks": (),
        "register_module_parameter_registration_hook": ("hook",),
        "Module._buffers": None,  # set by __init__
        "Module._forward_hooks": None,
        "Module._forward_pre_hooks": None,
        "Module._parameters": None,
    },
}
# Modules below the top of a library that its documentation names.
PUBLIC = {
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "safetensors.torch",
    "torch.nn",
    "torch.nn.attention",
    "torch.overrides",
    "transformers.utils.logging",
}


def used():
    """Names of libraries' modules that the code imports, and private attributes that it reads, with their places."""
    for path in sorted((ROOT / "bstack").rglob("*.py")):
        place = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
                for alias in node.names:
                    if "." in node.module and not {node.module, f"{node.module}.{alias.name}"} & PUBLIC:
                        yield f"{node.module}:{alias.name}", place
            elif (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and not (isinstance(node.value, ast.Name) and node.value.id == "self")
            ):
                yield node.attr, place


def own_names():
    """Private attributes that the code itself sets or defines."""
    names = {"_asdict", "_replace", "_fields", "_make"}  # of named tuples, documented
    for path in (ROOT / "bstack").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_every_internal_that_the_code_uses_is_listed():
    imported = {f"{module}:{name}" for module, names in INTERNALS.items() for name in names}
    attributes = {name.rpartition(".")[2] for names in INTERNALS.values() for name in names}
    known = imported | attributes | own_names()
    assert [found for found in used() if found[0] not in known] == []


def test_every_internal_that_is_listed_is_used():
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "bstack").rglob("*.py"))
    words = set(re.findall(r"\w+", code))
    assert [name for names in INTERNALS.values() for name in names if name.rpartition(".")[2] not in words] == []


@pytest.mark.parametrize("name", [f"{module}:{name}" for module, names in INTERNALS.items() for name in names])
def test_the_installed_versions_have_what_is_listed(name):
    module, _, path = name.partition(":")
    arguments = INTERNALS[module][path]
    found = importlib.import_module(module)
    if arguments is None:
        owner, _, path = path.rpartition(".")
        found = getattr(found, owner)()
        arguments = ()
    for part in path.split("."):
        found = getattr(found, part)
    if arguments:
        parameters = inspect.signature(found).parameters
        assert set(arguments) <= set(parameters), f"{name} takes {list(parameters)}"
