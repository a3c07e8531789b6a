"""Rehearse the passes of a compression with zeros for weights, so that a model that does not bear them is refused before any work.

Architectures differ in ways that no list foresees: layers that run twice, states that a layer hands to the next, a head that is
not called. A few tokens show it, and zeros take no time to load: it takes as long as about a hundred tokens of calibration.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bstack.calibration.selftext import rehearse_writing
from bstack.calibration.sensitivity import output_sensitivity
from bstack.calibration.stream import LayerStream
from bstack.errors import UnsupportedModelError, of_the_machine, one_line
from bstack.models.skeleton import Skeleton, zeros_for_weights
from bstk.errors import BstkError

__all__ = ["rehearse"]

SEQUENCES, LENGTH = 2, 8


def rehearse(skeleton: Skeleton, *, writes_text: bool) -> None:
    """Run a few tokens through the model as the stages of a compression do.

    Parameters
    ----------
    skeleton : Skeleton
        The model, nothing loaded.
    writes_text : bool
        Whether the model is to write its calibration text.

    Raises
    ------
    bstk.BstkError
        The model cannot write text.
    bstack.errors.UnsupportedModelError
        The model cannot be run layer by layer.
    """
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    batches = [(torch.arange(SEQUENCES * LENGTH, device=skeleton.device) % vocabulary).view(SEQUENCES, LENGTH)]
    what = f"{skeleton.checkpoint.name} ({type(skeleton.model).__name__})"
    with zeros_for_weights(skeleton), tempfile.TemporaryDirectory(prefix="bstack-") as scratch:
        if writes_text:
            try:
                rehearse_writing(skeleton)
            except Exception as error:
                if of_the_machine(error):
                    raise
                raise BstkError(
                    f"{what} cannot write its own calibration text: {_words(error)}.",
                    hint="Give a calibration text.",
                    option="calibration",
                ) from error
        try:
            output_sensitivity(skeleton, batches, seed=0, scratch=Path(scratch))
            with (
                skeleton.loaded(skeleton.rest_names),
                LayerStream(skeleton, batches, embedding=lambda name: skeleton.loaded([name])) as stream,
            ):
                for index, _ in stream.steps():
                    with skeleton.loaded(skeleton.layer_names(index)):
                        stream.run_all(index)
        except BstkError:
            raise
        except Exception as error:
            if of_the_machine(error):
                raise
            raise UnsupportedModelError(
                f"{what} cannot be compressed: it does not run one layer at a time: {_words(error)}.",
                hint="If the model runs in transformers, please report it; docs/research/architectures.md lists those that work.",
            ) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}".rstrip(".")
