"""The ``bstack`` command, and ``python -m bstack``.

Nothing is imported at the top: importing the commands takes a tenth of a second or two, and an interrupt in
that time prints a message, not a traceback.
"""

from __future__ import annotations


def main() -> None:
    """Run the command, and leave the process with an exit code of ``docs/guide.md``."""
    import os

    # torch's OpenMP reads it when it is loaded: waiting threads release the CPU. By default they spin and take the cores from
    # the packed kernels; beside another busy process everything then runs 5 to 12 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # numpy's OpenBLAS as well: its threads spin for 2^26 cycles after they start, a tenth of all that a short answer takes.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    try:
        from bstack.cli import main as command

        command(prog_name="bstack")
    except KeyboardInterrupt:  # before the commands could deal with it themselves
        import sys

        sys.stderr.write("Interrupted.\n")
        sys.exit(75)


if __name__ == "__main__":
    main()
