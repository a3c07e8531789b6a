"""Tests the CUDA kernels before their first use on a device: each must agree with the reference on small inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional

from bstack.kernels import reference
from bstack.kernels.cuda import CHUNK, MARGIN, SEGMENT, Kernels, first_segment
from bstack.kernels.cuda.step import PAGE, Heads, Step, Texts
from bstack.kernels.matrix import PLAIN, ROTATED, Matrix
from bstack.kernels.selftest import BLOCKS, ROWS, random_payload
from bstack.kernels.table import DeviceMatrix, MatrixTable

__all__ = ["difference", "failure", "rotations_agree", "step_agrees"]

Place = Callable[[np.ndarray], torch.Tensor]
# Relative to the sum of absolute products, or to the largest weight.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def failure(kernels: Kernels, device: torch.device) -> str:
    """Return which result of the kernels is wrong, in a few words; an empty string if none is."""
    rng = np.random.default_rng(0)

    def place(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device)

    for columns in (320, 299):  # whole words in a row of codes, and not
        for name, forms in BLOCKS.items():
            for tokens in (1, 2, 3, 8):
                blocks = [(kind, rank, random_payload(rng, ROWS, columns, kind, rank, columns)) for kind, rank in forms]
                x = rng.standard_normal((tokens, columns)).astype(np.float32)
                if wrong := difference(kernels, Matrix.of(ROWS, columns, blocks), x, place):
                    return f"{wrong} with {name} blocks"
    for columns in (640, 3 * 2 * CHUNK):
        if not rotations_agree(kernels, rng.standard_normal((2, columns)).astype(np.float32), place):
            return "a rotation"
    for queries, keys in ((4, 4), (6, 2)):
        if not step_agrees(kernels, queries, keys, rng, place):
            return "a step between products"
    return "" if _searches_agree(kernels, rng, place) else "a search"


def _searches_agree(kernels: Kernels, rng: np.random.Generator, place: Place) -> bool:
    """Return whether two columns of two segments get the reference's codes, errors and feedback, bit for bit."""
    rows, columns = SEGMENT + 40, 2
    target, original, feedback = (rng.standard_normal((columns, length)) for length in (rows, rows, columns))
    given = [target, original, feedback, np.array(reference.TABLE5), *rng.uniform(0.01, 0.1, (2, rows))]
    arrays = [array.astype(np.float32) for array in given]
    placed = [place(array) for array in arrays]
    found = *kernels.encode_columns(*placed, turn=1), placed[0]
    codes, errors = reference.encode_columns(*arrays, first=first_segment(rows, 1), segment=SEGMENT, margin=MARGIN)
    expected = codes, errors, arrays[0]
    return all(np.array_equal(f.cpu().numpy(), e) for f, e in zip(found, expected, strict=True))


def step_agrees(kernels: Kernels, queries: int, keys: int, rng: np.random.Generator, place: Place) -> bool:
    """Return whether a norm, an activation and attention to a text of some pages are those of torch on the CPU."""
    width, length, seen = 32, 200, 150
    heads = Heads(queries, keys, width, rotary=width, layers=1, epsilon=1e-6, scale=0.2)
    step, columns = Step(kernels, heads), queries * width

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    def agrees(found: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor) -> bool:
        turned = reference.rotate(expected.numpy())
        most = 1e-3 * float(expected.abs().max())
        return _near(found[0], expected.numpy(), most) and _near(found[1], turned, 4 * most)

    x, added, weight, both = random(2, columns), random(2, columns), random(columns), random(2, 2 * columns)
    on_device = [place(tensor.numpy()) for tensor in (x, added, weight, weight, both)]
    total = x + functional.rms_norm(added, (columns,), weight, 1e-6)
    if not agrees(step.prepare(*on_device[:4])[1:], functional.rms_norm(total, (columns,), weight, 1e-6)):
        return False
    gate, up = both.chunk(2, 1)
    if not agrees(step.activated(on_device[4], "silu"), functional.silu(gate) * up):
        return False
    past, given = random(2, keys, length, width).half(), random(1, (queries + 2 * keys) * width)
    pages = []
    for start in range(0, length, PAGE):
        own = functional.pad(past[:, :, start : start + PAGE], (0, 0, 0, max(0, start + PAGE - length)))
        pages.append(place(torch.stack([own[0].mT, own[1].reshape(own[0].mT.shape)]).numpy()))
    addresses = place(np.array([page.data_ptr() for page in pages]))
    table = place(np.array([[length - 1, addresses.data_ptr()]]))
    angles = random(1, 1, width // 2).repeat(1, 1, 2)
    rows = (place(part.numpy()) for part in (angles.cos(), angles.sin()))
    found = step.attend(place(given.numpy()), Texts(table, *rows), 0, window=seen)
    query, key, value = given.view(-1, width).split([queries, keys, keys])
    query, key = (
        head * angles.cos()[0] + torch.cat([-head[:, width // 2 :], head[:, : width // 2]], 1) * angles.sin()[0]
        for head in (query, key)
    )
    past[:, :, -1] = torch.stack([key, value])
    text = past[:, :, -seen:].float()
    scores = heads.scale * query.view(keys, -1, width) @ text[0].mT
    return agrees(found, (scores.softmax(-1) @ text[1]).reshape(1, -1))


def rotations_agree(kernels: Kernels, x: np.ndarray, place: Place) -> bool:
    """Return whether rows x, float32, are rotated and rotated back to the reference's bits; `place` puts arrays on the device."""
    found = kernels.rotate(place(x)), kernels.rotate(place(x), undo=True)
    expected = reference.rotate(x), reference.unrotate(x)
    return all(np.array_equal(f.cpu().numpy(), e) for f, e in zip(found, expected, strict=True))


def difference(kernels: Kernels, expected: Matrix, x: np.ndarray, place: Place, kinds: Iterable[int] = ()) -> str:
    """Return which result for a matrix differs from the reference's, decoded rows or a product; an empty string if none does.

    Parameters
    ----------
    kernels : Kernels
    expected : Matrix
        In the CPU's memory.
    x : np.ndarray
        Inputs, float32, shape (t, n).
    place : callable
        Puts an array on the device.
    kinds : iterable of int
        Of blocks that the stack has beside those in memory.
    """
    levels, rotated = range(expected.count), reference.rotate(x)
    payloads: Sequence[torch.Tensor] = [place(expected.payload(level)) for level in levels]
    device = place(x[:0]).device
    table = MatrixTable(2, device)
    matrix = DeviceMatrix(expected.rows, expected.columns, table, 1, kinds)
    for level, payload in zip(levels, payloads, strict=True):
        matrix.put(level, expected.kind[level], expected.rank[level], payload.data_ptr(), checked=True)
    matrix.count = expected.count
    rows = [matrix.rows - 1, *range(matrix.rows)]
    product, size = np.zeros((2, len(x), matrix.rows))
    for kinds, inputs in ((ROTATED, rotated), (PLAIN, x)):
        weights = reference.decode_rows(expected, kinds, 0, matrix.rows)
        for dtype, tolerance in TOLERANCE.items():
            decoded = kernels.decode(matrix, kinds, torch.tensor(rows, device=device), dtype)
            if decoded.dtype != dtype or not _near(decoded, weights[rows], tolerance * np.abs(weights).max()):
                return f"decoded rows ({dtype})"
        product += inputs.astype(np.float64) @ weights.T
        size += np.abs(inputs).astype(np.float64) @ np.abs(weights.T)
    out = torch.full((len(x), matrix.rows + 2), torch.nan, device=device)
    kernels.multiply(matrix, place(x), place(rotated), out[:, 1:-1])
    right = _near(out[:, 1:-1], product, TOLERANCE[torch.float32] * size) and out[:, [0, -1]].isnan().all()
    return "" if right else f"a product for {len(x)} tokens"


def _near(found: torch.Tensor, expected: np.ndarray, most: np.ndarray | float) -> bool:
    return bool((np.abs(found.float().cpu().numpy() - expected) <= most).all())  # False for NaN
