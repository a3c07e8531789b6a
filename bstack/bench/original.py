"""The reference of an original model: its log probabilities on the windows, kept between runs, and the noise floor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bstack.bench.cache import cached
from bstack.bench.quality import Scores
from bstack.bench.reference import Reference, ReferenceWriter, file_bytes, write_reference
from bstack.eval.streamed import altered, run_streamed, to_bfloat16
from bstack.models.skeleton import Skeleton

__all__ = ["original_reference", "reference_key"]


def reference_key(skeleton: Skeleton, windows: torch.Tensor) -> str:
    """What decides the log probabilities: the checkpoint's digests, its code, the token ids, and who computes."""
    code = skeleton.checkpoint.code
    about = {
        "model": skeleton.checkpoint.provenance(),
        "windows": list(windows.shape),
        "ids": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        **({} if code is None else {"code": code.to_json()}),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def original_reference(
    skeleton: Skeleton, windows: torch.Tensor, scratch: Path, progress: Callable[[], None] = lambda: None
) -> Reference:
    """Open the reference of an original model on these windows, or make it, one layer in memory at a time.

    ``extra`` of it holds the ``original``'s own quality and the ``noise_floor``: the quality of the same model with
    weights and arithmetic in bfloat16 instead of float32, a difference that nobody minds, so what lies below it is not worth bytes.

    Parameters
    ----------
    skeleton : Skeleton
        The original, nothing loaded.
    windows : torch.Tensor
        Token ids, int64, shape (windows, length).
    scratch : Path
        For a reference too large to keep.
    progress : callable
        Called after each layer of each of two passes, when it is made.
    """
    key = reference_key(skeleton, windows)
    vocabulary = skeleton.model.config.get_text_config().vocab_size

    def make(path: Path) -> Reference:
        own = Scores(windows, None)

        def fill(writer: ReferenceWriter) -> None:
            def take(number: int, logits: torch.Tensor) -> None:
                writer.add(number, logits)
                own.add(number, logits)

            run_streamed(skeleton, windows, take, progress=progress)

        def extra(half: Reference) -> dict[str, Any]:
            rounded = Scores(windows, half)
            run_streamed(skeleton, windows, rounded.add, loaded=altered(skeleton, to_bfloat16), progress=progress)
            return {"original": own.quality().to_json(), "noise_floor": rounded.quality().to_json()}

        return write_reference(path, key, len(windows), fill, extra)

    return cached(key, file_bytes(*windows.shape, vocabulary), scratch, make)
