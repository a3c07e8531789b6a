"""A model of SpQR blocks with packed weights: dense part, outliers and planes, at every size it can have."""

import pytest
import samples
import torch
from cache_name import CACHE
from packed_models import logits

import bstack
import bstk
from bstack.kernels.native import library
from bstack.models.kv_cache import growing_cache

IDS = torch.tensor([[5, 9, 44, 7, 101, 3, 8, 77, 12, 60, 61, 4]])


@pytest.fixture(params=["spqr", "spqr, no outliers"])
def path(request, file_of):
    return file_of("llama", codec=request.param)


def sizes(path):
    """Budgets in MB: the smallest, one block more each time, and everything."""
    with bstk.open(path) as file:
        blocks = [number for number, chunk in enumerate(file.chunks) if chunk.is_block]
        first = file.base.chunks
        found = [file.base.budget]
        for number in [b for b in blocks if b >= first][::5]:
            found.append(found[-1] + 1)
            while file.fit(found[-1] / bstk.MB).chunks <= number and found[-1] < file.complete.budget:
                found[-1] += file.chunks[number].raw_length
        return [budget / bstk.MB for budget in (*found, file.complete.budget)]


def test_the_file_has_all_three_kinds(file_of):
    with bstk.open(file_of("llama", codec="spqr")) as file:
        kinds = {chunk.kind for chunk in file.chunks if chunk.is_block}
        assert {bstk.SPQR, bstk.OUTLIERS, bstk.TRELLIS5} <= kinds
        smallest = [chunk for chunk in file.chunks[: file.base.chunks] if chunk.is_block]
        assert bstk.OUTLIERS not in {chunk.kind for chunk in smallest}


def test_without_outliers_planes_stand_on_the_dense_part(file_of):
    with bstk.open(file_of("llama", codec="spqr, no outliers")) as file:
        assert {
            tuple(chunk.kind for chunk in samples.chunks_of(file, name))
            for name in dict.fromkeys(chunk.name for chunk in file.chunks)
            if samples.chunks_of(file, name)[0].kind is bstk.SPQR
        } == {(bstk.SPQR, bstk.TRELLIS5)}
        assert file.preamble.incompatible == bstk.SPQR.feature | bstk.TRELLIS5.feature
        file.verify()


@pytest.mark.parametrize("tokens", [1, pytest.param(5, marks=pytest.mark.slow), 12])
def test_packed_agrees_with_dense_at_every_size(path, tokens):
    model, _ = bstack.load(path, mode="packed", mb=sizes(path)[0])
    assert bstack.resident(model).blocks < bstack.resident(model).all_blocks
    seen = []
    for mb in (*sizes(path), *reversed(sizes(path))):
        bstack.resize(model, mb)
        dense, _ = bstack.load(path, mb=mb)
        expected = logits(dense, IDS[:, :tokens])
        assert (logits(model, IDS[:, :tokens]) - expected).abs().max() <= 1e-3 * expected.std()
        seen.append(logits(model, IDS[:, :tokens]))
    assert torch.equal(seen[0], seen[-1]) and not torch.equal(seen[0], seen[len(seen) // 2])


@pytest.mark.skipif(library() is None, reason="the C kernels are not built")
def test_a_step_in_c_gives_the_models_own_logits(path):
    for mb in (sizes(path)[0], None):
        fast, slow = (bstack.load(path, mode="packed", mb=mb)[0] for _ in range(2))
        del slow.forward  # that of its class remains; a model without the fast path has none to delete
        caches = [growing_cache(model) for model in (fast, slow)]
        with torch.no_grad():
            for model, cache in zip((fast, slow), caches, strict=True):
                model(IDS, **{CACHE: cache}, use_cache=True)
            for token in range(3, 9):
                word = torch.tensor([[token]])
                found, expected = (
                    m(word, **{CACHE: c}, use_cache=True).logits for m, c in zip((fast, slow), caches, strict=True)
                )
                assert (found - expected).norm() <= 1e-2 * expected.norm()
