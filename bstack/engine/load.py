"""A .bstk file as a transformers model, and the size it has in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from decimal import Decimal
from functools import partial
from typing import Any

import torch

import bstk
from bstack.engine.container import embedded_files, load_tokenizer
from bstack.engine.dense import dense_model
from bstack.engine.llama_step import install
from bstack.engine.packed_model import stacked_model
from bstack.engine.url_cache import KeptCopyError, cached
from bstack.models.code import check_trust, stage_code
from bstack.packed.backends import device_of, place_of
from bstack.packed.store import BlockStore, Resident, store_of
from bstk import urls
from bstk.errors import UsageError

__all__ = ["load", "resident", "resize"]

MODES = ("dense", "stack")


def load(
    path: str | os.PathLike[str],
    *,
    mb: int | float | str | Decimal | None = None,
    mode: str = "dense",
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    strict: bool = False,
    trust_remote_code: bool = False,
    code: str | os.PathLike[str] | None = None,
    warn: bool = True,
    notify: Callable[[str], None] | None = None,
) -> tuple[Any, Any]:
    """Load a .bstk file as a transformers model.

    Parameters
    ----------
    path : path or URL
        The container. Of a URL only what `mb` needs is fetched, and kept in ``bstack/models`` in $XDG_CACHE_HOME or
        ~/.cache: a later call fetches only what is missing there.
    mb : number or str, optional
        Use the blocks of the largest prefix that fits this many MB (2**20 bytes), in the file and as blocks in memory.
        By default all that are there.
    mode : str
        ``dense``: weights are rebuilt, so the model takes the memory of the original; `mb` decides the quality.
        ``stack``: weights stay packed, so it takes `mb` and a little, and `resize` changes its size while it runs.
    dtype : torch.dtype or str
        Of activations, and of dense weights.
    device : str or torch.device
        ``cpu``, or a GPU; ``mode="stack"`` runs on ``cuda`` with triton.
    strict : bool
        Refuse a partial file.
    trust_remote_code : bool
        Whether Python code that is not in transformers may run, if the model needs it; a
        `bstack.errors.ForeignCodeWarning` then says which.
    code : path or str, optional
        The folder or hub id with that code. No .bstk file holds any; the default is the hub id from which the model was
        compressed.
    warn : bool
        Warn about a partial file, as `bstk.open` does.
    notify : callable, optional
        Called with one line about each retry of a URL; on a terminal the progress line shows them while blocks are fetched.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode, with `generate`.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        None when the original had none.

    Raises
    ------
    bstk.UsageError
        For an unknown mode or type, or a device that is not here; before anything is read.
    bstk.BudgetError
        When the smallest model is larger than `mb`.
    bstk.RemoteError
        When the URL cannot be read.
    bstack.errors.ForeignCodeError
        When the model needs such code and may not run it.
    bstk.BstkError
        For a file that is not whole, not readable or damaged.
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(
            f"dtype is {dtype!r}; allowed are torch's floating types, such as torch.bfloat16 or 'bfloat16'."
        )
    if mode not in MODES:
        raise UsageError(f"mode is {mode!r}; allowed are {' and '.join(MODES)}.")
    code = None if code is None else os.fspath(code)
    check_trust(trust_remote_code, code)
    device = device_of(device, packed=mode == "stack")
    read = partial(
        _read,
        path,
        mb=mb,
        mode=mode,
        dtype=dtype,
        device=device,
        strict=strict,
        trusted=trust_remote_code,
        code=code,
        warn=warn,
        notify=notify,
    )
    try:
        return read()
    except KeptCopyError:  # it is dropped, and fetched anew
        return read()


def _read(
    path: Any,
    *,
    mb: Any,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    strict: bool,
    trusted: bool,
    code: str | None,
    warn: bool,
    notify: Callable[[str], None] | None,
) -> tuple[Any, Any]:
    with ExitStack() as stack:
        if urls.is_url(path):
            file, chunks = stack.enter_context(cached(path, mb, strict, warn, notify))
        else:
            file = stack.enter_context(bstk.open(path, strict=strict, warn=warn))
            chunks = file.chunks[: file.fit(mb).chunks]
        with embedded_files(file) as folder:
            trusted = stage_code(file, folder, trusted, code)
            tokenizer = load_tokenizer(folder, file.source.name, trusted)
            if mode == "dense":
                return dense_model(file, chunks, folder, dtype, trusted).to(device), tokenizer
            place = place_of(device, sum(chunk.is_block and chunk.level == 0 for chunk in file.chunks))
            model, matrices, gate = stacked_model(file, folder, dtype, place, trusted)
        opened = ExitStack()
        fetched = mb if urls.is_url(path) else None
        store = BlockStore(file, matrices, gate, place.arena(), close=opened.close, fetched=fetched)
        store.resize(mb)
        install(model, gate)
        opened.push(stack.pop_all())  # the file stays open, to grow from
        model.bstack_store = store
        model.save_pretrained = model.state_dict = _refuse_to_save
        return model, tokenizer


def resize(model: Any, mb: int | float | str | Decimal | None = None, *, wait: bool = True) -> Resident:
    """Change how much of a model is in memory, while it runs if need be, from any thread.

    Dropped blocks have gone back to the system on return. Missing ones are read from the file in a thread of their own,
    and each counts from the next product on. Text and caches of keys and values that exist stay as they are
    (docs/running.md says what that means).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From ``load(..., mode="stack")``.
    mb : number or str, optional
        The new budget in MB, as for `load`; None for all that the file has.
    wait : bool
        Return only when everything is loaded, or another call has taken the place of this one.

    Returns
    -------
    Resident
        What is in memory on return.

    Raises
    ------
    bstk.UsageError
        The budget is nonsense or more than was fetched, or the model has dense weights.
    bstk.BudgetError
        The smallest model is larger than `mb`. Nothing has changed.
    bstk.DamagedError, OSError, MemoryError
        A block could not be read. The model keeps the blocks it has and runs on.
    bstk.ResourceError
        The system starts no further thread to load blocks. The model keeps the blocks it has.
    """
    store = store_of(model)
    store.resize(mb, wait=wait)
    return store.state


def _refuse_to_save(*_args: Any, **_kwargs: Any) -> Any:
    raise UsageError(
        "this model's weights are packed, so it has no state to save: keep the .bstk file, or save a model from "
        "bstack.load(..., mode='dense')."
    )


def resident(model: Any) -> Resident:
    """What of a model is in memory; raises bstk.UsageError for one with dense weights."""
    return store_of(model).state
