"""Runs jobs in the JavaScript reader; tests that use it are skipped without node."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import bstk

JOBS = Path(__file__).with_name("javascript_jobs.mjs")
LEAST = 20


def _missing():
    node = shutil.which("node")
    if node is None:
        return "node is not installed"
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    found = re.match(r"v(\d+)\.", version)
    return "" if found and int(found[1]) >= LEAST else f"node is {version.strip()}; {LEAST} or newer is needed"


MISSING = _missing()
MARKS = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.filterwarnings("ignore::bstk.PartialWarning")]


def node(jobs):
    """Return the result of each job of `javascript_jobs.mjs`; all run in one process."""
    command = ["node", "--no-warnings", str(JOBS)]
    run = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def expected_cut(path, out, mb, seal):
    try:
        bstk.truncate(path, out, mb=mb, seal=seal)
    except bstk.BstkError as error:
        return type(error).__name__
    return sha256(out.read_bytes())
