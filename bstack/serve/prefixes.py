"""Keep the keys and values of prompts that were read, and find them again by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

__all__ = ["Prefixes"]

Pages = list[np.ndarray]


class Prefixes:
    """Pages of pieces of prompts; those least recently used go first.

    A piece is known by a digest of its tokens, of all before it, and of the size that the model had, so that what is found is
    what reading it again would give.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, Pages] = OrderedDict()
        self.pages = 0

    def find(self, keys: list[bytes], ids: Sequence[int], piece: int) -> list[Pages]:
        """Return the pages of the pieces of `piece` tokens that follow, and add their keys to those of the pieces before them.

        At least one of the tokens `ids`, which follow too, is left to read.
        """
        found = []
        for start in range(0, (len(ids) - 1) // piece * piece, piece):
            key = self.next(keys[-1], ids[start : start + piece])
            if key not in self._kept:
                break
            keys.append(key)
            found.append(self._kept[key])
        if found:
            self._use(keys)
        return found

    def keep(self, keys: Sequence[bytes], pages: Pages) -> None:
        """Keep the last piece of a prompt that has these keys."""
        if keys[-1] not in self._kept:
            self._kept[keys[-1]] = pages
            self.pages += len(pages)
        self._use(keys)

    def _use(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):  # the end of a prompt goes before its beginning
            if key in self._kept:
                self._kept.move_to_end(key)

    def shrink(self, pages: int) -> None:
        """Let go of pieces until there are at most so many pages."""
        while self.pages > max(pages, 0):
            self.pages -= len(self._kept.popitem(last=False)[1])

    @staticmethod
    def first(size: int) -> bytes:
        """Return the key before the first piece, for a model of so many bytes."""
        return size.to_bytes(8, "little")

    @staticmethod
    def next(key: bytes, tokens: Sequence[int]) -> bytes:
        """Return the key of a piece after the one with `key`."""
        return blake2b(key + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()
