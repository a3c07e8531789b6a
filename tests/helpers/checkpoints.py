"""A checkpoint's logits as transformers reads it and as bstack does."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers

import bstk
from bstack.eval.streamed import run_streamed
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton

IDS = torch.randint(3, tiny_models.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


def noise(like, seed=9):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def theirs(folder, ids=IDS):
    """The logits of transformers."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(ids).logits


def ours(folder, ids=IDS):
    """The logits of the original as bstack reads it, layer by layer, as for ``bench --original``."""
    found = []
    run_streamed(Skeleton(open_checkpoint(folder)), ids, lambda _, logits: found.append(logits.clone()))
    return torch.stack(found)


def same(folder):
    return torch.allclose(ours(folder), theirs(folder), atol=1e-5, rtol=1e-5)


def refusal(folder, kind=bstk.BstkError):
    with pytest.raises(kind) as caught:
        Skeleton(open_checkpoint(folder))
    return str(caught.value)
