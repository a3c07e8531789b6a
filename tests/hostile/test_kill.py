"""The script that kills writing processes, with few rounds; the thorough run is `python tests/hostile/kill.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.skipif(os.name != "posix", reason="forks and kills")
def test_killed_between_steps():
    script = Path(__file__).with_name("kill.py")
    ended = subprocess.run([sys.executable, script, "--rounds", "20"], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == 6 and all("whole each time" in line for line in lines[:-1])
    assert int(lines[-1].split()[0]) >= 16
