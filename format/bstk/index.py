"""The index, one record of 128 bytes for each chunk, and the names table it points into."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from . import dtypes, frames, kinds, limits
from .errors import DamagedError
from .names import check_name, first_twice

# name id, kind, level | offset, stored, raw | shape | dtype, ndim, rank, flags | importance, error | reserved | digest
_RECORD = struct.Struct("<IHH QQQ 4I BBHI dd 24s 32s")
# The same, with what decides a chunk's form in one piece: shape, dtype, ndim, rank, flags.
_FORMED_RECORD = struct.Struct("<IHH QQQ 24s dd 24s 32s")
_FORM = struct.Struct("<4I BBHI")
_NAME_HEAD = struct.Struct("<I")
_TRANSPOSED = 1
_RESERVED = bytes(24)
_MOST_FORMS = 4096  # remembered at once: a hostile index has another one in every record
_INFINITY = math.inf


class Chunk(NamedTuple):
    """One chunk of a file, as its index describes it.

    Attributes
    ----------
    name : str
        What it is a part of: a file name, or a parameter of the model, perhaps with a slice.
    kind : Kind
        One of the kinds in `bstk.kinds`.
    level : int
        Which block of its name's stack it is, from 0.
    offset, stored_length : int
        Where its frame stands in the file, in bytes.
    raw_length : int
        Bytes it decodes to.
    shape : tuple of int
        Shape of the matrix or tensor; () for a file.
    dtype : str
        Element type ("f16"), of the factors in a block; "none" for a file.
    rank : int
        Rank of a block; 0 for what is no block.
    transposed : bool
        The matrix is stored transposed relative to the model's parameter.
    importance : float
        What the writer ordered the blocks by; larger is earlier.
    error : float
        Relative error of the linear that remains after this block.
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
        """Offset of the byte after its last."""
        return self.offset + self.stored_length

    @property
    def is_weight(self) -> bool:
        """It counts as memory."""
        return self.kind.is_weight

    @property
    def is_block(self) -> bool:
        """It is a block of a linear's stack."""
        return self.kind.is_block

    def describe(self) -> str:
        """Return how messages call it."""
        level = f" level {self.level}" if self.is_block else ""
        return f"{self.kind} {self.name!r}{level} at offset {self.offset}"


def dump(chunks: Iterable[Chunk]) -> tuple[bytes, bytes]:
    """Return the bytes of the index and of the names table. Checks nothing: the writer parses what it got."""
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
                dtypes.BY_NAME[chunk.dtype].code,
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


def parse_names(data: bytes, most: int) -> list[str]:
    """Parse the names table.

    Parameters
    ----------
    data : bytes
        The table.
    most : int
        How many names it may have: as many as there are chunks.

    Raises
    ------
    DamagedError
        It does not split into valid, distinct names.
    """
    names: list[str] = []
    position = 0
    while position < len(data):
        if len(names) == most:
            raise DamagedError(f"names table: more names than the {most} chunks of the index can use.")
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
    """Parse the records of the index and check each by itself; `stacks.check` looks at what they say together.

    Parameters
    ----------
    data : bytes
        The index.
    names : sequence of str
        The names table.
    start : int
        Offset of the first chunk.

    Raises
    ------
    DamagedError
        A record breaks a rule.
    """
    chunks: list[Chunk] = []
    forms: dict[tuple[int, bytes], _Form] = {}  # a file has few, and their rules need not be applied to every record
    used = 0
    files_left = limits.MAX_FILES_LENGTH
    offset = start
    for number, fields in enumerate(_FORMED_RECORD.iter_unpack(data)):
        name_id, code, level, found_offset, stored_length, raw_length, packed, importance, error, reserved, digest = (
            fields
        )
        try:
            # In order of first use, so that there is one way to write a table and no name is left unused.
            if name_id >= used:
                if name_id > used or name_id >= len(names):
                    raise _bad("name id", name_id, f"at most {min(used, len(names) - 1)}")
                used += 1
            form = forms.get((code, packed))
            if form is None:
                if len(forms) == _MOST_FORMS:
                    forms.clear()
                form = forms[code, packed] = _parse_form(code, packed)
            kind, shape, dtype, rank, transposed, determined = form
            if found_offset != offset:
                raise _bad("offset", found_offset, f"{offset}, the end of what stands before it")
            if not 1 <= stored_length <= limits.MAX_FILE_LENGTH:
                raise _bad("stored length", stored_length, f"1 to {limits.MAX_FILE_LENGTH}")
            # The slack is enough for most; the rest is looked at in full.
            if not 1 <= raw_length <= limits.EXPANSION_SLACK and not 1 <= raw_length <= frames.most_raw(stored_length):
                raise _bad(
                    "raw length", raw_length, f"1 to {frames.most_raw(stored_length)} for {stored_length} stored bytes"
                )
            if determined is not None and raw_length != determined:
                if not isinstance(determined, range):
                    raise _bad("raw length", raw_length, f"{determined}, as its shape has it")
                if raw_length not in determined:
                    allowed = f"{determined.start} to {determined.stop - 1} in steps of {determined.step}"
                    raise _bad("raw length", raw_length, f"{allowed}, as its shape has it")
            if level and not kind.is_block:
                raise _bad("level", level, f"0 for a {kind}")
            if not -_INFINITY < importance < _INFINITY:
                raise _bad("importance", importance, "a finite number")
            if not 0 <= error < _INFINITY:
                raise _bad("error", error, "a finite number, 0 or more")
            if reserved != _RESERVED:
                raise _bad("reserved bytes", reserved.hex(), "zeros")
            name = names[name_id]
            if kind is kinds.FILE:
                check_name(name, file=True)
                files_left -= raw_length
                if files_left < 0:
                    raise _bad(
                        "raw length",
                        raw_length,
                        f"{files_left + raw_length}, as all files take at most {limits.MAX_FILES_LENGTH}",
                    )
        except ValueError as problem:
            name = repr(names[name_id]) if name_id < len(names) else "no name"
            raise DamagedError(f"index record {number}, {name} level {level}: {problem}.") from problem
        chunks.append(
            _new_chunk(
                (
                    name,
                    kind,
                    level,
                    offset,
                    stored_length,
                    determined if determined == raw_length else raw_length,
                    shape,
                    dtype,
                    rank,
                    transposed,
                    importance,
                    error,
                    digest,
                )
            )
        )
        offset += stored_length
    if used != len(names):
        raise DamagedError(f"names table: it has {len(names)} names, of which the index uses {used}.")
    return chunks


# Chunk(...) without its parsing of arguments, which takes as long as all checks of a record.
_new_chunk = partial(tuple.__new__, Chunk)


class _Form(NamedTuple):
    """What a record says of its matrix, and the raw length that this determines, or lengths that it allows."""

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
    if dtype_code not in dtypes.BY_CODE:
        raise _bad("dtype", dtype_code, f"0 to {max(dtypes.BY_CODE)}")
    if flags & ~_TRANSPOSED:
        raise _bad("flags", f"{flags:#x}", f"bit {_TRANSPOSED:#x}")
    shape = _shape(dimensions, ndim)
    if flags and len(shape) != 2:
        raise _bad("transposed flag", 1, "0 for what does not have two dimensions")
    kind, dtype = kinds.BY_CODE[kind_code], dtypes.BY_CODE[dtype_code].name
    return _Form(kind, shape, dtype, rank, bool(flags), kind.rule(shape, dtype, rank))


def _shape(dimensions: Sequence[int], ndim: int) -> tuple[int, ...]:
    if ndim > limits.MAX_NDIM:
        raise _bad("number of dimensions", ndim, f"0 to {limits.MAX_NDIM}")
    if any(dimensions[ndim:]):
        raise _bad("shape", dimensions, f"zeros after the first {ndim}")
    for length in dimensions[:ndim]:
        if not 1 <= length <= limits.MAX_DIMENSION:
            raise _bad("dimension", length, f"1 to {limits.MAX_DIMENSION}")
    return tuple(dimensions[:ndim])


def _bad(what: str, found: object, allowed: str) -> ValueError:
    return ValueError(f"{what} is {found}; allowed: {allowed}")
