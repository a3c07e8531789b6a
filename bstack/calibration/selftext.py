"""Lets the model write its calibration text: no network, no files, and the model's own distribution.

The idea of data-free calibration is that of LLM-QAT (arXiv 2305.17888, section 3.1): sample after a random
token. Where the model has a start token, that comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bstack.errors import of_the_machine
from bstack.memory.free import too_little
from bstack.models.plain import endless
from bstack.models.skeleton import Skeleton, zeros_for_weights
from bstk.errors import ResourceError

__all__ = ["draw", "number_of", "rehearse_writing", "token_steps", "write_windows", "writing_bytes"]

# A window is made of texts of at most so many tokens: short ones side by side are written faster than long ones.
TEXT_LENGTH = 128
# Texts that are written side by side: enough to use the matrix units, few enough for the cache of keys; and the
# texts of the default number of windows fit in one group.
TOGETHER = 136
# Of a probability of 1, where sums are made in whole numbers.
UNITS = 2.0**40
# Windows and tokens of a trial: several texts, and a token from a cache that holds some.
_TRIAL = (2, 4)
# Arrays of one value for each text and word that exist at the same time.
_PROBABILITIES = 5


def write_windows(
    skeleton: Skeleton, samples: int, length: int, *, seed: int, progress: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Let the model write token windows.

    Parameters
    ----------
    skeleton : Skeleton
        The model; the whole of it is loaded for the length of the call.
    samples, length : int
        How many windows, and how many tokens each.
    seed : int
        Random seed.
    progress : callable
        Called after each token of each group of texts; `token_steps` times.

    Returns
    -------
    torch.Tensor
        int64, shape (samples, length).

    Raises
    ------
    bstk.ResourceError
        The whole model does not fit in the free memory.
    """
    dtype = _dtype(skeleton)
    _check_memory(skeleton, dtype)
    return _write(skeleton, dtype, samples, length, seed, progress)


def rehearse_writing(skeleton: Skeleton) -> None:
    """Let the model write a few tokens, without a look at the memory."""
    _write(skeleton, _dtype(skeleton), *_TRIAL)


def _write(
    skeleton: Skeleton,
    dtype: torch.dtype,
    samples: int,
    length: int,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    texts, text_length = _shape(samples, length)
    with skeleton.loaded(skeleton.model.state_dict(), dtype), torch.no_grad():
        groups = [
            _write_group(skeleton, min(TOGETHER, texts - start), text_length, generator, progress)
            for start in range(0, texts, TOGETHER)
        ]
    return torch.cat(groups).reshape(samples, -1)[:, :length].cpu().contiguous()


def writing_bytes(skeleton: Skeleton, samples: int, length: int) -> int:
    """Return about how many bytes of memory `write_windows` takes: the model, the cache, and the words' probabilities."""
    texts, text_length = _shape(samples, length)
    texts = min(texts, TOGETHER)
    config = skeleton.model.config.get_text_config()
    width = skeleton.parameter(skeleton.input_name).shape[1]
    heads = number_of(config, "num_attention_heads") or 1
    keys = (number_of(config, "num_key_value_heads") or heads) * (number_of(config, "head_dim") or width // heads)
    kept = sum(p.numel() for p in skeleton.model.parameters()) + 2 * texts * text_length * keys * len(skeleton.layers)
    itemsize = 2 if _multiplies_bfloat16(skeleton.device) else 4
    return itemsize * kept + 4 * _PROBABILITIES * texts * config.vocab_size


def number_of(config: Any, name: str) -> int | None:
    """Return a number of a configuration, if it has one."""
    # getattr raises for what the layers may have of their own
    found = vars(config)[name] if name in vars(config) else getattr(config, name, None)
    return found if isinstance(found, int) else None


def token_steps(samples: int, length: int) -> int:
    """Return how many times `write_windows` calls `progress`."""
    texts, text_length = _shape(samples, length)
    return -(-texts // TOGETHER) * (text_length - 1)


def _shape(samples: int, length: int) -> tuple[int, int]:
    """Return the number of texts, and of tokens in each, that make up some windows."""
    pieces = -(-length // TEXT_LENGTH)
    return samples * pieces, -(-length // pieces)


def _write_group(
    skeleton: Skeleton, count: int, length: int, generator: torch.Generator, progress: Callable[[], None]
) -> torch.Tensor:
    from transformers import LogitsProcessor, LogitsProcessorList

    from bstack.models.kv_cache import cache_argument, growing_cache

    start, ends = _special_tokens(skeleton.model)
    vocabulary = skeleton.model.config.get_text_config().vocab_size

    def random_words() -> torch.Tensor:
        return torch.randint(0, vocabulary, (count, 1), generator=generator).to(skeleton.device)

    class Draw(LogitsProcessor):
        """Leave one token possible, drawn with one random number per sequence.

        `generate` would draw a random number for every word of the vocabulary, which takes a third of the model's time.
        After the end of a text another one begins; the model alone would repeat the end.
        """

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            progress()
            last = input_ids[:, -1:]
            ended = torch.isin(last, last.new_tensor(ends))
            token = torch.where(ended, random_words() if start is None else start, draw(scores, generator))
            if start is not None:
                token = torch.where(last == start, random_words(), token)
            return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    first = random_words() if start is None else torch.full((count, 1), start, device=skeleton.device)
    cache = growing_cache(skeleton.model)
    return skeleton.model.generate(
        first,
        attention_mask=torch.ones_like(first),
        generation_config=endless(skeleton.model, length - 1),  # windows must be full
        logits_processor=LogitsProcessorList([Draw()]),
        **({} if cache is None else {cache_argument(skeleton.model): cache}),
    )


def _special_tokens(model: Any) -> tuple[int | None, list[int]]:
    """Return the token that starts a text, if there is one, and those that end it."""
    configs = (model.config.get_text_config(), model.generation_config)
    found = {
        kind: [
            token
            for config in configs
            for token in _listed(getattr(config, kind, None))
            if 0 <= token < configs[0].vocab_size
        ]
        for kind in ("bos_token_id", "eos_token_id")
    }
    return next(iter(found["bos_token_id"]), None), found["eos_token_id"]


def _listed(tokens: int | list[int] | None) -> list[int]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def _dtype(skeleton: Skeleton) -> torch.dtype:
    """Return bfloat16 where the processor multiplies it, at twice the speed; sampling tolerates the rounding.

    Some models mix tables or decays in float32 with their weights, and stop at that: they write in float32.
    """
    if not _multiplies_bfloat16(skeleton.device):
        return torch.float32
    try:
        with zeros_for_weights(skeleton):
            _write(skeleton, torch.bfloat16, *_TRIAL)
    except Exception as error:  # whatever it is, float32 shows whether it has to do with the type
        if of_the_machine(error):  # float32 takes twice as much
            raise
        return torch.float32
    return torch.bfloat16


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a token from each row's distribution, by inversion.

    Parameters
    ----------
    logits : torch.Tensor
        Floating, shape (sequences, vocabulary).
    generator : torch.Generator

    Returns
    -------
    torch.Tensor
        int64, shape (sequences, 1).
    """
    probabilities = logits.float().softmax(-1)
    drawn = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device)
    if logits.device.type == "cpu":
        heights = probabilities.cumsum(-1)
        # Up to the last height rather than 1, from which rounding makes it differ.
        level = drawn * heights[:, -1:]
    else:  # sums of floats differ from run to run on a GPU
        heights = (probabilities * UNITS).long().cumsum(-1)
        level = (drawn.double() * heights[:, -1:]).long()
    return torch.searchsorted(heights, level, right=True).clamp_max(logits.shape[-1] - 1)


def _check_memory(skeleton: Skeleton, dtype: torch.dtype) -> None:
    if skeleton.device.type != "cpu":
        return  # the plan has looked at the GPU's memory
    needed = dtype.itemsize * sum(p.numel() for p in skeleton.model.parameters())
    if memory := too_little(needed):
        name = str(dtype).removeprefix("torch.")
        raise ResourceError(
            f"To write its own calibration text the whole model must be in memory: {needed / 2**30:.1f} GiB "
            f"as {name}, {memory.free / 2**30:.1f} GiB are free of {memory.source}.",
            hint="Give a calibration text: that streams one layer at a time.",
        )
