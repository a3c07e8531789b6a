"""Load a .bstk file as a transformers model, and change the size that it has in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from decimal import Decimal
from typing import Any

import torch

import bstk
from bstack.engine import graph_step, llama_step
from bstack.engine.container import dense_model, embedded_files, load_tokenizer
from bstack.engine.packed_model import packed_model
from bstack.engine.url_cache import KeptCopyError, cached
from bstack.models.code import check_trust, stage_code
from bstack.packed.backends import (
    LESS,
    Backend,
    CpuBackend,
    activation_type,
    backend_of,
    check_room,
    device_of,
    on_device,
)
from bstack.packed.lock import PriorityLock
from bstack.packed.store import BlockStore
from bstack.progress import ByteProgress, no_progress
from bstk.budget import budget_of
from bstk.errors import UsageError

__all__ = ["attach", "load"]

# "stack" is the old name of "packed".
MODES = {"dense": "dense", "packed": "packed", "stack": "packed"}


def load(
    path: str | os.PathLike[str],
    *,
    mb: int | float | str | Decimal | None = None,
    mode: str = "dense",
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    fused: bool = True,
    strict: bool = False,
    trust_remote_code: bool = False,
    code: str | os.PathLike[str] | None = None,
    warn: bool = True,
    notify: Callable[[str], None] | None = None,
    progress: ByteProgress = no_progress,
    budget: int | None = None,
) -> tuple[Any, Any]:
    """Load a .bstk file as a transformers model.

    Parameters
    ----------
    path : path or URL
        The container. Of a URL only what `mb` needs is fetched, and kept in ``bstack/models`` in $XDG_CACHE_HOME or
        ~/.cache: a later call fetches only what is missing there.
    mb, budget : number or str, int
        Use the blocks of the largest prefix that fits this many MB (2**20 bytes), or bytes, in the file and as blocks in
        memory. By default all in the file.
    mode : str
        ``dense``: weights are rebuilt, so the model takes the memory of the original; `mb` decides the quality.
        ``packed``: weights stay packed, so it takes `mb` and a little, and `resize` changes its size while it runs.
    dtype : torch.dtype or str, optional
        Of activations, and of dense weights. By default float32; for packed weights on a GPU that has it bfloat16.
    device : str or torch.device
        ``cpu``, or a GPU; ``mode="packed"`` runs on ``cuda`` with the extra ``cuda`` or ``gpu``.
    fused : bool
        Let packed models of the Llama family decode a token in one call of the C kernels, and those on a GPU by CUDA graphs.
        Modules that are changed or hooked after loading do not count then; give False to change them.
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
        Called with one line about each retry of a URL.
    progress : callable
        Called with "fetch" and the bytes to fetch from a URL; returns a context manager, whose value is called with the
        bytes of each piece.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode, with `generate`.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        None when the original had none.

    Notes
    -----
    Set the environment variable ``OMP_WAIT_POLICY=PASSIVE`` before torch is imported, as the command line does: torch's
    threads otherwise spin while they wait and take the cores from the packed kernels (docs/results.md).

    Raises
    ------
    bstk.UsageError
        For an unknown mode or type, or a missing device; before anything is read.
    bstk.BudgetError
        When the base model is larger than `mb`.
    bstk.RemoteError
        When the URL cannot be read.
    bstack.errors.ForeignCodeError
        When the model needs such code and may not run it.
    bstk.BstkError
        For a file that is partial, unreadable or damaged.
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise UsageError(
            f"dtype is {dtype!r}; allowed are torch's floating types, such as torch.bfloat16 or 'bfloat16'."
        )
    if mode not in MODES:
        raise UsageError(f"mode is {mode!r}; allowed are 'dense' and 'packed'.")
    packed = MODES[mode] == "packed"
    if mb is not None or budget is not None:
        budget = budget_of(mb, budget)
    code = None if code is None else os.fspath(code)
    check_trust(trust_remote_code, code)
    device = device_of(device, packed)
    dtype = dtype or (activation_type(device) if packed else torch.float32)

    def load_once() -> tuple[Any, Any]:
        with ExitStack() as stack:
            fetched = None
            if isinstance(path, str) and bstk.is_url(path):
                fetched = budget
                file, chunks = stack.enter_context(
                    cached(path, budget, strict, warn, notify, progress, model_only=packed)
                )
            else:
                file = stack.enter_context(bstk.open(path, strict=strict, warn=warn))
                chunks = file.chunks[: file.fit(budget=budget).chunks]
            with embedded_files(file) as folder:
                trusted = stage_code(file, folder, trust_remote_code, code)
                tokenizer = load_tokenizer(folder, file.source.name, trusted)
                if not packed:
                    return dense_model(file, chunks, folder, dtype, trusted).to(device), tokenizer
                check_room(device, file, budget)
                backend = backend_of(device, sum(chunk.is_block and chunk.level == 0 for chunk in file.chunks))
                model, matrices, lock = packed_model(file, folder, dtype, backend, trusted)
            attach(model, file, matrices, lock, backend, stack, budget=budget, fetched=fetched, fused=fused)
            return model, tokenizer

    with on_device(device, "model", LESS if packed else "mode='packed' takes less, or a smaller dtype."):
        try:
            return load_once()
        except KeptCopyError:  # dropped from the cache, so it is fetched again
            return load_once()


def attach(
    model: Any,
    file: bstk.Reader,
    matrices: dict[str, Any],
    lock: PriorityLock,
    backend: Backend,
    stack: ExitStack,
    *,
    budget: int | None,
    fetched: int | None,
    fused: bool,
) -> None:
    """Give a packed model its store, and read the blocks within a budget; what is open in `stack` stays so, to grow from."""
    opened = ExitStack()
    free, arena = backend.free_memory, backend.arena()
    store = BlockStore(file, matrices, lock, arena, close=opened.close, fetched=fetched, free_memory=free)
    store.resize(budget)
    install = llama_step.install if isinstance(backend, CpuBackend) else graph_step.install
    model.bstack_unfused = install(model, lock) if fused else "fused=False"
    opened.push(stack.pop_all())
    model.bstack_store = store
    model.save_pretrained = model.state_dict = _refuse_to_save


def _refuse_to_save(*_args: Any, **_kwargs: Any) -> Any:
    raise UsageError(
        "this model's weights are packed, so it has no state to save.",
        hint="Keep the .bstk file, or save a model from bstack.load(..., mode='dense').",
    )
