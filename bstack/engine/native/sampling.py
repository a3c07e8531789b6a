"""Choose the next token, with the meaning that transformers gives each option, in numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

import bstk
from bstack.engine.native.architecture import NotNativeError, read_json

__all__ = ["Generation", "Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest one, or drawn. The options from `temperature` to `min_p` are for drawing.

    `presence_penalty` lowers the logits of tokens that the new text has, `frequency_penalty` once for each time, and `bias` gives
    what is added to logits, by the token.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """A model's own settings: tokens and strings that end a text, how tokens are chosen, and which of that its files say."""

    ends: frozenset[int]
    stop: tuple[str, ...]
    sampling: Sampling
    said: frozenset[str] = frozenset()

    @classmethod
    def read(cls, file: bstk.Reader) -> Generation:
        """Read generation_config.json, or without it config.json; NotNativeError for a setting that is not known."""
        given = read_json(file, "generation_config.json")
        source = "generation_config.json" if "generation_config.json" in file.files else "config.json"
        ends = read_json(file, source).get("eos_token_id")
        own = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
        for name, value in given.items():
            if name not in _SAMPLING | _ELSEWHERE and value not in (None, False, _NEUTRAL.get(name)):
                raise NotNativeError(f"generation_config.json sets {name}")
        stop = given.get("stop_strings") or []
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(value, str) for value in stop):
            raise NotNativeError("its stop_strings are none")
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in ends):
            raise NotNativeError("its eos_token_id is none")
        for name, value in own.items():
            if (
                not isinstance(value, (int, float))
                or value < 0
                or (not value and name in ("temperature", "repetition_penalty"))
            ):
                raise NotNativeError(f"generation_config.json sets {name} to {value!r}")
        return cls(frozenset(ends), tuple(stop), replace(Sampling(), **own), frozenset(own))


_SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
# Read elsewhere, or without a meaning for one text of a given length.
_ELSEWHERE = {
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bos_token_id",
    "early_stopping",
    "eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "pad_token_id",
    "stop_strings",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
}
# Values that change nothing.
_NEUTRAL = {
    "cache_implementation": "hybrid",
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
}


class Sampler:
    """Chooses the tokens of one text; the same seed gives the same choices.

    Parameters
    ----------
    sampling : Sampling
    vocabulary : int
        Number of logits.
    prompt : iterable of int
        Tokens that occurred, for the penalty.
    seed : int
    """

    def __init__(self, sampling: Sampling, vocabulary: int, prompt: Iterable[int] = (), seed: int = 0):
        self._sampling = sampling
        self._random = np.random.default_rng(seed) if sampling.do_sample else None  # takes time to import
        self._occurred = np.zeros(vocabulary, bool)
        self._occurred[[token for token in prompt if token < vocabulary]] = True
        self._written: Counter[int] = Counter()

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token of a text with these logits, float32, shape (vocabulary,)."""
        logits = self._penalised(logits)
        if self._random is not None:
            tokens, chances = candidates(logits, self._sampling)
            sums = np.cumsum(chances)
            at = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
            token = int(tokens[min(at, len(tokens) - 1)])
        else:
            token = int(logits.argmax())
        self._occurred[token] = True
        self._written[token] += 1
        return token

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        own = self._sampling
        penalty = np.float32(own.repetition_penalty)
        if penalty == 1 and not (own.presence_penalty or own.frequency_penalty or own.bias):
            return logits
        found = logits.copy()
        score = found[self._occurred]
        found[self._occurred] = np.where(score < 0, score * penalty, score / penalty)
        for token, count in self._written.items():
            found[token] -= own.presence_penalty + own.frequency_penalty * count
        for token, added in own.bias.items():
            found[token] += added
        return found


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that may be drawn and their probabilities; the options apply in transformers' order."""
    scores = logits / np.float32(sampling.temperature)
    tokens = np.arange(len(scores))
    if sampling.top_k and sampling.top_k < len(scores):
        # Also tokens that are as likely as the last of them.
        tokens = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
    if sampling.top_p is not None and sampling.top_p < 1:
        order = tokens[np.argsort(scores[tokens], kind="stable")]
        dropped = np.cumsum(_softmax(scores[order])) <= 1 - sampling.top_p
        dropped[-1] = False
        tokens = order[~dropped]
    if sampling.min_p is not None:
        chances = _softmax(scores[tokens])
        tokens = tokens[chances >= np.float32(sampling.min_p) * chances.max()]
    return tokens, _softmax(scores[tokens])


def _softmax(scores: np.ndarray) -> np.ndarray:
    chances = np.exp(scores - scores.max())
    return chances / chances.sum()
