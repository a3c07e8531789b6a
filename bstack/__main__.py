"""``python -m bstack`` is the ``bstack`` command."""

from bstack.cli import main

if __name__ == "__main__":
    main(prog_name="bstack")
