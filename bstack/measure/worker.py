"""One size, measured in a process of its own: ``python -m bstack.measure.worker`` (see `bstack.measure.child`).

The request is a JSON object on stdin. Answers are JSON lines on stdout: {"step": 1} for progress, and at the end
{"result": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import bstk

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
        if not hasattr(error, "exit_code"):
            traceback.print_exc()
    return 0


def _say(answers: TextIO, **message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _described(error: BaseException) -> dict[str, Any]:
    code = 7 if isinstance(error, MemoryError) else getattr(error, "exit_code", None)
    message = str(error.args[0]) if error.args else type(error).__name__
    return {"message": message if code is not None else f"{type(error).__name__}: {message}", "exit_code": code}


def measure(request: dict[str, Any], step) -> dict[str, Any]:
    """Measure what the request asks for.

    Parameters
    ----------
    request : dict
        ``file``; ``mb`` (text); ``speed`` (bool); ``windows`` (path of an .npy of token ids, or None); ``reference``
        (path, or None); ``make_reference`` (path to write the log probabilities to, or None); ``tasks`` (list).
    step : callable
        Called after each repetition and window.
    """
    import numpy as np
    import torch

    from bstack.memory.process import peak_bytes
    from bstack.measure.quality import Scores
    from bstack.measure.reference import Reference, write_reference
    from bstack.measure.speed import measure_speed
    from bstack.runtime.load import load

    _import_model_code(request["file"])
    result: dict[str, Any] = {}
    started = time.perf_counter()
    model, tokenizer = load(request["file"], mb=request["mb"])
    result["load_seconds"] = time.perf_counter() - started
    if request["speed"]:
        speed = measure_speed(model, step)
        result["speed"] = {**speed._asdict(), "prompt": speed.prompt._asdict(), "decode": speed.decode._asdict()}
    # Before the windows, whose logits are the measurement's and not the model's.
    result["peak_memory_bytes"] = peak_bytes()
    if request["windows"] is not None:
        windows = torch.from_numpy(np.load(request["windows"]))

        def run(take) -> None:
            for number, window in enumerate(windows):
                with torch.inference_mode():
                    take(number, model(input_ids=window[None], use_cache=False).logits[0])
                step()

        if request["make_reference"] is not None:
            write_reference(Path(request["make_reference"]), "own", len(windows), lambda writer: run(writer.add))
        else:
            scores = Scores(windows, Reference(request["reference"]) if request["reference"] else None)
            run(scores.add)
            result["quality"] = vars(scores.quality())
    if request["tasks"]:
        from bstack.measure.tasks import run_tasks

        result["tasks"] = run_tasks(model, tokenizer, request["tasks"])
    return result


def _import_model_code(path: str) -> None:
    """Import what transformers imports for this model, seconds of it, so that they do not count as loading."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401

    # Whatever is wrong with the file, load() says it, and better.
    with suppress(Exception), warnings.catch_warnings(action="ignore"), bstk.open(path) as file, torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(file.file("config.json"))))


if __name__ == "__main__":
    sys.exit(main())
