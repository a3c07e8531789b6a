"""The keys of a GGUF file's tokenizer that transformers' reader leaves out or takes for others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from bstack.errors import ModelWarning, UnsupportedModelError

__all__ = ["complete"]

TEMPLATE = "tokenizer.chat_template"
# How text is split before merges apply, by the value of tokenizer.ggml.pre: as GPT-2, or as that after digits were set apart.
_GPT2 = {"gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "granite-docling"}
_DIGITS = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
_BLOOM = {"bloom", "poro-chat", "gpt3-finnish"}
# Others that are split as one that transformers knows.
_SAME = {"stablelm2": "qwen2", "hunyuan": "qwen2", "solar-open": "qwen2"}


def complete(tokenizer: Any, fields: Mapping[str, Any], shown: str) -> None:
    """Change a tokenizer that transformers read from a GGUF file, so that it does what the file's keys say.

    `fields` are the values of the keys that begin with ``tokenizer.``, by name. A value that cannot be followed is an
    UnsupportedModelError that names the key.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        _split(tokenizer, fields.get("tokenizer.ggml.pre"), shown)
    prefix = fields.get("tokenizer.ggml.add_space_prefix")
    if kind == "llama" and prefix is not None and prefix != tokenizer.tokenize("a")[0].startswith("\u2581"):
        raise _refusal(shown, "add_space_prefix", prefix)
    named = {key.removeprefix(TEMPLATE + "."): value for key, value in fields.items() if key.startswith(TEMPLATE + ".")}
    if named:
        default = {} if tokenizer.chat_template is None else {"default": tokenizer.chat_template}
        tokenizer.chat_template = {**default, **named}


def _split(tokenizer: Any, pre: Any, shown: str) -> None:
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        return
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre is None or pre == "default":
        warnings.warn(
            f"{shown} does not say how its tokenizer splits text (tokenizer.ggml.pre), so it is split as by GPT-2.",
            ModelWarning,
            stacklevel=5,
        )
        steps: list[Any] = [words]
    elif pre in _GPT2:
        steps = [words]
    elif pre in _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), words]
    elif pre in _BLOOM:
        steps = [
            pre_tokenizers.Split(Regex(r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"), "isolated"),
            letters,
        ]
    elif pre == "falcon":
        threes = pre_tokenizers.Split(Regex("[0-9]{3}"), "isolated")
        steps = [
            pre_tokenizers.Punctuation("contiguous"),
            words,
            pre_tokenizers.Digits(individual_digits=False),
            threes,
        ]
    elif pre in _SAME:
        steps = [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[_SAME[pre]]), "isolated"), letters]
    else:
        raise _refusal(shown, "pre", pre)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _refusal(shown: str, key: str, value: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{shown}: bstack does not read a tokenizer whose tokenizer.ggml.{key} is {value!r}.",
        hint="Give the folder with the tokenizer and the safetensors that the file was made from, or leave the tokenizer out.",
        option="tokenizer",
    )
