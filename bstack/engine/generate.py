"""Generate text from a prompt, and pass it on piece by piece."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bstack.engine.chat_template import render
from bstack.engine.text import EMPTY_PROMPT, NO_TEMPLATE, Prompt, Written, check_prompt, check_room, understood
from bstack.errors import ModelWarning, UnsupportedModelError, of_the_machine, one_line
from bstack.models.generation import KEPT, SAMPLING, refusal
from bstack.models.plain import plain_outputs
from bstack.models.skeleton import longest_text
from bstack.models.tokenizer import check_ids
from bstack.packed.backends import on_device
from bstk.errors import BstkError, UsageError

__all__ = ["decoding", "encode_prompt", "write_text"]

# These ask for another way of decoding, unless they are false, 0 or the number 1.
_MODES: tuple[str, ...] = (
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "use_mtp",
)
_MODES += ("force_words_ids", "prompt_lookup_num_tokens", "assistant_early_exit", "token_healing")


def encode_prompt(tokenizer: Any, prompt: Prompt, chat: bool) -> torch.Tensor:
    """Return the token ids of a prompt, int64, shape (1, tokens); with `chat`, as a user's message in the chat template.

    Messages of a conversation are always put into the template.
    """
    check_prompt(prompt)
    if chat or not isinstance(prompt, str):
        chat = True
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(NO_TEMPLATE)
        text = render(tokenizer, prompt)
    else:
        text = prompt
    with understood("the model", "its tokenizer cannot read the prompt"):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if ids.numel() == 0:
        raise UsageError(EMPTY_PROMPT)
    return ids.long()


@contextmanager
def decoding(model: Any, settings: Any) -> Iterator[None]:
    """Have `generate` use these settings alone: what they leave open it takes from the model's own otherwise."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _settings(model: Any, options: dict[str, Any]) -> Any:
    """Return the settings for one text, token by token, with a warning about other ways of decoding that the model's files ask for."""
    from transformers import GenerationConfig

    own = model.generation_config
    asked = {name: getattr(own, name, None) for name in _MODES}
    if modes := [
        name for name, value in asked.items() if value not in (None, 0) and not (value == 1 and name.startswith("num_"))
    ]:
        warnings.warn(
            f"the model's generation settings ask for another way of decoding ({', '.join(modes)}). That is left out: the "
            "text is written token by token.",
            ModelWarning,
            stacklevel=3,
        )
    names = (*KEPT, *SAMPLING) if options.get("do_sample") else KEPT
    kept = {name: value for name in names if (value := getattr(own, name, None)) is not None}
    # A single sequence has no padding, but without the setting transformers warns at every call.
    end = kept.get("eos_token_id")
    kept.setdefault("pad_token_id", end[0] if isinstance(end, list) and end else end if isinstance(end, int) else 0)
    return GenerationConfig(**{**kept, **options})


def write_text(
    model: Any, tokenizer: Any, ids: torch.Tensor, write: Callable[[str], None], *, seed: int = 0, **options: Any
) -> Written:
    """Generate text, and pass on each piece as soon as it is certain.

    Parameters
    ----------
    model, tokenizer
        From `bstack.load`.
    ids : torch.Tensor
        The prompt, from `encode_prompt`.
    write : callable
        Receives each piece of new text. Ctrl-C ends the text, not the program.
    seed : int
        Random seed of sampling.
    options
        Arguments of transformers' ``generate``.

    Raises
    ------
    bstk.UsageError
        transformers refuses the value of an option, or the prompt is longer than the model reads.
    bstack.errors.UnsupportedModelError
        transformers cannot run the model as its files say.
    """
    from transformers import TextStreamer

    longest = longest_text(model.config)
    if longest is not None:
        options["max_new_tokens"] = min(options.get("max_new_tokens", longest), check_room(ids.shape[1], longest))
    pieces: list[str] = []
    times: list[float] = []

    class Streamer(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            times.append(time.monotonic())  # the first call is for the prompt
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            write(text)

    check_ids(ids, model.get_input_embeddings().weight.shape[0], tokenizer, "the prompt")
    restore = plain_outputs(model)  # only the text is asked for
    torch.manual_seed(seed)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    interrupted = False
    try:
        settings = _settings(model, options)
        # Stop strings, which a model's own settings may ask for, are compared with the tokenizer's words.
        words = {} if settings.stop_strings is None else {"tokenizer": tokenizer}
        ids = ids.to(model.device)
        with torch.no_grad(), decoding(model, settings), on_device(model.device):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer, **words
            )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    except BstkError:
        raise
    except Exception as error:  # such as token ids beyond the vocabulary: files that do not fit each other
        if of_the_machine(error):
            raise
        if (problem := refusal(options, model.config.get_text_config().vocab_size)) is not None:
            raise UsageError(f"transformers refuses these options: {problem}") from None
        raise UnsupportedModelError(
            f"the model cannot be run as its files say: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        restore()
    new = max(0, len(times) - 1)
    return Written(
        "".join(pieces),
        ids.shape[1],
        new,
        times[1] - times[0] if new else 0.0,
        times[-1] - times[1] if new else 0.0,
        interrupted,
    )
