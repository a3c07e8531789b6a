"""The name of a model's argument and output for the cache of keys and values, in the installed transformers."""

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)
