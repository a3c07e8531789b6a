"""The index, one record of 128 bytes for each chunk, the names table it points into, and the rules of stacks."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from . import frames, kinds, limits
from .errors import DamagedError
from .metadata import first_twice
from .preamble import Preamble

# name id, kind, level | offset, stored, raw | shape | dtype, ndim, rank, flags | importance, error | reserved | digest
_RECORD = struct.Struct("<IHH QQQ 4I BBHI dd 24s 32s")
# The same, with the fields that decide a chunk's form in one piece: shape, dtype, ndim, rank, flags.
_FORMED_RECORD = struct.Struct("<IHH QQQ 24s dd 24s 32s")
_FORM = struct.Struct("<4I BBHI")
_NAME_HEAD = struct.Struct("<I")
_TRANSPOSED = 1
_RESERVED = bytes(24)
_MAX_FORMS = 4096  # remembered at once, because a hostile index has another one in every record
_INFINITY = float("inf")
# Written out because the Unicode database changes: controls, line and paragraph separators, and the bidirectional overrides
# that make a terminal show another name.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Chunk(NamedTuple):
    """One chunk of a file, as its index describes it.

    Attributes
    ----------
    name : str
        A file name, or a parameter of the model, perhaps with a slice.
    level : int
        Which block of its name's stack it is, from 0.
    offset, stored_length, raw_length : int
        Position and length of its frame in the file, and the bytes it decodes to.
    shape : tuple of int
        Shape of the matrix or tensor; () for a file.
    dtype : str
        Element type ("f16"), of the factors in a block; "none" for a file.
    rank : int
        Rank of a block; 0 for other chunks.
    transposed : bool
        The matrix is stored transposed relative to the model's parameter.
    importance, error : float
        The value that the writer ordered the blocks by, larger first; the relative error of the linear after this block.
    digest : bytes
        SHA-256 of the stored bytes.
    """

    name: str
    kind: kinds.Kind
    level: int
    offset: int
    stored_length: int
    raw_length: int
    shape: tuple[int, ...]
    dtype: str
    rank: int
    transposed: bool
    importance: float
    error: float
    digest: bytes

    @property
    def end(self) -> int:
        """Offset of the byte after the frame."""
        return self.offset + self.stored_length

    @property
    def is_weight(self) -> bool:
        """Return whether it counts as memory."""
        return self.kind.is_weight

    @property
    def is_block(self) -> bool:
        """Return whether it is a block of a linear's stack."""
        return self.kind.is_block

    def describe(self) -> str:
        """Return its name in messages."""
        level = f" level {self.level}" if self.is_block or self.kind.on else ""
        return f"{self.kind} {self.name!r}{level} at offset {self.offset}"


def bits_per_weight(chunks: Iterable[Any]) -> float | None:
    """Return the bits that a weight of the linears takes in the blocks among some chunks or entries; None without blocks."""
    blocks = [chunk for chunk in chunks if chunk.kind.is_block]
    # Every linear has exactly one block of level 0, so this counts each weight once.
    weights = sum(math.prod(block.shape) for block in blocks if block.level == 0)
    return 8 * sum(block.raw_length for block in blocks) / weights if weights else None


def dump(chunks: Iterable[Chunk]) -> tuple[bytes, bytes]:
    """Return the bytes of the index and of the names table, unchecked: the writer parses them afterwards."""
    ids: dict[str, int] = {}
    records, names = [], []
    for chunk in chunks:
        if chunk.name not in ids:
            ids[chunk.name] = len(ids)
            name = chunk.name.encode("utf-8")
            names.append(_NAME_HEAD.pack(len(name)) + name)
        shape = (*chunk.shape, 0, 0, 0, 0)[: limits.MAX_NDIM]
        records.append(
            _RECORD.pack(
                ids[chunk.name],
                chunk.kind.code,
                chunk.level,
                chunk.offset,
                chunk.stored_length,
                chunk.raw_length,
                *shape,
                kinds.DTYPE_BY_NAME[chunk.dtype].code,
                len(chunk.shape),
                chunk.rank,
                _TRANSPOSED * chunk.transposed,
                chunk.importance,
                chunk.error,
                _RESERVED,
                chunk.digest,
            )
        )
    return b"".join(records), b"".join(names)


def check_name(name: str, file: bool = False) -> None:
    """Raise ValueError if a name has forbidden characters or, with `file`, is not safe to create as a file in a folder."""
    bad = _FORBIDDEN.search(name)
    if bad:
        raise ValueError(f"the name {name!r} has the control character U+{ord(bad[0]):04X}")
    if file:
        # On Windows a colon names a drive or a stream, a backslash a folder.
        if "\\" in name or ":" in name:
            raise ValueError(f"the file name {name!r} has a backslash or a colon")
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"the file name {name!r} is not a plain relative path")


def parse_names(data: bytes, max_count: int) -> list[str]:
    """Parse the names table, which has at most `max_count` names; raise DamagedError unless they are valid and distinct."""
    names: list[str] = []
    position = 0
    while position < len(data):
        if len(names) == max_count:
            raise DamagedError(f"names table: more names than the {max_count} chunks of the index can use.")
        if len(data) - position < _NAME_HEAD.size:
            raise DamagedError(f"names table: {len(data) - position} bytes are left over after name {len(names)}.")
        (length,) = _NAME_HEAD.unpack_from(data, position)
        position += _NAME_HEAD.size
        if not 1 <= length <= min(limits.MAX_NAME_LENGTH, len(data) - position):
            raise DamagedError(
                f"names table: name {len(names)} has length {length}; allowed: 1 to {limits.MAX_NAME_LENGTH}, within the table."
            )
        try:
            name = data[position : position + length].decode("utf-8")
            check_name(name)
        except ValueError as error:
            raise DamagedError(f"names table: name {len(names)}: {error}.") from error
        names.append(name)
        position += length
    if len(set(names)) != len(names):
        raise DamagedError(f"names table: {first_twice(names)!r} appears twice.")
    return names


def parse(data: bytes | memoryview, names: Sequence[str], start: int) -> list[Chunk]:
    """Parse the records of the index, whose first chunk is at offset `start`, and check each by itself.

    `check_stacks` checks them together. Both raise DamagedError.
    """
    chunks: list[Chunk] = []
    forms: dict[tuple[int, bytes], _Form] = {}  # a file has few, so their rules are not applied to every record
    used = 0
    files_left = limits.MAX_FILES_LENGTH
    offset = start
    for number, fields in enumerate(_FORMED_RECORD.iter_unpack(data)):
        name_id, code, level, found_offset, stored_length, raw_length, packed, importance, error, reserved, digest = (
            fields
        )
        try:
            # Names are in the order of their first use, so that there is one way to write a table, without unused names.
            if name_id >= used:
                if name_id > used or name_id >= len(names):
                    raise _bad("name id", name_id, f"at most {min(used, len(names) - 1)}")
                used += 1
            form = forms.get((code, packed))
            if form is None:
                if len(forms) == _MAX_FORMS:
                    forms.clear()
                form = forms[code, packed] = _parse_form(code, packed)
            kind, shape, dtype, rank, transposed, determined = form
            if found_offset != offset:
                raise _bad("offset", found_offset, f"{offset}, the end of the bytes before it")
            if not 1 <= stored_length <= limits.MAX_FILE_LENGTH:
                raise _bad("stored length", stored_length, f"1 to {limits.MAX_FILE_LENGTH}")
            # The slack is enough for most chunks, and the full rule is slower.
            if not 1 <= raw_length <= limits.EXPANSION_SLACK and not 1 <= raw_length <= frames.max_raw(stored_length):
                allowed = f"1 to {frames.max_raw(stored_length)} for {stored_length} stored bytes"
                raise _bad("raw length", raw_length, allowed)
            if determined is not None and raw_length != determined:
                if not isinstance(determined, range):
                    raise _bad("raw length", raw_length, f"{determined}, as its shape has it")
                if raw_length not in determined:
                    allowed = f"{determined.start} to {determined.stop - 1} in steps of {determined.step}"
                    raise _bad("raw length", raw_length, f"{allowed}, as its shape has it")
            if level and not kind.is_block and not kind.on:
                raise _bad("level", level, f"0 for a {kind}")
            if not -_INFINITY < importance < _INFINITY:
                raise _bad("importance", importance, "a finite number")
            if not 0 <= error < _INFINITY:
                raise _bad("error", error, "a finite number, 0 or more")
            if reserved != _RESERVED:
                raise _bad("reserved bytes", reserved.hex(), "zeros")
            name = names[name_id]
            if kind is kinds.ORIGINAL:
                check_name(name, file=True)
            elif kind is kinds.FILE:
                check_name(name, file=True)
                files_left -= raw_length
                if files_left < 0:
                    allowed = f"{files_left + raw_length}, as all files take at most {limits.MAX_FILES_LENGTH}"
                    raise _bad("raw length", raw_length, allowed)
        except ValueError as problem:
            name = repr(names[name_id]) if name_id < len(names) else "no name"
            raise DamagedError(f"index record {number}, {name} level {level}: {problem}.") from problem
        raw_length = determined if determined == raw_length else raw_length  # one integer for all chunks of a form
        head = (name, kind, level, offset, stored_length, raw_length)
        chunks.append(_new_chunk((*head, shape, dtype, rank, transposed, importance, error, digest)))
        offset += stored_length
    if used != len(names):
        raise DamagedError(f"names table: it has {len(names)} names, of which the index uses {used}.")
    return chunks


# Chunk(...) without parsing arguments, which takes as long as all checks of a record.
_new_chunk = partial(tuple.__new__, Chunk)


class _Form(NamedTuple):
    """The fields of a record that describe its matrix, and the raw length or lengths that these allow."""

    kind: kinds.Kind
    shape: tuple[int, ...]
    dtype: str
    rank: int
    transposed: bool
    determined: kinds.Length


def _parse_form(kind_code: int, packed: bytes) -> _Form:
    *dimensions, dtype_code, ndim, rank, flags = _FORM.unpack(packed)
    if kind_code not in kinds.BY_CODE:
        raise _bad("kind", kind_code, "a kind this version knows")
    if dtype_code not in kinds.DTYPE_BY_CODE:
        raise _bad("dtype", dtype_code, f"0 to {max(kinds.DTYPE_BY_CODE)}")
    if flags & ~_TRANSPOSED:
        raise _bad("flags", f"{flags:#x}", f"bit {_TRANSPOSED:#x}")
    if ndim > limits.MAX_NDIM:
        raise _bad("number of dimensions", ndim, f"0 to {limits.MAX_NDIM}")
    if any(dimensions[ndim:]):
        raise _bad("shape", dimensions, f"zeros after the first {ndim}")
    for length in dimensions[:ndim]:
        if not 1 <= length <= limits.MAX_DIMENSION:
            raise _bad("dimension", length, f"1 to {limits.MAX_DIMENSION}")
    shape = tuple(dimensions[:ndim])
    if flags and len(shape) != 2:
        raise _bad("transposed flag", 1, "0 for what does not have two dimensions")
    kind, dtype = kinds.BY_CODE[kind_code], kinds.DTYPE_BY_CODE[dtype_code].name
    return _Form(kind, shape, dtype, rank, bool(flags), kind.rule(shape, dtype, rank))


def _bad(what: str, found: object, allowed: str) -> ValueError:
    return ValueError(f"{what} is {found}; allowed: {allowed}")


def check_stacks(chunks: Sequence[Chunk], preamble: Preamble) -> None:
    """Raise DamagedError unless the chunks make up stacks over a base model and end where the preamble says."""
    last: dict[str, Chunk] = {}
    features = 0
    restoring: Chunk | None = None
    for position, chunk in enumerate(chunks):
        kind, name = chunk.kind, chunk.name
        features |= kind.feature
        # So that a cut drops what restores the original first, and an exact chunk has the whole stack below it.
        if kind.restores:
            if position < preamble.base_count:
                raise _wrong(chunk, f"{kind} chunks stand after the base model ({preamble.base_count} chunks)")
            restoring = chunk
        elif restoring is not None:
            raise _wrong(chunk, f"it follows {restoring.describe()}, after which only exact and original chunks stand")
        below = last.get(name)
        if below is None:
            # Every other name belongs to the base model, so that no cut has an empty linear or lacks a file.
            if position >= preamble.base_count and not kind.restores:
                raise _wrong(chunk, f"its name first appears after the base model ({preamble.base_count} chunks)")
            if chunk.level != 0:
                raise _wrong(chunk, f"the first block of a name has level 0, found {chunk.level}")
            if not kind.first:
                raise _wrong(chunk, f"a stack does not begin with {kind}; allowed below it: {' or '.join(kind.on)}")
        else:
            if not ((kind.is_block or kind.on) and below.kind.is_block):
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
    base_end = chunks[preamble.base_count - 1].end
    if base_end != preamble.base_length:
        raise DamagedError(
            f"preamble: base length {preamble.base_length}, but the first {preamble.base_count} chunks end at {base_end}."
        )
    if chunks[-1].end != preamble.full_length:
        raise DamagedError(
            f"preamble: full length {preamble.full_length}, but the last chunk ends at {chunks[-1].end}."
        )
    if preamble.seal and all(chunk.end != preamble.seal for chunk in chunks):
        raise DamagedError(f"preamble: sealed at {preamble.seal}, where no chunk ends.")


def _wrong(chunk: Chunk, problem: str) -> DamagedError:
    return DamagedError(f"index: {chunk.describe()}: {problem}.", chunk=chunk)
