"""Measuring one size in a process of its own, so that its load time and memory are its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import bstk
from bstack.bench.quality import Quality
from bstack.bench.running import Running
from bstack.eval.estimates import Estimate

__all__ = ["Measured", "ask"]


@dataclass(frozen=True)
class Measured:
    """What a child process found out.

    Attributes
    ----------
    running : Running or None
    quality : Quality or None
    tasks : dict of str to Estimate
    """

    running: Running | None
    quality: Quality | None
    tasks: dict[str, Estimate]

    @classmethod
    def from_answer(cls, answer: dict[str, Any]) -> Measured:
        """Read what `ask` returns."""
        running, quality = answer.get("running"), answer.get("quality")
        tasks = {name: Estimate(*pair) for name, pair in answer.get("tasks", {}).items()}
        return cls(running and Running(**running), quality and Quality.from_plain(quality), tasks)


def ask(
    file: str | os.PathLike[str],
    mb: Decimal,
    *,
    run: str | None = None,
    speed: bool = False,
    original: str | None = None,
    windows: Path | None = None,
    reference: Path | None = None,
    make_reference: Path | None = None,
    tasks: Sequence[str] = (),
    code: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Load a file at a size in a new process and measure it there.

    Parameters
    ----------
    file : path
    mb : Decimal
        The budget in MB.
    run : str or None
        Which model to load and run for load time, memory and speed: the file with packed weights (``stack``), with
        float32 weights (``dense``), or the ``original``; None for none of that.
    speed : bool
        Whether to time it.
    original : str or None
        What `open_checkpoint` opens, for ``run="original"``.
    windows : Path or None
        An .npy file of token ids; None for no quality.
    reference : Path or None
        What to compare with.
    make_reference : Path or None
        Write the log probabilities there instead of measuring quality.
    tasks : sequence of str
        For lm-eval.
    code, trust_remote_code
        As for `bstack.load`.
    progress : callable
        Called after each repetition of the speed test and each window.

    Returns
    -------
    dict
        Plain JSON values, which `Measured.from_answer` reads.

    Raises
    ------
    bstk.BstkError
        As the child raised it, with its exit code.
    bstk.ResourceError
        The system killed the child, most likely for its memory.
    """
    request = {
        "file": os.path.abspath(file),
        "mb": str(mb),
        "run": run,
        "speed": speed,
        "original": original,
        "windows": _text(windows),
        "reference": _text(reference),
        "make_reference": _text(make_reference),
        "tasks": list(tasks),
        "code": code,
        "trust_remote_code": trust_remote_code,
    }
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-m", "bstack.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
        )
        try:
            answer = _converse(child, request, progress)
            child.wait()
        finally:
            # An interrupt must not leave it running.
            if child.poll() is None:
                child.kill()
                child.wait()
            child.stdout.close()
        if answer is None:
            complaints.seek(0)
            raise _died(child.returncode, mb, complaints.read().decode(errors="replace"))
    if "error" in answer:
        raise _raised(answer["error"], mb)
    return answer["result"]


def _converse(child: subprocess.Popen, request: dict[str, Any], progress: Callable[[], None]) -> dict[str, Any] | None:
    """Send the request, count the steps, return the final answer; None if the child goes away without one."""
    try:
        json.dump(request, child.stdin)
        child.stdin.close()
    except BrokenPipeError:
        return None
    for line in child.stdout:
        message = json.loads(line)
        if "step" not in message:
            return message
        progress()
    return None


def _died(code: int, mb: Decimal, complaints: str) -> bstk.BstkError:
    if code < 0:
        return bstk.ResourceError(
            f"The process that measured {mb} MB was killed by signal {-code}, most likely because the memory is full: "
            "to measure quality, weights are unpacked to float32. Free memory, or measure speed alone with --no-quality."
        )
    last = complaints.strip().splitlines()[-1:] or ["it said nothing"]
    return bstk.BstkError(f"The process that measured {mb} MB ended with {code}: {last[0]}")


def _raised(error: dict[str, Any], mb: Decimal) -> bstk.BstkError:
    if error["exit_code"] is None:
        return bstk.BstkError(f"Measuring {mb} MB failed with {error['message']}")
    raised = bstk.BstkError(error["message"])
    raised.exit_code = error["exit_code"]
    return raised


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
