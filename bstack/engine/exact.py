"""Give back the original's files of weights from a file that holds what its blocks lack to them."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bstk
from bstack.engine.parts import parse_name, part_of
from bstack.kernels.exact import ROWS_TOGETHER, Decoder
from bstack.kernels.matrix import Matrix
from bstack.models.names import MatrixName
from bstack.models.original import PARTS, View, check_original_name, elements
from bstk import metadata
from bstk.errors import DamagedError, error_prefix, os_errors

__all__ = ["restored_rows", "write_originals"]

# Experts of a layer lie in a file one after the other, each with its part of two or three parameters.
KEPT = 3
# Bytes of the files of weights that a raw byte of the chunks they are made of may become: an exact chunk has at least one for
# each weight, which has at most 4, and a tied parameter may be stored several times.
EXPANSION = 16


def restored_rows(
    file: bstk.Reader, blocks: Sequence[bstk.Chunk], remainder: bstk.Chunk
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the original of a matrix some rows at a time, as the first row's number and the bits of its type.

    Raises bstk.DamagedError if the exact chunk does not belong to these blocks.
    """
    rows, columns = remainder.shape
    try:
        stack = Matrix.of(rows, columns, [(block.kind.code, block.rank, file.read(block)) for block in blocks])
        decoder = Decoder(stack, file.read(remainder), remainder.dtype)
        for start in range(0, rows, ROWS_TOGETHER):
            yield start, decoder.rows(start)
    except ValueError as problem:
        raise DamagedError(f"{file.source.name}: {remainder.describe()}: {problem}", chunk=remainder) from None


def write_originals(file: bstk.Reader, folder: Path, progress: Callable[[int], None]) -> int:
    """Write the original's files of weights into a folder, each checked against its SHA-256; return their bytes of tensors.

    Raises
    ------
    bstk.DamagedError
        A chunk is damaged or does not say how a file of weights is put together, there is none, or the result is not the original.
    """
    restorer = _Restorer(file, progress)
    if not restorer.files:
        raise DamagedError(f"{file.source.name}: no chunk says how its files of weights are put together.")
    lengths = {
        kind: sum(c.raw_length for c in file.chunks if c.kind is kind)
        for kind in (bstk.ORIGINAL, bstk.EXACT, bstk.TENSOR)
    }
    left = lengths[bstk.ORIGINAL] + EXPANSION * (lengths[bstk.EXACT] + lengths[bstk.TENSOR])
    for chunk in restorer.files:
        name = chunk.name
        try:
            check_original_name(name)
        except ValueError as problem:
            raise DamagedError(f"{file.source.name}: its original {problem}.") from None
        with error_prefix(f"{file.source.name}: the original {name!r}"):
            described, rest = _parse(file.read(chunk))
            left -= described["length"]
            if left < 0:
                raise DamagedError(f"it has {described['length']} bytes, which so small a file does not give.")
            target = folder / name
            digest, length = hashlib.sha256(), 0
            with os_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as stream:
                    for piece in restorer.pieces(described, rest):
                        length += len(piece)
                        if length > described["length"]:
                            break
                        stream.write(piece)
                        digest.update(piece)
            if length != described["length"] or digest.hexdigest() != described["sha256"]:
                raise DamagedError("what was restored is not the original: its length or SHA-256 is another.")
    return restorer.bytes


class _Restorer:
    """Reads parameters from exact chunks and tensors, and keeps the last few."""

    def __init__(self, file: bstk.Reader, progress: Callable[[int], None]):
        self._file, self._progress = file, progress
        originals = [chunk for chunk in file.chunks if chunk.kind is bstk.ORIGINAL]
        self.files = [chunk for chunk in originals if not chunk.name.startswith(PARTS)]
        self._bytes = {chunk.name: chunk for chunk in originals if chunk.name.startswith(PARTS)}
        self._plain = {chunk.name: chunk for chunk in file.chunks if chunk.kind is bstk.TENSOR}
        self._blocks: dict[str, list[bstk.Chunk]] = defaultdict(list)
        self._matrices: dict[str, list[tuple[MatrixName, bstk.Chunk]]] = defaultdict(list)
        for chunk in file.chunks:
            if chunk.is_block:
                self._blocks[chunk.name].append(chunk)
            elif chunk.kind is bstk.EXACT:
                matrix = parse_name(chunk.name)
                self._matrices[matrix.parameter].append((matrix, chunk))
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self.bytes = 0

    def pieces(self, described: dict[str, Any], rest: memoryview) -> Iterator[memoryview]:
        """Yield the bytes of a file; DamagedError for a piece that is none."""
        for piece in described["pieces"]:
            match piece:
                case ["bytes", int(count)] if 0 <= count <= len(rest):
                    yield rest[:count]
                    rest = rest[count:]
                case ["chunk", str(name)] if name in self._bytes:
                    data = self._file.read(self._bytes[name])
                    self.bytes += len(data)
                    yield memoryview(data)
                case ["parameter", str(name), *view] if _is_view(view):
                    values = self._parameter(name, described["shapes"], bool(view))
                    try:
                        part = elements(values, View(view[0], tuple(view[1]), tuple(view[2])) if view else None)
                    except ValueError as problem:
                        raise DamagedError(f"its part of {name} is wrong: {problem}.") from None
                    if part.nbytes > described["length"]:
                        raise DamagedError(f"its part of {name} is longer than the file.")
                    self.bytes += part.nbytes
                    yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                case _:
                    raise DamagedError(f"{str(piece)[:80]} is no piece of a file.")

    def _parameter(self, name: str, shapes: dict[str, Any], keep: bool) -> np.ndarray:
        """Return a parameter as the bits of its type; `keep` one of which the file asks for other parts later."""
        if (chunk := self._plain.get(name)) is not None:
            return np.frombuffer(self._file.read(chunk), np.uint8).view(
                f"u{bstk.kinds.DTYPE_BY_NAME[chunk.dtype].size}"
            )
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        matrices, shape = self._matrices.get(name), shapes.get(name)
        if not matrices or not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise DamagedError(f"no exact chunk and no tensor gives {name}.")
        dtypes, weights = {chunk.dtype for _, chunk in matrices}, sum(math.prod(chunk.shape) for _, chunk in matrices)
        if len(dtypes) > 1 or len(shape) > bstk.limits.MAX_NDIM or weights != math.prod(shape):
            raise DamagedError(f"the exact chunks of {name} do not make up a parameter of shape {shape[:9]}.")
        values = np.zeros(shape, f"u{bstk.kinds.DTYPE_BY_NAME[dtypes.pop()].size}")
        for matrix, chunk in matrices:
            blocks = self._blocks[chunk.name]
            view = part_of(matrix, values, blocks[0])
            for start, rows in restored_rows(self._file, blocks, chunk):
                view[start : start + len(rows)] = rows
            self._progress(sum(block.stored_length for block in (*blocks, chunk)))
        if keep:
            self._kept[name] = values
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return values


def _parse(raw: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return what an original chunk says, and its further bytes."""
    text, zero, _ = raw.partition(b"\0")
    described = metadata.parse(text)
    wanted = {"length": int, "sha256": str, "shapes": dict, "pieces": list}
    if not zero or any(type(described.get(key)) is not kind for key, kind in wanted.items()):
        raise DamagedError("it does not say how a file is put together.")
    return described, memoryview(raw)[len(text) + 1 :]


def _is_view(view: list[Any]) -> bool:
    """Return whether these are an offset, a shape and strides, or nothing."""
    match view:
        case []:
            return True
        case [int(_), [*shape], [*strides]]:
            return all(type(number) is int for number in (*shape, *strides))
        case _:
            return False
