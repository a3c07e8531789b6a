"""A prefix of a ``.bstk`` file: how many chunks, and what they take."""

from __future__ import annotations

from typing import NamedTuple


class Cut(NamedTuple):
    """A prefix of a file.

    Attributes
    ----------
    chunks : int
        How many chunks it keeps.
    file_bytes : int
        Length of the file.
    memory_bytes : int
        Raw bytes of its weights, which is what they take in memory.
    """

    chunks: int
    file_bytes: int
    memory_bytes: int

    @property
    def budget(self) -> int:
        """The smallest budget, in bytes, that it fits in both ways."""
        return max(self.file_bytes, self.memory_bytes)
