import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

VECTORS = Path(__file__).parents[2] / "format" / "vectors"


@pytest.fixture
def bstack(tmp_path):
    """Run the installed ``bstack`` command in an empty folder: ``bstack("inspect", path)`` -> CompletedProcess, text."""
    installed = shutil.which("bstack", path=sysconfig.get_path("scripts"))
    command = [installed] if installed else [sys.executable, "-m", "bstack"]

    def run(*args, **environment):
        return subprocess.run(
            [*command, *map(str, args)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "PYTHONUTF8": "1", **environment},
        )

    return run


@pytest.fixture
def vector(tmp_path):
    """Copy a golden file into the empty folder and return its path."""

    def copy(name):
        return Path(shutil.copy(VECTORS / name, tmp_path / name))

    return copy
