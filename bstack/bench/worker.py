"""One size, measured in a process of its own: ``python -m bstack.bench.worker`` (see `bstack.bench.child`).

The request is a JSON object on stdin. Answers are JSON lines on stdout: {"step": 1} for progress, and at the end
{"result": ...} or {"error": ...}.
"""

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

import bstk
from bstack.errors import one_line, user_message

__all__ = ["main"]


def main() -> int:
    """Answer one request."""
    # The terminal sends an interrupt to parent and child alike; the parent decides, and ends the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.load(sys.stdin)
    try:
        _say(answers, result=measure(request, lambda: _say(answers, step=1)))
    except BaseException as error:
        _say(answers, error=_described(error))
        if user_message(error) is None:
            traceback.print_exc()
    return 0


def _say(answers: TextIO, **message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _described(error: BaseException) -> dict[str, Any]:
    message, code = user_message(error) or (f"{type(error).__name__}: {one_line(error)}", None)
    return {"message": message, "exit_code": code}


def measure(request: dict[str, Any], step: Callable[[], None]) -> dict[str, Any]:
    """Measure what the request asks for.

    Parameters
    ----------
    request : dict
        As `bstack.bench.child.ask` makes it.
    step : callable
        Called after each repetition and window.
    """
    _import_model_code(request["file"])
    result: dict[str, Any] = {}
    if request["run"] is not None:
        result["running"] = _run(request, step)
    if request["windows"] is not None or request["tasks"]:
        from bstack.engine.load import load

        # Dense: the plain way, on every machine and for every architecture.
        model, tokenizer = load(request["file"], mb=request["mb"], **_trust(request))
        if request["windows"] is not None:
            result |= _score(model, request, step)
        if request["tasks"]:
            from bstack.bench.tasks import run_tasks

            result["tasks"] = run_tasks(model, tokenizer, request["tasks"])
    return result


def _run(request: dict[str, Any], step: Callable[[], None]) -> dict[str, Any]:
    from bstack.bench.running import measure_running
    from bstack.engine.load import load
    from bstack.packed.store import store_of

    with ExitStack() as stack:

        def packed() -> Any:
            model, _ = load(request["file"], mb=request["mb"], mode="packed", **_trust(request))
            stack.callback(store_of(model).close)
            return model

        def dense() -> Any:
            return load(request["file"], mb=request["mb"], **_trust(request))[0]

        def original() -> Any:
            from bstack.models.open import open_checkpoint
            from bstack.models.skeleton import Skeleton

            skeleton = Skeleton(open_checkpoint(request["original"], request["trust_remote_code"]))
            stack.enter_context(skeleton.loaded(skeleton.model.state_dict()))
            return skeleton.model

        ways = {"stack": packed, "dense": dense, "original": original}
        running = measure_running(ways[request["run"]], speed=request["speed"], progress=step)
    if request["run"] == "original":
        running = replace(running, load_seconds=None)
    return running.to_json()


def _trust(request: dict[str, Any]) -> dict[str, Any]:
    return {name: request[name] for name in ("trust_remote_code", "code")}


def _score(model: Any, request: dict[str, Any], step: Callable[[], None]) -> dict[str, Any]:
    import numpy as np
    import torch

    from bstack.bench.quality import Scores
    from bstack.bench.reference import Reference, write_reference

    windows = torch.from_numpy(np.load(request["windows"]))

    def run(take: Callable[[int, torch.Tensor], None]) -> None:
        for number, window in enumerate(windows):
            with torch.inference_mode():
                take(number, model(input_ids=window[None], use_cache=False).logits[0])
            step()

    if request["make_reference"] is not None:
        write_reference(Path(request["make_reference"]), "own", len(windows), lambda writer: run(writer.add))
        return {}
    scores = Scores(windows, Reference(request["reference"]) if request["reference"] else None)
    run(scores.add)
    return {"quality": vars(scores.quality())}


def _import_model_code(path: str) -> None:
    """Import what transformers imports for this model, seconds of it, so that they do not count as loading."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401

    # Whatever is wrong with the file, load() says it, and better.
    with suppress(Exception), warnings.catch_warnings(action="ignore"), bstk.open(path) as file, torch.device("meta"):
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**json.loads(file.file("config.json"))), trust_remote_code=False
        )


if __name__ == "__main__":
    sys.exit(main())
