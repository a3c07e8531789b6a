"""Make the chunks with which a complete file gives back the original's files of weights, byte for byte."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import bstk
from bstack.codecs import Codec
from bstack.compression.assemble import Collected
from bstack.errors import UnsupportedModelError
from bstack.kernels import exact
from bstack.kernels.matrix import BLOCKS, RANK, Matrix
from bstack.models.names import MatrixName
from bstack.models.original import OriginalFile, StoredTensor, View, elements
from bstack.models.skeleton import Skeleton
from bstack.workdir import Part, Record, WorkDirectory
from bstk import metadata
from bstk.errors import UsageError
from bstk.frames import unpack

__all__ = ["ORIGINALS_PART", "PARTS", "check_exact", "exact_part", "make_exact"]

ORIGINALS_PART = "originals"
# Folder of the names of original chunks that are bytes of a file.
PARTS = ".parts"
_BITS = {"bf16": np.uint16, "f16": np.uint16, "f32": np.uint32}


def exact_part(place: str) -> str:
    """Return the name of the part with the exact chunks of a layer, or of what is outside the layers."""
    return f"exact-{place}"


def check_exact(codec: Codec, files: Sequence[OriginalFile]) -> None:
    """Refuse blocks that no exact chunk stands on, and tensors that no chunk holds, before any work."""
    for setting, most in (("planes", BLOCKS), ("rank", RANK)):
        value = getattr(codec, setting, 0)
        if isinstance(value, int) and value > most:
            raise UsageError(f"{setting} is {value}; an exact file has at most {most}.")
    for file in files:
        for tensor in file.tensors:
            if tensor.parameter is None and tensor.length > bstk.limits.MAX_RAW_LENGTH:
                raise UnsupportedModelError(
                    f"{file.name}: {tensor.name} takes {tensor.length / 2**30:.2f} GiB and is no parameter of the model by its "
                    "values alone, so an exact file would hold it as it is, in a chunk of at most "
                    f"{bstk.limits.MAX_RAW_LENGTH / 2**30:.0f} GiB.",
                    option="exact",
                )


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
        piece = _piece(tensor, data, sources, restored, plain)
        if piece is None:
            piece = ["chunk", f"{PARTS}/{file.name}/{number}"]
            part.add(data.tobytes(), name=str(piece[1]), kind=bstk.ORIGINAL)
        pieces.append(piece)
    used = {str(piece[1]) for piece in pieces if piece[0] == "parameter"}
    described = {
        "length": length,
        "sha256": digest.hexdigest(),
        "shapes": {name: list(shapes[name]) for name in sorted(used)},
        "pieces": pieces,
    }
    part.add(metadata.dump(described) + b"\0" + file.head, name=file.name, kind=bstk.ORIGINAL)


def _piece(
    tensor: StoredTensor,
    data: np.ndarray,
    sources: Mapping[str, Sequence[tuple[OriginalFile, int]]],
    restored: set[str],
    plain: Mapping[str, Record],
) -> list[object] | None:
    """Return the piece that names a tensor's parameter, if other chunks give it with these bytes."""
    name = tensor.parameter
    if (record := plain.get(name or "")) is not None:
        same = data.tobytes() == unpack(record.read(), record.entry.raw_length)
        return ["parameter", name] if same else None
    if name not in restored or not tensor.dtype:
        return None
    # The first with this view is what the parameter was assembled from; the others are copies of it.
    first, number = next((f, n) for f, n in sources[name] if f.tensors[n].view == tensor.view)
    source = first.tensors[number]
    if source.dtype != tensor.dtype or not (source is tensor or np.array_equal(first.read(number), data)):
        return None
    view = [] if tensor.view is None else [tensor.view.offset, list(tensor.view.shape), list(tensor.view.strides)]
    return ["parameter", name, *view]
