"""How much memory a model gets: a number, what is free at the start, or what is free at any time."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import bstk
from bstack.memory.free import free_memory
from bstack.runtime.load import residence_of
from bstack.runtime.memory import default_margin
from bstack.runtime.policy import first_budget
from bstack.runtime.watch import Watcher

__all__ = ["following", "free_budget"]


def free_budget() -> tuple[Decimal | None, str]:
    """Megabytes that a model may take now, and words on why; None where the system does not tell.

    May be less than the smallest model, or not positive.
    """
    memory = free_memory()
    if memory is None:
        return None, "the system does not tell how much memory is free"
    margin = default_margin(memory)
    words = f"{memory.free / bstk.MB:,.0f} MB are free ({memory.source}), {margin / bstk.MB:,.0f} MB of them stay so"
    return Decimal(first_budget(memory, margin)) / bstk.MB, words


def following(model: Any, tell: Callable[[str], None]) -> Watcher:
    """A watcher that resizes a model as memory becomes scarce or free, for the length of a `with` block.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From ``bstack.load(..., mode="stack")``.
    tell : callable
        Receives warnings, one line each.
    """
    residence = residence_of(model)
    file = residence.file

    def resize(budget: int) -> None:
        # Not waiting: while it grows the watcher goes on watching, and may change its mind.
        if error := residence.state.error:
            tell(f"The model could not grow: {error}")
        residence.resize(Decimal(budget) / bstk.MB, wait=False)

    return Watcher(
        resize,
        lambda: residence.state.target_bytes,
        smallest=file.smallest.budget,
        largest=file.fit(None).budget,
        tell=tell,
    )
