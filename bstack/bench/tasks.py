"""Zero-shot tasks through lm-eval, EleutherAI's evaluation harness (an optional package)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import bstk
from bstack.errors import one_line
from bstack.eval.estimates import Estimate

__all__ = ["check_tasks", "file_digests", "run_tasks"]

# Of a task that reports several figures, the first of these is shown.
METRICS = ("acc", "exact_match", "acc_norm", "perplexity", "word_perplexity")
# lm-eval without its extra "hf" lacks the second.
NEEDED = ("lm_eval", "accelerate")


def check_tasks(tasks: Sequence[str]) -> None:
    """Check that lm-eval can run the tasks, before hours of measuring."""
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise bstk.BstkError("tasks need lm-eval with its extra hf: pip install 'bstack[tasks]'")
    from lm_eval.tasks import TaskManager

    known = None
    for task in tasks:
        if _is_file(task):
            if not os.path.isfile(task):
                raise bstk.UsageError(f"There is no file {task}.")
            continue
        known = known or set(TaskManager().all_tasks)
        if task not in known:
            raise bstk.UsageError(
                f"lm-eval knows no task {task!r}. `lm-eval ls tasks` lists its tasks; name one of your own by the path of "
                "its .yaml file."
            )


def file_digests(tasks: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the tasks that are files, by path; files that they include do not count."""
    found = {}
    for task in tasks:
        if _is_file(task) and os.path.isfile(task):
            with open(task, "rb") as stream:
                found[task] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[str]) -> dict[str, Estimate]:
    """Run tasks on a loaded model; return ``task metric`` -> its value and lm-eval's standard error."""
    check_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        found = simple_evaluate(model=wrapped, tasks=list(tasks), bootstrap_iters=1000)
    except Exception as error:  # whatever a task's own code, its data or the network do
        raise bstk.BstkError(
            f"lm-eval failed on {', '.join(tasks)}: {type(error).__name__}: {one_line(error)}. Data sets that are not on this "
            "machine are fetched from the Hugging Face hub."
        ) from error
    return {f"{task} {name}": value for task, figures in _asked(found, tasks) for name, value in [_headline(figures)]}


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _asked(found: dict[str, Any], tasks: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the results by task, without the members of a group. lm-eval itself names the task of a file and of a tag."""
    inside = {member for members in (found.get("group_subtasks") or {}).values() for member in members}
    return [(task, figures) for task, figures in found["results"].items() if task in tasks or task not in inside]


def _headline(figures: dict[str, Any]) -> tuple[str, Estimate]:
    # Keys are "metric,filter" and "metric_stderr,filter"; others, such as "sample_len", are counts.
    numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
    found = {key.partition(",")[0]: value for key, value in numbers.items() if "," in key}
    names = [name for name in METRICS if name in found] or [name for name in found if not name.endswith("_stderr")]
    if not names:
        raise bstk.BstkError(
            f"lm-eval gave no figure for {figures.get('alias', 'a task')}; name the tasks in its group."
        )
    error = found.get(f"{names[0]}_stderr")
    return names[0], Estimate(float(found[names[0]]), None if error is None else float(error))
