"""Write text from a prompt with the native engine, and pass it on piece by piece."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import bstk
from bstack.engine.native.architecture import NotNativeError, read_json
from bstack.engine.native.model import NativeModel
from bstack.engine.native.sampling import Sampler
from bstack.engine.native.sequence import Sequence as Text
from bstack.engine.text import (
    EMPTY_PROMPT,
    NO_TEMPLATE,
    Prompt,
    Written,
    check_prompt,
    check_room,
    messages_of,
    understood,
)
from bstack.errors import UnsupportedModelError, one_line
from bstack.models.tokenizer import check_ids, tokenizer_files
from bstk.errors import UsageError

__all__ = ["Pieces", "TextTokenizer", "encode_prompt", "write_text"]


class TextTokenizer:
    """A model's tokenizer.json, its special tokens and its chat template (None: it has none)."""

    def __init__(self, raw: bytes, config: Mapping[str, Any], template: str | None):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_buffer(raw)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Special tokens in a text are then words like others.
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        is_cleaned = type(self._tokenizer.model).__name__ != "BPE" or config.get(_CLEANED_BPE)
        if config.get("clean_up_tokenization_spaces") and is_cleaned:
            raise NotNativeError("its tokenizer removes spaces from what is written")
        self.chat_template = template
        # Names for templates: those of all tokenizers, and those that only this one has.
        named = {name: token for name, token in config.items() if name.endswith("_token")}
        if isinstance(own := config.get("model_specific_special_tokens"), dict):
            named |= own
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in added.items()}
        #: Special tokens, which `decode` leaves out, by their text.
        self.marks = {token.content: number for number, token in added.items() if token.special}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
        self.special_tokens = {name: token for name, token in texts.items() if isinstance(token, str)}

    @classmethod
    def read(cls, file: bstk.Reader) -> TextTokenizer | None:
        """Read the tokenizer of a file; None if it has none, NotNativeError for one of another kind."""
        config = read_json(file, "tokenizer_config.json")
        if not tokenizer_files(file.files):
            return None
        if "tokenizer.json" not in file.files:
            raise NotNativeError("its tokenizer is not a tokenizer.json")
        # Of files that transformers 5 did not save it may change what tokenizer.json says.
        if "auto_map" in config or config.get("backend") != "tokenizers":
            raise NotNativeError("its tokenizer is code, or not as transformers 5 saves it")
        added = config.get("added_tokens_decoder", {})
        if not isinstance(config.get("tokenizer_class", ""), str) or not all(
            isinstance(value, dict) for value in (added, *getattr(added, "values", list)())
        ):
            raise NotNativeError("its tokenizer_config.json is unusual")
        templates = config.get("chat_template")
        if isinstance(templates, list):
            templates = {entry["name"]: entry["template"] for entry in templates}
        if isinstance(templates, dict):
            templates = templates.get("default")
        if "chat_template.jinja" in file.files:
            templates = file.file("chat_template.jinja").decode(errors="replace")
        with understood(file.source.name, "its tokenizer.json cannot be read"):
            return cls(file.file("tokenizer.json"), config, templates)

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text, with `special` those that the tokenizer puts around it."""
        with understood("the model", "its tokenizer cannot read the prompt"):
            return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], special: bool = False, kept: Collection[int] = ()) -> str:
        """Return the text of tokens, with `special` that of special ones, or only of those in `kept`."""
        if kept and not special:
            dropped = set(self.marks.values()).difference(kept)
            ids, special = [token for token in ids if token not in dropped], True
        return self._tokenizer.decode(ids, skip_special_tokens=not special)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for; those of several may make one letter."""
        name, decoder = self._tokenizer.id_to_token(token) or "", self._tokenizer.decoder
        kind = b"" if decoder is None else decoder.__getstate__()
        if token in self._added:
            return self._added[token].encode()
        if b'"ByteLevel"' in kind:
            return bytes(_BYTES[letter] for letter in name if letter in _BYTES)
        if b'"ByteFallback"' in kind and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes.fromhex(name[3:5])
        return (name.replace("\u2581", " ") if "\u2581" in kind.decode() else self.decode([token])).encode()

    def json(self) -> str:
        """Return the tokenizer as the text of a tokenizer.json."""
        return self._tokenizer.to_str()

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """Return a token by its id, as the method of transformers' tokenizers."""
        return self._tokenizer.id_to_token(token)


# How byte-level tokenizers write bytes: printable ones as themselves, the others from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)).difference(_PRINTABLE)))}
_CLEANED_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def encode_prompt(
    tokenizer: TextTokenizer,
    prompt: Prompt,
    chat: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of a prompt; with `chat`, as a user's message in the chat template.

    Messages of a conversation are always put into the template, which is given `tools` and its own `options`, too.
    """
    check_prompt(prompt)
    if chat := chat or not isinstance(prompt, str):
        if not tokenizer.chat_template:
            raise UsageError(NO_TEMPLATE)
        from bstack.engine.chat_template import render_messages  # jinja2 takes time to import

        prompt = render_messages(
            tokenizer.chat_template, messages_of(prompt), tokenizer.special_tokens, tools=tools, options=options or {}
        )
    ids = tokenizer.encode(str(prompt), special=not chat)
    if not ids:
        raise UsageError(EMPTY_PROMPT)
    return ids


# Tokens that may wait for the rest of a letter; a letter has at most 4 bytes.
HELD = 8


class Pieces:
    """The text of tokens as they come, in pieces that no later token changes; special tokens only if they are `kept`."""

    def __init__(self, tokenizer: TextTokenizer, kept: Collection[int] = ()):
        self._tokenizer, self._kept = tokenizer, kept
        self._ids: list[int] = []
        self._start, self._done = 0, 0  # tokens that are decoded for their effect on the next, and those passed on

    def add(self, token: int) -> str:
        """Take the next token; return the text that is certain now."""
        self._ids.append(token)
        return self._next(last=False)

    def rest(self) -> str:
        """Return what was held back, such as the beginning of a letter of several tokens."""
        return self._next(last=True)

    def _next(self, last: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._done], kept=self._kept)
        text = self._tokenizer.decode(self._ids[self._start :], kept=self._kept)
        if not last and text.endswith("\ufffd") and len(self._ids) - self._done < HELD:
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(before) :]


def write_text(
    model: NativeModel,
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    write: Callable[[str], None],
    *,
    max_new_tokens: int,
    seed: int = 0,
    stop: Sequence[str] = (),
    text: Text | None = None,
    **options: Any,
) -> Written:
    """Write text after a prompt, and pass on each piece as soon as it is certain.

    Parameters
    ----------
    model, tokenizer
        From `bstack.engine.native.load.load`.
    ids : sequence of int
        The prompt, from `encode_prompt`.
    write : callable
        Receives each piece of new text. Ctrl-C ends the text, not the program.
    max_new_tokens, seed : int
    stop : sequence of str
        Strings that end the text, which then ends with one of them, beside those of the model.
    text : Sequence, optional
        Of an earlier call: what begins both its tokens and `ids` is not read again.
    options
        Fields of `bstack.engine.native.sampling.Sampling` that differ from the model's own.

    Raises
    ------
    bstk.UsageError
        The prompt is longer than the model reads.
    bstack.errors.UnsupportedModelError
        The tokenizer has tokens that the model has not.
    """
    limit = min(max_new_tokens, check_room(len(ids), model.architecture.context))
    check_ids(np.array(ids), model.architecture.vocabulary, tokenizer, "the prompt")
    sampler = Sampler(replace(model.generation.sampling, **options), model.architecture.vocabulary, ids, seed)
    stops = (*model.generation.stop, *stop)
    tail = max((len(text.encode()) for text in stops), default=0) + 8  # tokens that may hold one
    pieces, text = Pieces(tokenizer), text or model.sequence()
    known = text.keep(ids)
    new: list[int] = []
    times = [time.monotonic()]
    parts: list[str] = []

    def emit(piece: str) -> None:
        if piece:
            parts.append(piece)
            write(piece)

    interrupted = False
    try:
        logits = model.read(text, ids[known:])
        while True:
            new.append(sampler.choose(logits))
            times.append(time.monotonic())
            emit(pieces.add(new[-1]))
            if new[-1] in model.generation.ends or len(new) == limit:
                break
            if stops and any(stop in tokenizer.decode(new[-tail:], special=True) for stop in stops):
                break
            logits = model.step([text], new[-1:])[0]
    except KeyboardInterrupt:
        interrupted = True
    except ValueError as error:
        raise UnsupportedModelError(f"the model cannot be run as its files say: {one_line(error)}") from error
    emit(pieces.rest())
    first = times[min(1, len(new))]
    return Written("".join(parts), len(ids), len(new), first - times[0], times[-1] - first, interrupted)
