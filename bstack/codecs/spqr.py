"""SpQR: small groups of 3 or 4 bits with outliers apart (arXiv 2306.03078), and trellis blocks on top of them.

    level 0   dense part: groups of inputs with a scale and a zero point each, both codes of 3 bits
    next      outliers: what the dense part lacks at the places where a group would suffer most; none, no block
    above     trellis blocks of what these two leave

The encoder takes the columns in order of falling Hessian and feeds each column's error on to the later ones
(`bstack.numerics.feedback`). Which weights are outliers is decided before: a leave-one-out test
(`bstack.numerics.outliers`) in units of the predicted divergence, with one threshold for all matrices of a layer.
docs/quality.md has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

import bstk
from bstack.codecs.contract import Block, Codec, Task
from bstack.codecs.spqr_columns import Damped, bounded, code_columns, damped
from bstack.codecs.spqr_target import Shape, check_target, check_target_of_layers, range_of
from bstack.codecs.trellis import TrellisCodec
from bstack.errors import CodecError
from bstack.kernels.matrix import PLAIN, Matrix
from bstack.kernels.multiply import decode_rows
from bstack.kernels.spqr import GROUPS, MAX_SPARSE_COLUMNS, Outliers, outlier_bytes, rank_of
from bstack.numerics.errors import output_errors
from bstack.numerics.outliers import MOST_OF_A_GROUP, outlier_scores
from bstack.settings import Settings

__all__ = ["SpqrCodec"]

# Share of the weights that the paper keeps apart, at most.
AUTO_SHARE = 0.01
PLANES = 2
MOST_PLANES = 14  # a stack has 16 blocks
# Thresholds are numbered by this many to an octave, from 2^-LOWEST on.
TO_AN_OCTAVE, LOWEST = 1024, 200
PLACES = 2 * LOWEST * TO_AN_OCTAVE
BYTES_OF_AN_OUTLIER = 4


class SpqrCodec(Codec):
    """SpQR blocks and residual planes.

    Parameters
    ----------
    bits : int
        Of a code, 3 or 4.
    group : int
        Inputs that share a scale and a zero point: 16, 32, 64 or 128.
    outliers : float or "auto"
        Share of the weights of each layer that are kept apart, 0 to .5; auto is 1 %, or what `bpw` leaves room for.
    bpw : float, optional
        Bits per weight that dense part and outliers of each layer may take, everything counted; in place of a share.
    planes : int
        Trellis blocks on top, 0 to 14.
    threshold : int, optional
        What `for_layer` found; without it each matrix has the share for itself.

    Raises
    ------
    bstack.errors.CodecError
    """

    name = "spqr"
    kinds = (bstk.SPQR,)

    def __init__(
        self,
        bits: int = 4,
        group: int = 16,
        outliers: float | str | None = None,
        bpw: float | None = None,
        planes: int = PLANES,
        threshold: int | None = None,
    ):
        if bits not in (3, 4):
            raise CodecError(f"bits is {bits}; the spqr codec takes 3 or 4.")
        if group not in GROUPS:
            raise CodecError(f"group is {group}; the spqr codec takes {', '.join(map(str, GROUPS))}.")
        if not 0 <= planes <= MOST_PLANES:
            raise CodecError(f"planes is {planes}; the spqr codec takes 0 to {MOST_PLANES} (2 bits per weight each).")
        outliers = "auto" if outliers is None else outliers
        if bpw is not None and outliers != "auto":
            raise CodecError(
                f"outliers is {outliers} and bpw is {bpw}; give one: --bpw decides how many outliers there are."
            )
        if outliers != "auto" and not (isinstance(outliers, (int, float)) and 0 <= outliers <= 0.5):
            raise CodecError(
                f"outliers is {outliers!r}; the spqr codec takes a share of the weights, 0 to 0.5, or auto."
            )
        if bpw is not None:
            check_target(bpw, bits, group)
        self.bits, self.group, self.outliers, self.bpw, self.planes = bits, group, outliers, bpw, planes
        self.threshold = threshold

    @classmethod
    def from_settings(cls, settings: Settings) -> SpqrCodec:
        cls.refuse_foreign(settings)
        names = ("bits", "group", "outliers", "bpw", "planes")
        codec = cls(**{name: value for name in names if (value := getattr(settings, name)) is not None})
        # Only groups that are cut off at a matrix's end have room for a larger share.
        if codec.outliers != "auto" and codec.outliers > (most := MOST_OF_A_GROUP / codec.group):
            raise CodecError(
                f"outliers is {codec.outliers}; with groups of {codec.group} it is at most {most:g}, as at most {MOST_OF_A_GROUP} of a group "
                "are kept apart."
            )
        return codec

    def settings(self) -> dict[str, Any]:
        # With a target there is no share to record, also where auto was given in words.
        share = self.outliers if self.bpw is None else None
        return {
            "codec": self.name,
            "bits": self.bits,
            "group": self.group,
            "outliers": share,
            "bpw": self.bpw,
            "planes": self.planes,
        }

    def for_tables(self) -> Codec:
        """Embeddings and heads are stacks of the default codec: they are cut into finer steps."""
        return TrellisCodec()

    def check_shapes(self, layers: Iterable[Sequence[Sequence[Shape]]]) -> None:
        layers = list(layers)
        for layer in layers:
            for shapes in layer:
                _check_width(min(shapes, key=lambda shape: shape[1]))
        if self.bpw is not None:
            check_target_of_layers(self.bpw, self.bits, self.group, layers)

    def for_layer(self, tasks: Iterable[Task]) -> SpqrCodec:
        """Find the threshold that gives all matrices of a layer together the outliers that they may have."""
        prices = np.zeros(PLACES, np.int64)
        shapes = []
        for task in tasks:
            shapes.append(tuple(task[0].shape))
            _check_width(shapes[-1])
            prices += self._prices(self.outlier_places(*task)[0])
        return SpqrCodec(
            self.bits, self.group, self.outliers, self.bpw, self.planes, _threshold(prices, self._allowed(shapes))
        )

    def encode(
        self, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> Iterator[Block]:
        shape = tuple(weight.shape)
        _check_width(shape)
        places, trusted = self.outlier_places(weight, hessian, tokens, importance)
        threshold = self.threshold
        if threshold is None:
            threshold = _threshold(self._prices(places), self._allowed([shape]))
        apart = places >= threshold
        dense, values, rows, columns, added = code_columns(weight, trusted, apart, importance, self.bits, self.group)
        residual = weight - values
        rank = rank_of(self.bits, self.group)
        yield Block(dense.pack(rank), bstk.SPQR, rank, output_errors(residual, hessian))
        if len(added):
            residual[rows, columns] -= added.float()
            outliers = Outliers(_pointer(rows, shape[0]), columns.numpy(), added.numpy())
            yield Block(outliers.pack(), bstk.OUTLIERS, 0, output_errors(residual, hessian))
        if self.planes:
            yield from TrellisCodec(self.planes).encode(residual, hessian, tokens, importance)

    @staticmethod
    def rebuild(
        payloads: Sequence[bytes], kinds: Sequence[bstk.Kind], ranks: Sequence[int], shape: tuple[int, int]
    ) -> torch.Tensor:
        below = sum(kind is not bstk.TRELLIS for kind in kinds)
        blocks = zip(kinds[:below], ranks[:below], payloads[:below], strict=True)
        matrix = Matrix.of(*shape, [(kind.code, rank, payload) for kind, rank, payload in blocks])
        total = torch.from_numpy(decode_rows(matrix, PLAIN, 0, matrix.rows))
        if below < len(kinds):  # of which there may be more than a packed matrix takes
            total += TrellisCodec.rebuild(payloads[below:], kinds[below:], ranks[below:], shape)
        return total

    def outlier_places(
        self, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> tuple[torch.Tensor, Damped]:
        """Each weight's score as an outlier, numbered on a logarithmic scale: int64, shape (outputs, inputs).

        Parameters are those of `encode`. The Hessian made ready comes with it.
        """
        trusted = damped(hessian, tokens)
        scores = outlier_scores(weight[:, trusted.order], trusted.cost, self.group, 2**self.bits - 1)
        # Half the importance, by token: the predicted divergence, in the same unit for all matrices of a layer.
        scores *= (bounded(importance) * (0.5 / max(tokens, 1)))[:, None]
        numbers = ((scores.double().clamp_min(1e-300).log2() + LOWEST) * TO_AN_OCTAVE).clamp_(0, PLACES - 1).long()
        places = torch.empty_like(numbers)
        places[:, trusted.order] = numbers
        return places, trusted

    def _prices(self, places: torch.Tensor) -> np.ndarray:
        """What the outliers at each place cost one matrix: their count, or with `bpw` their bytes; int64, shape (PLACES,)."""
        counts = np.bincount(places.reshape(-1).numpy(), minlength=PLACES)
        if self.bpw is None:
            return counts
        counts *= BYTES_OF_AN_OUTLIER
        counts[int(places.max())] += outlier_bytes(len(places), 0)  # the first of a matrix brings the row pointer
        return counts

    def _allowed(self, shapes: Sequence[Shape]) -> int:
        """What outliers of matrices of these shapes may cost together, in the unit of `_prices`."""
        weights = sum(math.prod(shape) for shape in shapes)
        if self.bpw is None:
            return int((AUTO_SHARE if self.outliers == "auto" else self.outliers) * weights)
        if not shapes:
            return 0
        least, _ = range_of(shapes, self.bits, self.group)
        if self.bpw < least:
            raise CodecError(
                f"bpw is {self.bpw}, but the {len(shapes)} matrices of a layer here take {least:.4f} bits per weight "
                "without any outlier, with the order of their inputs counted. Give more"
                f"{', or --bits 3' if self.bits == 4 else ''}."
            )
        return int((self.bpw - least) * weights / 8)


def _threshold(prices: np.ndarray, allowed: int) -> int:
    """The smallest threshold above 0 at which the scores that reach it cost no more than `allowed`."""
    reaching = prices[::-1].cumsum()[::-1]
    return max(1, int((reaching > allowed).sum()))


def _pointer(rows: torch.Tensor, count: int) -> np.ndarray:
    pointer = np.zeros(count + 1, np.uint32)
    pointer[1:] = torch.bincount(rows, minlength=count).cumsum(0).numpy()
    return pointer


def _check_width(shape: Shape) -> None:
    if shape[1] > MAX_SPARSE_COLUMNS:
        raise CodecError(
            f"a linear has {shape[1]} inputs; the spqr codec numbers them with 16 bits, up to {MAX_SPARSE_COLUMNS}. Use --codec trellis."
        )
