"""Generate text from a prompt, and pass it on piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bstack.engine.chat_template import render
from bstack.engine.container import understood
from bstack.engine.text import EMPTY_PROMPT, NO_TEMPLATE, Written, check_prompt, check_room
from bstack.errors import UnsupportedModelError, one_line
from bstk.errors import BstkError, UsageError

__all__ = ["encode_prompt", "write_text"]


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Return the token ids of a prompt, int64, shape (1, tokens); with `chat`, as a user's message in the chat template."""
    check_prompt(prompt)
    if chat:
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

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int):
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

    torch.manual_seed(seed)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if model.generation_config.pad_token_id is None:
        options.setdefault("pad_token_id", _pad_token(model))
    interrupted = False
    try:
        with torch.no_grad():
            # The tokenizer is for stop strings, which a model's own settings may ask for.
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, tokenizer=tokenizer, **options)
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    except (BstkError, MemoryError, OSError):
        raise
    except Exception as error:  # such as token ids beyond the vocabulary: files that do not fit each other
        if isinstance(error, ValueError) and not times:
            raise UsageError(f"transformers refuses these options: {one_line(error)}") from None
        raise UnsupportedModelError(
            f"the model cannot be run as its files say: {type(error).__name__}: {one_line(error)}"
        ) from error
    new = max(0, len(times) - 1)
    return Written(
        "".join(pieces),
        ids.shape[1],
        new,
        times[1] - times[0] if new else 0.0,
        times[-1] - times[1] if new else 0.0,
        interrupted,
    )


def _pad_token(model: Any) -> int:
    """Return any token: a single sequence has no padding, but without the setting transformers warns at every call."""
    end = model.generation_config.eos_token_id
    return end[0] if isinstance(end, list) and end else end if isinstance(end, int) else 0
