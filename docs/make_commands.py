"""Write docs/commands.md from the help of the installed command: ``python docs/make_commands.py``.

tests/test_docs.py fails when the file is not what this script would write.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).with_name("commands.md")
HEAD = """# Commands

Generated from `bstack --help` by `docs/make_commands.py`. A part of the [guide](guide.md), which also explains the exit codes.
"""


def render() -> str:
    """Return the text of commands.md for the bstack that this Python has installed."""
    main = _help()
    commands = re.findall(r"^  ([\w-]+) ", main.partition("\nCommands:\n")[2], re.MULTILINE)
    sections = [_section("bstack", main), *(_section(f"bstack {name}", _help(name)) for name in commands)]
    return "\n".join([HEAD, *sections])


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


def _help(*command: str) -> str:
    # Fixed width, no colour: the text must not depend on the terminal.
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "bstack", *command, "--help"],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
