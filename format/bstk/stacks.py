"""What the chunks of a file must say together: blocks of one name in order, the smallest model first."""

from __future__ import annotations

from collections.abc import Sequence

from . import kinds
from .errors import DamagedError
from .index import Chunk
from .preamble import Preamble


def check(chunks: Sequence[Chunk], preamble: Preamble) -> None:
    """Check a complete index against itself and the preamble.

    Raises
    ------
    DamagedError
        The chunks do not make up stacks over a smallest model, or end elsewhere than the preamble says.
    """
    last: dict[str, Chunk] = {}
    features = 0
    for position, chunk in enumerate(chunks):
        kind, name = chunk.kind, chunk.name
        features |= kind.feature
        below = last.get(name)
        if below is None:
            # Every name belongs to the smallest model: no linear is empty, no file is missing, however short the cut.
            if position >= preamble.base_count:
                raise _wrong(chunk, f"its name first appears after the smallest model ({preamble.base_count} chunks)")
            if chunk.level != 0:
                raise _wrong(chunk, f"the first block of a name has level 0, found {chunk.level}")
            if not kind.first:
                raise _wrong(chunk, f"a stack does not begin with {kind}; allowed below it: {' or '.join(kind.on)}")
        else:
            if not (kind.is_block and below.kind.is_block):
                raise _wrong(chunk, "its name appears twice, and only blocks stack")
            if chunk.level != below.level + 1:
                raise _wrong(chunk, f"level {chunk.level} follows level {below.level}; allowed: {below.level + 1}")
            if below.kind.name not in kind.on:
                allowed = " or ".join(kind.on) or "nothing, it is the first of its stack"
                raise _wrong(chunk, f"{kind} stands on {below.kind}; allowed below it: {allowed}")
            if chunk.shape != below.shape or chunk.transposed != below.transposed:
                raise _wrong(
                    chunk,
                    f"shape {chunk.shape}, transposed {chunk.transposed}, but the block below it has "
                    f"{below.shape}, {below.transposed}",
                )
        last[name] = chunk
    known = kinds.known_features()
    if preamble.incompatible & known != features:
        raise DamagedError(
            f"preamble: incompatible flags {preamble.incompatible:#x}, but the kinds in the index need {features:#x}."
        )
    _check_ends(chunks, preamble)


def _check_ends(chunks: Sequence[Chunk], preamble: Preamble) -> None:
    base_end = chunks[preamble.base_count - 1].end
    if base_end != preamble.smallest_length:
        raise DamagedError(
            f"preamble: smallest length {preamble.smallest_length}, but the first {preamble.base_count} chunks end at {base_end}."
        )
    if chunks[-1].end != preamble.full_length:
        raise DamagedError(
            f"preamble: full length {preamble.full_length}, but the last chunk ends at {chunks[-1].end}."
        )
    if preamble.seal and all(chunk.end != preamble.seal for chunk in chunks):
        raise DamagedError(f"preamble: sealed at {preamble.seal}, where no chunk ends.")


def _wrong(chunk: Chunk, problem: str) -> DamagedError:
    error = DamagedError(f"index: {chunk.describe()}: {problem}.")
    error.chunk = chunk
    return error
