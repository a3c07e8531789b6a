"""Measure one size in a process of its own; `bstack.bench.child` starts it."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

import bstk
from bstack.bench.child import Cut, Measure, WriteReference, read_request
from bstack.bench.quality import Scores
from bstack.bench.reference import Reference, write_reference
from bstack.bench.results import Measured
from bstack.bench.speed import Running, measure_running
from bstack.errors import one_line, user_message
from bstack.models.plain import plain_generation, plain_outputs

__all__ = ["main"]


def main() -> None:
    """Answer one request."""
    # The terminal sends an interrupt to parent and child alike; the parent decides, and ends the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    try:
        result = answer(read_request(sys.stdin.read()), lambda: _send(answers, step=1))
        _send(answers, result=result.to_plain())
    except BaseException as error:
        message, code = user_message(error) or (f"{type(error).__name__}: {one_line(error)}", None)
        _send(answers, error={"message": message, "exit_code": code, "option": getattr(error, "option", None)})
        if code is None:
            traceback.print_exc()


def _send(answers: TextIO, **message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def answer(request: Measure | WriteReference, step: Callable[[], None]) -> Measured:
    """Do what the request asks for; `step` is called after each repetition and window."""
    _import_model_code(request.cut.file)
    if isinstance(request, WriteReference):
        _write_reference(request, step)
        return Measured()
    running = None if request.run is None else _run(request, request.run, step)
    quality, tasks = None, {}
    if request.windows is not None or request.tasks:
        # Dense: this works on every machine and for every architecture.
        model, tokenizer = _load(request.cut)
        if request.windows is not None:
            windows = torch.from_numpy(np.load(request.windows))
            scores = Scores(windows, None if request.reference is None else Reference(request.reference))
            _feed(model, windows, scores.add, step)
            quality = scores.quality()
        if request.tasks:
            from bstack.bench.tasks import run_tasks

            tasks = run_tasks(model, tokenizer, request.tasks)
    return Measured(running, quality, tasks)


def _load(cut: Cut, **options: Any) -> tuple[Any, Any]:
    from bstack.engine.load import load

    model, tokenizer = load(
        cut.file, budget=cut.budget, trust_remote_code=cut.trust_remote_code, code=cut.code, **options
    )
    plain_outputs(model)
    plain_generation(model)
    return model, tokenizer


def _load_packed(cut: Cut, device: str) -> Any:
    """Load the model for the engine that `bstack run` takes."""
    from bstack.engine.native.architecture import NotNativeError
    from bstack.engine.native.load import load

    if not (cut.trust_remote_code or cut.code):
        with suppress(NotNativeError):
            return load(cut.file, budget=cut.budget, device=device)[0]
    return _load(cut, mode="packed", device=device)[0]


def _run(request: Measure, what: str, step: Callable[[], None]) -> Running:
    from bstack.models.open import open_checkpoint
    from bstack.models.skeleton import Skeleton
    from bstack.packed.store import store_of

    with ExitStack() as stack:

        def load() -> Any:
            if what == "original":
                skeleton = Skeleton(open_checkpoint(str(request.original), request.cut.trust_remote_code))
                stack.enter_context(skeleton.loaded(skeleton.model.state_dict()))
                return skeleton.model
            if what == "packed":
                model = _load_packed(request.cut, request.device)
                stack.callback(store_of(model).close)
                return model
            return _load(request.cut, mode=what, device=request.device)[0]

        running = measure_running(load, speed=request.speed, progress=step, device=request.device)
    # The original is not loaded as its user would load it.
    return replace(running, load_seconds=None) if what == "original" else running


def _write_reference(request: WriteReference, step: Callable[[], None]) -> None:
    model, _ = _load(request.cut)
    windows = torch.from_numpy(np.load(request.windows))
    write_reference(Path(request.output), "own", len(windows), lambda writer: _feed(model, windows, writer.add, step))


def _feed(
    model: Any, windows: torch.Tensor, take: Callable[[int, torch.Tensor], None], step: Callable[[], None]
) -> None:
    """Hand the logits of every window to `take`."""
    for number, window in enumerate(windows):
        with torch.inference_mode():
            take(number, model(input_ids=window[None], use_cache=False).logits[0])
        step()


def _import_model_code(path: str) -> None:
    """Import what transformers imports for this model, which takes seconds that must not count as loading."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401

    # load() reports a bad file.
    with suppress(Exception), warnings.catch_warnings(action="ignore"), bstk.open(path) as file, torch.device("meta"):
        config = AutoConfig.for_model(**json.loads(file.file("config.json")))
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)
