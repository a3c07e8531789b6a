"""Measure one size in a process of its own, so that its load time and memory are its own.

The request is one JSON line on the child's stdin, made of `Measure` or `WriteReference`. The answers are JSON lines on its
stdout: {"step": 1} for progress, and at the end {"result": ...} or {"error": {"message", "exit_code", "option"}}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bstk
from bstack.bench.results import Measured

__all__ = ["Cut", "Measure", "WriteReference", "ask", "isolated_environment", "read_request"]

# Code in the current folder must not run: -P keeps that folder from the import path. The folders of bstack and bstk come
# last, for a checkout that is on the path only because it is the current folder of the parent.
_PROGRAM = "import sys; sys.path += sys.argv[1:]; from bstack.bench.worker import main; main()"


@dataclass(frozen=True)
class Cut:
    """A file at a budget in bytes, and what `bstack.load` needs to know of its Python code."""

    file: str
    budget: int
    code: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Measure:
    """Measure load time, memory and speed, then quality, then tasks.

    `run` names the model to run for load time and memory: the file with ``packed`` or ``dense`` float32 weights, or the
    ``original``, which `open_checkpoint` opens; it runs on `device`. `windows` is an .npy file of token ids, `reference` a file to compare with.
    """

    cut: Cut
    run: str | None = None
    speed: bool = False
    device: str = "cpu"
    original: str | None = None
    windows: str | None = None
    reference: str | None = None
    tasks: Sequence[str] = ()


@dataclass(frozen=True)
class WriteReference:
    """Write the log probabilities on the `windows` (an .npy file of token ids) to the file `output`."""

    cut: Cut
    windows: str
    output: str


_REQUESTS: dict[str, type[Measure | WriteReference]] = {kind.__name__: kind for kind in (Measure, WriteReference)}


def read_request(text: str) -> Measure | WriteReference:
    """Read what `ask` sends."""
    ((name, values),) = json.loads(text).items()
    return _REQUESTS[name](**{**values, "cut": Cut(**values["cut"])})


def ask(request: Measure | WriteReference, progress: Callable[[], None] = lambda: None) -> Measured:
    """Answer a request in a new process; empty for `WriteReference`. `progress` is called for each repetition and window.

    Raises BstkError as the child did, with its exit code; ResourceError if the system killed the child.
    """
    shown = f"{bstk.mb_text(request.cut.budget)} MB"
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, *_own_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            env=isolated_environment(),
        )
        try:
            answer = _converse(child, json.dumps({type(request).__name__: asdict(request)}), progress)
            child.wait()
        finally:
            # An interrupt must not leave it running.
            if child.poll() is None:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()
        if answer is None:
            complaints.seek(0)
            raise _died(child.returncode, shown, complaints.read().decode(errors="replace"))
    if "error" not in answer:
        return Measured.from_plain(answer["result"])
    message, code, option = (answer["error"][key] for key in ("message", "exit_code", "option"))
    if code is None:
        raise bstk.BstkError(f"Measuring {shown} failed with {message}")
    raised = bstk.BstkError(message, option=option)
    raised.exit_code = code
    raise raised


def isolated_environment() -> dict[str, str]:
    """Return the environment without entries of PYTHONPATH that mean the current folder, or a folder in it."""
    entries = filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entries)}


def _own_folders() -> list[str]:
    """Return the folders that hold bstack and bstk."""
    return [str(Path(module).resolve().parents[depth]) for module, depth in ((__file__, 2), (str(bstk.__file__), 1))]


def _converse(child: subprocess.Popen[str], request: str, progress: Callable[[], None]) -> dict[str, Any] | None:
    """Send the request, count the steps, return the final answer; None if the child ends without one."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(request)
        child.stdin.close()
    except BrokenPipeError:
        return None
    for line in child.stdout:
        message = json.loads(line)
        if "step" not in message:
            return message
        progress()
    return None


def _died(code: int, shown: str, complaints: str) -> bstk.BstkError:
    if code < 0:
        return bstk.ResourceError(
            f"The process that measured {shown} was killed by signal {-code}, most likely because the memory is full: "
            "to measure quality, weights are unpacked to float32. Free memory, or measure speed alone, without quality."
        )
    last = complaints.strip().splitlines()[-1:] or ["it said nothing"]
    return bstk.BstkError(f"The process that measured {shown} ended with {code}: {last[0]}")
