"""What both engines say about prompts, written texts and files that other libraries refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bstack.errors import UnsupportedModelError, one_line
from bstk.errors import BstkError, UsageError

__all__ = ["EMPTY_PROMPT", "NO_TEMPLATE", "Message", "Prompt", "Written"]
__all__ += ["check_prompt", "check_room", "messages_of", "understood"]

# A message of a conversation: `role` and `content`, and what else a chat template knows.
Message = dict[str, Any]
# A text, or the messages of a conversation.
Prompt = str | Sequence[Message]

EMPTY_PROMPT = "the prompt is empty. Give at least one token, such as 'Once'."
NO_TEMPLATE = "this model has no chat template. Write the prompt as the model expects it, without the template."


@dataclass(frozen=True)
class Written:
    """A new text without special tokens, and times."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float  # to the first new token
    seconds: float  # for all tokens after the first
    interrupted: bool  # by Ctrl-C

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding; None for fewer than two tokens."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 and self.seconds > 0 else None


def messages_of(prompt: Prompt) -> list[Message]:
    """Return the messages of a prompt; a text is one of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def check_prompt(prompt: Prompt) -> None:
    """Raise UsageError for a prompt that is no UTF-8."""
    try:
        for text in [prompt] if isinstance(prompt, str) else (str(message.get("content")) for message in prompt):
            text.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8 text.", hint="Convert it first.") from None


def check_room(tokens: int, longest: int) -> int:
    """Return how many new tokens fit after a prompt; UsageError if there is room for none."""
    if tokens >= longest:
        raise UsageError(f"the prompt has {tokens} tokens, but the model reads at most {longest}.", hint="Shorten it.")
    return longest - tokens


@contextmanager
def understood(shown: str, what: str) -> Iterator[None]:
    """Turn any error of another library into an UnsupportedModelError that names the file."""
    try:
        yield
    except (BstkError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also panics of the tokenizers library, which are no Exceptions
        raise UnsupportedModelError(f"{shown}: {what}: {one_line(error)}") from None
