"""The generation settings beside a model's weights: what transformers accepts of them is kept, the rest named in a warning."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

from bstack.errors import ModelWarning, one_line

__all__ = ["GENERATION", "KEPT", "SAMPLING", "read_generation", "refusal"]

GENERATION = "generation_config.json"
# Words of the model that tries settings: more than models have, fewer than a file from a stranger may claim.
_ENOUGH = 2**20
# These must be token ids or lists of them; transformers checks it only when text is written.
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
# Of a model's generation settings these are kept: where a text ends, and what decides its next token.
KEPT: tuple[str, ...] = (
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "stop_strings",
    "min_length",
    "min_new_tokens",
    "max_time",
)
KEPT += ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
KEPT += ("sequence_bias", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id")
KEPT += ("renormalize_logits", "remove_invalid_values", "guidance_scale", "watermarking_config")
# These if tokens are sampled.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Which values others may have depends on these.
_MODE = ("do_sample", "num_beams")


def read_generation(folder: Path, name: str, vocabulary: int) -> dict[str, Any] | None:
    """Return what transformers accepts of a folder's generation settings, with a warning about the rest.

    `name` is the model's, for the warning; `vocabulary` how many token ids it has. Without such a file the settings in config.json count, as
    in transformers. None where there are none either, or the file cannot be read.
    """
    try:
        found = json.loads((folder / GENERATION).read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}, not an object")
    except (FileNotFoundError, NotADirectoryError):
        if (found := _of_the_model(folder)) is None:
            return None
    except (OSError, ValueError, RecursionError) as error:
        _warn(
            name, f"cannot be read and is left out, so config.json decides which tokens end a text: {one_line(error)}"
        )
        return None
    if _problem(found, vocabulary) is None:
        return found
    kept: dict[str, Any] = {}
    for key in sorted(found, key=lambda key: (key not in _TOKENS, key not in _MODE)):
        if (problem := _problem({**kept, key: found[key]}, vocabulary)) is None:
            kept[key] = found[key]
        else:
            ends = [token for token in found[key] if _is_token(token)] if _is_list_of_ends(key, found[key]) else []
            if ends:
                kept[key] = ends
            _warn(name, f"its {key} is {f'cut to {ends}' if ends else 'left out'}, the rest kept: {problem}")
    return kept


def _is_list_of_ends(key: str, value: Any) -> bool:
    return key == "eos_token_id" and isinstance(value, list)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _of_the_model(folder: Path) -> dict[str, Any] | None:
    """Return the generation settings that config.json holds in the absence of a file for them; None without any."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(folder, "config.json", local_files_only=True, _from_model_config=True)
        settings = found.to_diff_dict()
    except Exception:  # no such file, or values that nothing can be made of
        return None
    settings = {key: settings[key] for key in (*KEPT, *SAMPLING, *_MODE) if key in settings}
    return settings if settings.keys() - _TOKENS else None


def _problem(settings: dict[str, Any], vocabulary: int) -> str | None:
    """Return why transformers does not accept settings; None if it does."""
    for key in _TOKENS:
        value = settings.get(key)
        listed = value if _is_list_of_ends(key, value) else [value]
        if value is not None and not (listed and all(map(_is_token, listed))):
            return f"{json.dumps(value)} is no token id"
    stops = settings.get("stop_strings")
    if not all(isinstance(text, str) for text in (stops if isinstance(stops, list) else [stops or ""])):
        return f"{json.dumps(stops)} is no list of texts"
    return refusal(settings, vocabulary)


def refusal(settings: dict[str, Any], vocabulary: int) -> str | None:
    """Return why `generate` of transformers does not take settings; None if it does.

    Many are checked only when text is written, so a model of two numbers writes two tokens with those that bstack keeps.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.utils import logging

    tried = {key: settings[key] for key in (*KEPT, *SAMPLING) if key in settings and key != "stop_strings"}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it logs what it finds odd, here once for each setting
    try:
        GenerationConfig.from_dict(dict(settings))
        if tried.keys() - _TOKENS:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain = {"do_sample": True, "max_new_tokens": 2, "pad_token_id": 0}
                if "min_length" not in tried:  # which would not be looked at then
                    plain["min_new_tokens"] = 2  # some settings count at the last token alone
                ids = torch.zeros(1, 1, dtype=torch.long)
                config = GenerationConfig(**{**plain, **tried})
                _tiny(min(vocabulary, _ENOUGH)).generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=config
                )
        return None
    except MemoryError:
        raise
    except Exception as error:  # values of other types than expected raise anything
        return one_line(error)
    finally:
        logging.set_verbosity(verbosity)


@functools.lru_cache(maxsize=1)
def _tiny(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocabulary, tie_word_embeddings=True)).eval()


def _warn(name: str, problem: str) -> None:
    warnings.warn(f"{name}: {GENERATION}: {problem.rstrip('.')}.", ModelWarning, stacklevel=3)
