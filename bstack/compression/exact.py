"""Make the chunks with which a complete file gives back the original's files of weights, byte for byte."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import bstk
from bstack.codecs import Codec
from bstack.compression.assemble import Collected
from bstack.errors import ModelWarning, UnsupportedModelError
from bstack.kernels import exact
from bstack.kernels.matrix import BLOCKS, RANK, Matrix
from bstack.models.names import MatrixName
from bstack.models.original import PARTS, OriginalFile, StoredTensor, View, check_original_name, elements
from bstack.models.skeleton import Skeleton
from bstack.models.weight_files import SINGLE
from bstack.workdir import Part, Record, WorkDirectory
from bstk import metadata
from bstk.errors import UsageError
from bstk.frames import unpack

__all__ = ["ORIGINALS_PART", "check_exact", "exact_part", "make_exact"]

ORIGINALS_PART = "originals"
# Bytes of a chunk with a part of a tensor that no other chunk gives.
PIECE_BYTES = 2**28
_BITS = {"bf16": np.uint16, "f16": np.uint16, "f32": np.uint32}


def exact_part(place: str) -> str:
    """Return the name of the part with the exact chunks of a layer, or of what is outside the layers."""
    return f"exact-{place}"


def check_exact(codec: Codec, files: Sequence[OriginalFile]) -> None:
    """Refuse blocks that no exact chunk stands on, and files that no chunk describes, before any work."""
    for setting, most in (("planes", BLOCKS), ("rank", RANK)):
        value = getattr(codec, setting, 0)
        if isinstance(value, int) and value > most:
            raise UsageError(f"{setting} is {value}; an exact file has at most {most}.")
    if wide := [tensor.name for file in files for tensor in file.tensors if tensor.parameter and not tensor.dtype]:
        warnings.warn(
            f"{wide[0]} ({len(wide)} tensors) has a type that no exact chunk holds, such as F64: only export to files of the "
            "original gives it back; bstack.load has what its blocks say.",
            ModelWarning,
            stacklevel=2,
        )
    for file in files:
        if file.name == SINGLE and len(files) > 1:
            raise UnsupportedModelError(
                f"{file.name} is one of several files of weights; programs that find it take it for all of them.",
                hint="Give the other files other names.",
            )
        try:
            check_original_name(file.name)
            pieces = [_parameter_piece(tensor) for tensor in file.tensors]
            metadata.dump(_described(2**48, "0" * 64, {str(piece[1]): (2**31,) * 3 for piece in pieces}, pieces))
        except ValueError as problem:
            raise UnsupportedModelError(f"{problem}, so no exact file holds it.", option="exact") from None
        except UsageError:
            raise UnsupportedModelError(
                f"{file.name} has {len(file.tensors)} tensors, which are too many for an exact file to describe as one file.",
                hint="Load the model with transformers, call save_pretrained with a smaller max_shard_size, and give that folder.",
                option="exact",
            ) from None


def make_exact(
    skeleton: Skeleton,
    files: Sequence[OriginalFile],
    collected: Collected,
    work: WorkDirectory,
    progress: Callable[[], None],
) -> list[str]:
    """Finish the parts of all exact and original chunks; return their names in file order. `progress` is called for each."""
    sources: dict[str, list[tuple[OriginalFile, int]]] = defaultdict(list)
    for file in files:
        for number, tensor in enumerate(file.tensors):
            if tensor.parameter is not None and tensor.dtype:
                sources[tensor.parameter].append((file, number))
    stacks: dict[str, list[str]] = defaultdict(list)
    for name in collected.stacks:
        stacks[MatrixName.parse(name).parameter].append(name)
    places: dict[str, list[str]] = {"outside": [], **{f"{i:05d}": [] for i in range(len(skeleton.layers))}}
    prefixes = {f"{name}.": f"{i:05d}" for i, (name, _) in enumerate(skeleton.layers)}
    for parameter in stacks:
        places[next((at for prefix, at in prefixes.items() if parameter.startswith(prefix)), "outside")].append(
            parameter
        )
    for place, parameters in places.items():
        if not work.has(exact_part(place)):
            with work.part(exact_part(place)) as part:
                for parameter in parameters:
                    values = _assemble(sources[parameter], tuple(skeleton.parameter(parameter).shape))
                    if values is not None:
                        _add_exact(values, {name: collected.stacks[name] for name in stacks[parameter]}, part)
        progress()
    parts = [exact_part(place) for place in places]
    if not work.has(ORIGINALS_PART):
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
        restored = {MatrixName.parse(r.entry.name).parameter for part in parts for r in work.records(part)}
        plain = {record.entry.name: record for record in collected.plain if record.entry.kind is bstk.TENSOR}
        with work.part(ORIGINALS_PART) as part:
            for file in files:
                _add_original(file, sources, shapes, restored, plain, part)
    progress()
    return [*parts, ORIGINALS_PART]


def _assemble(sources: Sequence[tuple[OriginalFile, int]], shape: tuple[int, ...]) -> tuple[str, np.ndarray] | None:
    """Return the type of a parameter and its bits, from the tensors that are parts of it; None if these do not make it up."""
    chosen: dict[View | None, tuple[OriginalFile, int]] = {}
    for file, number in sources:
        chosen.setdefault(file.tensors[number].view, (file, number))
    dtypes = {file.tensors[number].dtype for file, number in chosen.values()}
    if len(dtypes) != 1:
        return None
    dtype = dtypes.pop()
    values = np.zeros(shape, _BITS[dtype])
    if sum(file.tensors[number].length for file, number in chosen.values()) != values.nbytes:
        return None
    for view, (file, number) in chosen.items():
        part = elements(values, view)
        part[...] = file.read(number).view(values.dtype).reshape(part.shape)
    return dtype, values


def _add_exact(values: tuple[str, np.ndarray], stacks: Mapping[str, Sequence[Record]], part: Part) -> None:
    dtype, bits = values
    for name, records in stacks.items():
        entries = [record.entry for record in records]
        rows, columns = entries[0].shape
        payloads = (unpack(record.read(), record.entry.raw_length) for record in records)
        blocks = [(entry.kind.code, entry.rank, raw) for entry, raw in zip(entries, payloads, strict=True)]
        stack = Matrix.of(rows, columns, blocks)
        original = np.ascontiguousarray(MatrixName.parse(name).view(bits, entries[0].transposed))
        pieces = exact.encode(stack, original, dtype)
        if not np.array_equal(exact.restore(stack, b"".join(pieces), dtype), original):
            raise bstk.BstkError(
                f"{name}: its blocks and its exact chunk do not give back the original. Please report this."
            )
        part.add(
            pieces,
            name=name,
            kind=bstk.EXACT,
            level=len(entries),
            shape=entries[0].shape,
            dtype=dtype,
            transposed=entries[0].transposed,
        )


def _add_original(
    file: OriginalFile,
    sources: Mapping[str, Sequence[tuple[OriginalFile, int]]],
    shapes: Mapping[str, tuple[int, ...]],
    restored: set[str],
    plain: Mapping[str, Record],
    part: Part,
) -> None:
    """Add the chunk that says how a file is put together, and those of what no other chunk gives."""
    digest = hashlib.sha256(file.head)
    length = len(file.head)
    pieces: list[list[object]] = [["bytes", len(file.head)]]
    for number, tensor in enumerate(file.tensors):
        data = file.read(number)
        digest.update(data.data)
        length += tensor.length
        if not tensor.length:
            continue
        if _is_given(tensor, data, sources, restored, plain):
            pieces.append(_parameter_piece(tensor))
            continue
        for start in range(0, tensor.length, PIECE_BYTES):
            name = _part_name(file, number, start)
            part.add(data[start : start + PIECE_BYTES].tobytes(), name=name, kind=bstk.ORIGINAL)
            pieces.append(["chunk", name])
    used = {str(piece[1]) for piece in pieces if piece[0] == "parameter"}
    described = _described(length, digest.hexdigest(), {name: shapes[name] for name in sorted(used)}, pieces)
    part.add(metadata.dump(described) + b"\0" + file.head, name=file.name, kind=bstk.ORIGINAL)


def _described(
    length: int, digest: str, shapes: Mapping[str, tuple[int, ...]], pieces: Sequence[list[object]]
) -> dict[str, object]:
    """Return what an original chunk says of a file."""
    return {"length": length, "sha256": digest, "shapes": {n: list(s) for n, s in shapes.items()}, "pieces": pieces}


def _part_name(file: OriginalFile, number: int, start: int) -> str:
    """Return the name of the chunk with the bytes of a tensor from `start` on."""
    return f"{PARTS}{file.name}/{number}" + (f"/{start}" if start else "")


def _parameter_piece(tensor: StoredTensor) -> list[object]:
    """Return the piece that names the elements of a parameter."""
    view = [] if tensor.view is None else [tensor.view.offset, list(tensor.view.shape), list(tensor.view.strides)]
    return ["parameter", tensor.parameter or "", *view]


def _is_given(
    tensor: StoredTensor,
    data: np.ndarray,
    sources: Mapping[str, Sequence[tuple[OriginalFile, int]]],
    restored: set[str],
    plain: Mapping[str, Record],
) -> bool:
    """Return whether other chunks give a tensor with these bytes."""
    name = tensor.parameter
    if (record := plain.get(name or "")) is not None:
        return data.tobytes() == unpack(record.read(), record.entry.raw_length)
    if name not in restored or not tensor.dtype:
        return False
    # The first with this view is what the parameter was assembled from; the others are copies of it.
    first, number = next((f, n) for f, n in sources[name] if f.tensors[n].view == tensor.view)
    source = first.tensors[number]
    return source.dtype == tensor.dtype and (source is tensor or np.array_equal(first.read(number), data))
