"""A text that the native engine reads and writes: keys and values of its tokens, in pages that texts share."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from bstack.engine.native.architecture import Architecture
from bstack.kernels.decoder import Text

__all__ = ["LARGEST", "PAGE", "Sequence"]

# Tokens of a page of the caches.
PAGE = 64
# Type of cached keys and values, and its largest number.
CACHED, LARGEST = np.float16, 65504.0


class Sequence:
    """A text that a model reads and writes: the keys and values of its tokens, in pages of half precision.

    Attributes
    ----------
    tokens : list of int
        What was read so far.
    """

    def __init__(self, architecture: Architecture):
        self.tokens: list[int] = []
        self._of = architecture
        self._pages: list[Any] = []
        # Addresses of the pages as the kernels take them: keys and values, layers, pages.
        self._table = np.zeros((2, architecture.layers, 0), np.uint64)

    @property
    def length(self) -> int:
        """Number of tokens read so far."""
        return len(self.tokens)

    def keep(self, ids: Many[int]) -> int:
        """Go back to the tokens that begin `ids` too, but not to all of them; return how many these are."""
        count = 0
        for mine, other in zip(self.tokens, ids[:-1], strict=False):
            if mine != other:
                break
            count += 1
        del self.tokens[count:]
        return count

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens; ValueError beyond the model's context."""
        needed = self.length + tokens
        if needed > self._of.context:
            raise ValueError(f"a text of {needed} tokens; the model reads at most {self._of.context}.")
        while len(self._pages) * PAGE < needed:
            self._add(self._make_page())

    def _make_page(self) -> Any:
        """Make a page of keys and of values; a head's keys lie as (width, tokens) there, as the kernels read them."""
        return np.empty((2, self._of.layers, self._of.key_heads, PAGE * self._of.head_width), CACHED)

    def _add(self, page: Any) -> None:
        at, width = len(self._pages), self._table.shape[2]
        if at == width:
            self._table = np.concatenate([self._table, np.zeros((2, self._of.layers, at + 4), np.uint64)], 2)
        offsets = np.arange(2 * self._of.layers, dtype=np.uint64).reshape(2, -1) * np.uint64(page[0, 0].nbytes)
        self._table[:, :, at] = np.uint64(page.ctypes.data) + offsets
        self._pages.append(page)

    def share(self, start: int, stop: int) -> list[Any]:
        """Return the pages of some tokens that were read, for another text; both are multiples of `PAGE`."""
        return self._pages[start // PAGE : stop // PAGE]

    def adopt(self, tokens: Many[int], pages: Many[Any]) -> None:
        """Go on with whole pages of tokens that another text has read, after what this one has read itself."""
        self.tokens += tokens
        for page in pages:
            self._add(page)

    def put(self, layer: int, keys: Any, values: Any) -> None:
        """Write keys and values of the next tokens, (tokens, heads, width); `length` stays as it is."""
        for kind, given in enumerate((keys, values)):
            stored = self._cached(given.clip(-LARGEST, LARGEST)).swapaxes(0, 1)
            done = 0
            while done < len(given):
                at = self.length + done
                start, count = at % PAGE, min(PAGE - at % PAGE, len(given) - done)
                self._rows(at // PAGE, kind, layer)[:, start : start + count] = stored[:, done : done + count]
                done += count

    def _cached(self, given: Any) -> Any:
        return given.astype(CACHED)

    def get(self, layer: int, first: int, stop: int) -> Any:
        """Return keys and values of some tokens, float32, (2, heads, tokens, width)."""
        found = np.empty((2, self._of.key_heads, stop - first, self._of.head_width), np.float32)
        for number in range(first // PAGE, -(-stop // PAGE)):
            low, high = max(first, number * PAGE), min(stop, (number + 1) * PAGE)
            for kind in (0, 1):
                rows = self._rows(number, kind, layer)[:, low - number * PAGE : high - number * PAGE]
                found[kind, :, low - first : high - first] = rows
        return found

    def _rows(self, page: int, kind: int, layer: int) -> Any:
        """Return a page's keys (0) or values (1), (heads, tokens, width)."""
        stored, width = self._pages[page][kind, layer], self._of.head_width
        return stored.reshape(-1, PAGE, width) if kind else stored.reshape(-1, width, PAGE).swapaxes(1, 2)

    def texts(self, cosine: np.ndarray, sine: np.ndarray) -> list[Text]:
        """Return the text as the kernels take it, at its next tokens, with their rotary rows (tokens, kinds, values).

        Valid until the text grows, and as long as the caller keeps the rows.
        """
        keys, values = (self._table[kind].ctypes.data for kind in (0, 1))
        step, pages = cosine.strides[0], self._table.shape[2]
        rows = cosine.ctypes.data, sine.ctypes.data
        return [
            Text(self.length + number, pages, *(row + number * step for row in rows), keys, values)
            for number in range(len(cosine))
        ]
