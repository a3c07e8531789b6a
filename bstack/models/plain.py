"""Run a model with bstack's own settings: what its files say of generation and outputs is for its users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["endless", "plain_generation", "plain_outputs"]


def plain_outputs(model: Any) -> Callable[[], None]:
    """Let a model's forward pass return logits in an object, whatever else its configuration asks for.

    Fields of the configuration that begin with ``output_`` add attentions, hidden states or losses of routers;
    ``return_dict`` false turns the object into a tuple. Returns a function that gives the configurations back what they had.
    """
    from transformers import PreTrainedConfig

    before: list[tuple[Any, str, Any]] = []
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    for config in configs.values():
        if not isinstance(config, PreTrainedConfig):
            continue
        names = [name for name in vars(config) if name.lstrip("_").startswith("output_")]
        before += [(config, name, value) for name in names if isinstance(value := getattr(config, name), bool)]
        before.append((config, "return_dict", config.return_dict))
    for config, name, _ in before:
        setattr(config, name, name == "return_dict")

    def restore() -> None:
        for config, name, value in before:
            setattr(config, name, value)

    return restore


def plain_generation(model: Any) -> None:
    """Give a model generation settings that hold its start and end tokens alone.

    A field that is None in the settings given to ``generate`` is taken from those of the model.
    """
    from transformers import GenerationConfig

    given = model.generation_config
    model.generation_config = GenerationConfig(bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id)


def endless(model: Any, new_tokens: int) -> Any:
    """Return generation settings for exactly so many likeliest tokens: the end token is one that does not exist."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        use_cache=True,
        eos_token_id=model.config.get_text_config().vocab_size,
        pad_token_id=0,
    )
