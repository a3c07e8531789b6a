"""The chat template of a stranger's model, rendered in a process of its own: ``python -P -m bstack.engine.chat_template``.

transformers renders templates in jinja's sandbox, which keeps them from running code but not from running for ever or filling
the memory: ``{% for %}`` inside ``{% for %}``, ``'x' * 10**10``, ``10**(10**9)``. No check inside one process ends all of these.

The request is a JSON object on stdin, the answer one on stdout: {"text": ...} or {"error": ...}.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bstack.errors import UnsupportedModelError, one_line

__all__ = ["main", "render"]

SECONDS = 10
"""Processor time that a template may take; those of known models take some milliseconds."""

WALL_SECONDS = 120
"""Time after which the process is ended in any case: where it cannot be limited, or waits for a busy machine."""

MEMORY = 256 * 2**20
"""Bytes that it may take beside the libraries, on Linux."""

LONGEST = 2**22
"""Characters that it may give beside the prompt."""


def render(tokenizer: Any, prompt: str, seconds: int = SECONDS) -> str:
    """A prompt as a user's message in the model's chat template, as ``tokenizer.apply_chat_template`` gives it.

    Parameters
    ----------
    tokenizer
        From `bstack.load`, with a chat template.
    prompt : str
    seconds : int
        Processor time that it may take.

    Raises
    ------
    bstack.errors.UnsupportedModelError
        The template fails, or takes too much time or memory, or the process that renders it cannot do its work.
    """
    messages = [{"role": "user", "content": prompt}]
    try:
        if _has_its_own_way(tokenizer):
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        names = tokenizer.special_tokens_map
        request = {
            **names,
            "conversations": [messages],
            "chat_template": tokenizer.get_chat_template(),
            "add_generation_prompt": True,
        }
    except Exception as error:  # whatever the files of a stranger make of it
        raise _failed(one_line(error)) from None
    _refuse_taken(names)
    limits = {"seconds": seconds, "longest": LONGEST + len(prompt)}
    data = json.dumps({"limits": limits, "request": request}, default=str).encode()
    command = [sys.executable, "-P", "-m", "bstack.engine.chat_template"]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=WALL_SECONDS, env=_environment())
    except subprocess.TimeoutExpired:
        raise _failed(f"it does not end within {WALL_SECONDS} seconds.") from None
    if done.returncode < 0:
        # Ended from outside: for its time, or by a system that is out of memory.
        raise _failed(f"it takes more than {seconds} seconds, or too much memory.")
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
        raise _failed(f"the process that renders it ended with status {done.returncode}: {said[-1].rstrip('.')}.")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise _failed(answer["error"])
    return answer["text"]


def _refuse_taken(names: Iterable[str]) -> None:
    """Refuse special tokens under names that mean something else to transformers, which does not take them either."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if taken := sorted({"messages", *inspect.signature(render_jinja_template).parameters}.intersection(names)):
        raise _failed(
            f"the tokenizer calls a special token {taken[0]!r}, which is the name of something else in a template."
        )


def _environment() -> dict[str, str]:
    """With bstack where it is for this process, also where that is no place of the interpreter's own."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _has_its_own_way(tokenizer: Any) -> bool:
    """Whether a tokenizer does not render templates as others do: one without them, or with code that the user trusts."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _failed(problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model's chat template fails: {problem} Leave --chat out to write the prompt yourself."
    )


def main() -> None:
    """Answer one request."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    asked = json.load(sys.stdin.buffer)
    with os.fdopen(answers, "wb") as out:
        out.write(json.dumps(_answer(asked["request"], **asked["limits"])).encode())


def _answer(request: dict[str, Any], seconds: int, longest: int) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit(seconds)
    try:
        (text,), _ = render_jinja_template(**request)
    except MemoryError:
        return {"error": f"it takes more than {MEMORY // 2**20} MB of memory."}
    except Exception as error:  # whatever a template does
        return {"error": one_line(error).rstrip(".") + "."}
    if len(text) > longest:
        return {"error": f"it makes {len(text)} characters of the prompt, and at most {longest} are allowed."}
    return {"text": text}


def _limit(seconds: int) -> None:
    """Let the system end this process after so much more processor time, and refuse it more than `MEMORY`."""
    try:
        import resource
    except ImportError:  # Windows: WALL_SECONDS holds
        return
    _lower(resource.RLIMIT_CORE, 0)  # the end for time writes the memory to disk otherwise
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + seconds)
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)


def _lower(what: int, limit: int) -> None:
    import resource

    _, most = resource.getrlimit(what)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(what, (limit, most))


if __name__ == "__main__":
    main()
