"""Zero-shot tasks through lm-eval, EleutherAI's evaluation harness (an optional package)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from bstack.errors import MissingPackageError
from bstack.measure.estimates import Estimate

__all__ = ["check_harness", "run_tasks"]

# What is shown of a task that reports several figures: the first of these that it has.
METRICS = ("acc", "exact_match", "acc_norm", "perplexity", "word_perplexity")


def check_harness() -> None:
    """Raise bstack.errors.MissingPackageError unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("--tasks needs the package lm-eval: pip install 'bstack[tasks]'")


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[str]) -> dict[str, Estimate]:
    """Run tasks on a loaded model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    tasks : sequence of str
        Names that lm-eval knows; their data are fetched by it.

    Returns
    -------
    dict of str to Estimate
        ``task metric`` -> its value and lm-eval's standard error.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    results = simple_evaluate(model=wrapped, tasks=list(tasks), bootstrap_iters=1000)["results"]
    return {f"{task} {name}": estimate for task in tasks for name, estimate in [_headline(results[task])]}


def _headline(figures: dict[str, Any]) -> tuple[str, Estimate]:
    # Keys are "metric,filter" and "metric_stderr,filter".
    found = {key.partition(",")[0]: (key, value) for key, value in figures.items() if isinstance(value, (int, float))}
    names = [name for name in METRICS if name in found] or [n for n in found if not n.endswith("_stderr")]
    name = names[0]
    error = found.get(f"{name}_stderr", ("", None))[1]
    return name, Estimate(float(found[name][1]), None if error is None else float(error))
