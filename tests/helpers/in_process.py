"""The ``bstack`` command inside the process of the tests: a new one takes seconds to import torch and transformers."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
from unittest import mock


def bstack(*args, cwd, encoding="utf-8", **environment):
    """Run the command in a folder -> CompletedProcess, text; standard output is written in an encoding."""
    from bstack.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    before = os.getcwd()
    os.chdir(cwd)
    try:
        with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main([str(arg) for arg in args], prog_name="bstack")
    except SystemExit as end:
        code = end.code
    finally:
        os.chdir(before)
    texts = [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]
    return subprocess.CompletedProcess(args, code or 0, *texts)


def measure(request, progress=lambda: None):
    """Measure in this process what `bstack.bench.child.ask` has a child measure, with the same texts between both."""
    from bstack.bench import child, worker
    from bstack.bench.results import Measured

    sent = json.dumps({type(request).__name__: dataclasses.asdict(request)})
    found = worker.answer(child.read_request(sent), progress)
    return Measured.from_plain(json.loads(json.dumps(found.to_plain())))
