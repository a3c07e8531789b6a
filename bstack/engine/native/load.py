"""Open a .bstk file for the native engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from decimal import Decimal
from typing import Any

import bstk
from bstack.engine.native.architecture import NotNativeError, read_json
from bstack.engine.native.families import describe
from bstack.engine.native.generate import TextTokenizer
from bstack.engine.native.model import NativeModel
from bstack.engine.native.sampling import Generation
from bstack.engine.native.weights import Host, read_weights
from bstack.engine.url_cache import KeptCopyError, cached
from bstack.errors import require
from bstack.memory.free import free_memory
from bstack.memory.process import no_large_blocks_in_heaps
from bstack.packed.arena import Arena
from bstack.packed.store import BlockStore
from bstack.progress import ByteProgress, no_progress
from bstk.budget import budget_of

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    mb: int | float | str | Decimal | None = None,
    strict: bool = False,
    warn: bool = True,
    notify: Callable[[str], None] | None = None,
    progress: ByteProgress = no_progress,
    budget: int | None = None,
    wait: bool = True,
    device: Any = "cpu",
) -> tuple[NativeModel, TextTokenizer | None]:
    """Load a .bstk file without transformers, and for the CPU without torch; its weights stay packed.

    It runs on `device`: ``cpu``, ``cuda`` or ``cuda:N``. The other parameters are those of `bstack.load`; `bstack.resize` and `bstack.following` take the model. Without `wait`, a model behind
    a URL is returned with what is there when its base model has arrived, and grows while the rest does; `notify` then receives a
    line if the rest cannot be fetched. Returns the model with its tokenizer, None if the file has none.

    Raises
    ------
    NotNativeError
        The engine does not compute what this model's files ask for; its `reason` says what.
    bstk.BudgetError, bstk.RemoteError, bstk.BstkError
        As `bstack.load`.
    """
    if mb is not None or budget is not None:
        budget = budget_of(mb, budget)

    place, guard = (_cpu, nullcontext()) if str(device) == "cpu" else _gpu(device)

    def load_once() -> tuple[NativeModel, TextTokenizer | None]:
        with ExitStack() as stack:
            fetched = here = None
            if isinstance(path, str) and bstk.is_url(path):
                fetched = budget
                settings = {"model_only": True, "ahead": not wait}
                file, chunks = stack.enter_context(cached(path, budget, strict, warn, notify, progress, **settings))
                here = file.cut(len(chunks)).budget
            else:
                file = stack.enter_context(bstk.open(path, strict=strict, warn=warn))
                file.fit(budget=budget)
            architecture = describe(read_json(file, "config.json"))
            if architecture.layers > len(file.chunks):
                raise NotNativeError("config.json asks for more layers than the file has chunks")
            generation, tokenizer = Generation.read(file), TextTokenizer.read(file)
            make, arena, free, model_of = place(file, budget)
            weights, matrices, lock = read_weights(file, architecture.shapes(), make)
            opened = ExitStack()
            store = BlockStore(file, matrices, lock, arena, close=opened.close, fetched=fetched, free_memory=free)
            if here is not None:
                store.resize(here)  # a damaged kept block is found here
            store.resize(budget, wait=wait or here is None)
            model = model_of(architecture, weights, lock, store, generation)
            opened.push(stack.pop_all())  # the file stays open, to grow from
            return model, tokenizer

    with guard, no_large_blocks_in_heaps():  # the reading threads' heaps would keep megabytes
        try:
            return load_once()
        except KeptCopyError:  # dropped from the cache, so it is fetched again
            return load_once()


def _cpu(_file: bstk.Reader, _budget: int | None) -> tuple[Any, ...]:
    """Return what makes weights, memory for blocks, what tells how much there is, and what makes the model."""
    return Host(), Arena(), free_memory, NativeModel


def _gpu(device: Any) -> tuple[Callable[[bstk.Reader, int | None], tuple[Any, ...]], AbstractContextManager[None]]:
    """Return a function as `_cpu` for a device, which has to be there, and what names its failures."""
    require("Running on a GPU", "cuda", ("torch",))
    from bstack.engine.native.device import loading, place

    return place(device), loading(device)
