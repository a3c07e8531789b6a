"""Products with packed matrices, and the encoder's search, on an NVIDIA GPU: the CUDA kernels of this folder, and what calls them.

The sources are package data, because NVRTC compiles them at first use, for the GPU at hand (`bstack.kernels.cuda.driver`).
They use few words of CUDA, which tests/helpers/cuda_on_cpu.h gives a meaning in C++: the same sources and the code here are
tested on a CPU.

Sums are made in single precision where the CPU's kernels use integers: results agree to rounding, not to the bit. Rotations to
float32 have the CPU's bits, and so has the search of up to SEGMENT rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from ctypes import c_float, c_int
from pathlib import Path
from typing import Any

import torch

from bstack.kernels.matrix import PLAIN, ROTATED
from bstack.kernels.reference import EARLIER5
from bstack.kernels.table import DeviceMatrix, Stacked

__all__ = ["KERNELS", "MARGIN", "SEGMENT", "THREADS", "Kernels", "block_threads", "first_segment", "source"]

SOURCES = ("common.cu", "trellis.cu", "plain.cu", "rotate.cu", "step.cu", "encode.cu")
KERNELS = (
    *(f"multiply_{inputs}_{tokens}" for inputs in ("rotated", "plain") for tokens in (1, 2, 4, 8)),
    *("multiply_rotated_any", "decode_rotated_words", "decode_rotated_any", "decode_plain", "rotate", "butterfly"),
    *("prepare", "heads", "attend_1", "attend_4", "attended", "activated", "meet", "search"),
)
# Of the sources: threads of a block of most kernels, columns that one holds in shared memory, and the types of numbers.
THREADS, CHUNK = 128, 8192
# Of the search: rows of a segment, rows to each side of where two meet, and segments of a thread block.
SEGMENT, MARGIN, SEARCHED = 256, 96, 2
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Thread blocks of a launch, for each multiprocessor: each fills its table once and then takes strip after strip of rows.
RESIDENT = 8


def source() -> str:
    """Return the kernels as one program."""
    folder = Path(__file__).parent
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in SOURCES)


def block_threads(kernel: str) -> int:
    """Return the threads of a block of a kernel: a search needs a warp for each segment."""
    return 32 * SEARCHED if kernel == "search" else THREADS


def first_segment(rows: int, turn: int) -> int:
    """Return the rows of the first segment of a search: all, or as many as move the places where segments meet at each turn."""
    return rows if rows <= SEGMENT else SEGMENT - turn * SEGMENT // 4 % SEGMENT


class Kernels:
    """The kernels of one device.

    Parameters
    ----------
    launch : callable
        Called with the name of a kernel, a grid of thread blocks (x, y), and arguments: an int has 64 bits, others are of
        ctypes. It runs the kernel on the current stream.
    multiprocessors : int
        Of the device.
    """

    def __init__(self, launch: Callable[..., None], multiprocessors: int):
        self.launch = launch
        self._blocks = multiprocessors * RESIDENT

    def multiply(
        self, matrix: DeviceMatrix | Stacked, x: torch.Tensor, rotated: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Compute y = x W^T for few tokens, without building W.

        y differs from the product in real numbers by at most ``1e-5 * sum_j |x_j| |W_ij|``, for up to some thousand
        columns, summed over the blocks of W (rotated, for kinds ROTATED).

        Parameters
        ----------
        matrix : DeviceMatrix or Stacked
        x, rotated : torch.Tensor
            Inputs and rotated inputs, float32, contiguous, shape (t, n); fast for t of 1 to 8.
        out : torch.Tensor
            Where y goes, float32, shape (t, m), the last axis contiguous.
        """
        stacked = matrix if isinstance(matrix, Stacked) else matrix.alone
        tokens, add = x.shape[0], 0
        if not tokens:
            return
        together = next((size for size in (1, 2, 4) if tokens <= size), 8)

        def run(name: str, first: torch.Tensor, x: torch.Tensor, y: torch.Tensor, strips: int, rows: int) -> None:
            grid = min(strips, self._blocks), -(-tokens // (1 if name.endswith("any") else together))
            addresses = first.data_ptr(), stacked.table.values.data_ptr(), x.data_ptr(), y.data_ptr()
            sizes = c_int(rows), c_int(stacked.columns), c_int(tokens)
            self.launch(f"multiply_{name}", grid, *addresses, out.stride(0), *sizes, c_int(add))

        if not stacked.kinds.isdisjoint(ROTATED):
            whole = stacked.columns % 16 == 0 and rotated.data_ptr() % 16 == 0
            rows = 4 if whole and together == 8 else 8
            strips = sum(-(-part.rows // rows) for part in stacked.matrices)
            run(f"rotated_{together if whole else 'any'}", stacked.parts, rotated, out, strips, strips)
            add = 1
        for part, start in zip(stacked.matrices, stacked.starts, strict=True):
            own = out[:, start : start + part.rows]
            if not part.kinds.isdisjoint(PLAIN):
                run(f"plain_{together}", part.entry, x, own, -(-part.rows // 16), part.rows)
            elif not add:
                own.zero_()

    def decode(
        self, matrix: DeviceMatrix | Stacked, kinds: Collection[int], index: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Add up rows of a matrix's blocks of some kinds; see `bstack.kernels.multiply.decode_rows`.

        Parameters
        ----------
        matrix : DeviceMatrix or Stacked
            One matrix for kinds PLAIN.
        kinds : collection of int
            ROTATED (of the matrix that multiplies rotated inputs), or PLAIN.
        index : torch.Tensor
            Which rows, int64, contiguous, shape (k,).
        dtype : torch.dtype

        Returns
        -------
        torch.Tensor
            Shape (k, n).
        """
        rotated, wanted = not {*ROTATED}.isdisjoint(kinds), index.numel()
        direct = dtype if dtype in TYPES else torch.float32
        out = torch.empty(wanted, matrix.columns, dtype=direct, device=index.device)
        stacked = matrix if isinstance(matrix, Stacked) else matrix.alone
        places = index.data_ptr(), out.data_ptr()
        if wanted and rotated:
            name = "decode_rotated_any" if matrix.columns % 16 else "decode_rotated_words"
            grid = min(-(-wanted * -(-matrix.columns // 16) // THREADS), self._blocks), 1
            sizes = map(c_int, (wanted, matrix.columns, TYPES[direct]))
            self.launch(name, grid, stacked.parts.data_ptr(), matrix.table.values.data_ptr(), *places, *sizes)
        elif wanted:
            (one,) = stacked.matrices
            grid = min(wanted, self._blocks), -(-matrix.columns // CHUNK)
            sizes = map(c_int, (wanted, matrix.rows, matrix.columns, TYPES[direct]))
            self.launch("decode_plain", grid, one.entry.data_ptr(), *places, *sizes)
        return out.to(dtype)

    def rotate(self, x: torch.Tensor, dtype: torch.dtype = torch.float32, *, undo: bool = False) -> torch.Tensor:
        """Rotate rows x, (t, n), as `bstack.numerics.rotation.rotate`, or undo it; the result is of a given type."""
        given = x if x.dtype in TYPES else x.float()
        given = given.contiguous()
        tokens, columns = given.shape
        bits = (columns & -columns).bit_length() - 1
        inside = min(bits, CHUNK.bit_length() - 1)
        direct = dtype if inside == bits and dtype in TYPES else torch.float32
        out = torch.empty(given.shape, dtype=direct, device=given.device)
        if not tokens:
            return out.to(dtype)

        def last(step: int) -> tuple[Any, Any]:
            return c_float((1 << bits) ** -0.5 if step == bits else 1.0), c_int(undo and step == bits)

        scale, after = last(inside)
        arguments = given.data_ptr(), c_int(TYPES[given.dtype]), out.data_ptr(), c_int(TYPES[direct])
        grid = tokens, -(-columns // CHUNK)
        self.launch("rotate", grid, *arguments, c_int(columns), c_int(inside), scale, c_int(not undo), after)
        for step in range(inside, bits):
            scale, after = last(step + 1)
            grid = tokens, -(-columns // (2 * THREADS))
            self.launch("butterfly", grid, out.data_ptr(), c_int(columns), c_int(1 << step), scale, after)
        return out.to(dtype)

    def encode_columns(
        self, target: torch.Tensor, original: torch.Tensor, *given: torch.Tensor, turn: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the codes of some columns; see `bstack.kernels.encode.encode_columns`."""
        columns, rows = target.shape
        first = first_segment(rows, turn)
        segments = 1 + -(-(rows - first) // SEGMENT)
        arrays = [target, *(array.contiguous() for array in (original, *given))]
        codes = torch.empty(columns, EARLIER5 + rows, dtype=torch.uint8, device=target.device)
        errors = torch.empty(columns, rows, device=target.device)
        states = torch.empty(segments, dtype=torch.int32, device=target.device)
        addresses = [array.data_ptr() for array in (*arrays, codes, errors, states)]
        for column in range(columns + 1):
            sizes = c_int(columns), c_int(rows), c_int(column), c_int(first)
            if segments > 1 and column < columns:
                self.launch("meet", (-(-(segments - 1) // (THREADS // 32)), 1), *addresses, *sizes)
            self.launch("search", (-(-segments // SEARCHED), 1), *addresses, *sizes)
        return codes, errors
