"""Feed the reader with files that libFuzzer makes, guided by what they reach: python tests/hostile/run.py --minutes 30

Needs atheris (pip install atheris), which is no dependency of the tests. The corpus begins with the golden and the named
bad files and is kept between runs in --corpus. Exit code 0: nothing found. Otherwise the input is in ``crash-...``
(or ``timeout-...``, ``oom-...``) in that folder: it becomes a row in tests/format/bad_files.py.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
VECTORS = TESTS.parent / "format" / "vectors"
SECONDS = 300  # of the clock on the wall: an input that takes longer is a hang, and not a machine with other work
MEMORY_MB = 64  # what the reader may take beyond the process and its largest input
LONGEST = 2**16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris")
    sys.path[:0] = [str(Path(__file__).parent), str(TESTS / "helpers"), str(VECTORS.parent)]
    with atheris.instrument_imports(include=["bstk"]):
        import target
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds():
        (arguments.corpus / hashlib.sha256(data).hexdigest()[:40]).write_bytes(data)
    before = resident_mb()
    options = [
        f"-max_total_time={int(arguments.minutes * 60)}",
        f"-timeout={SECONDS}",
        f"-max_len={LONGEST}",
        f"-rss_limit_mb={before + MEMORY_MB}",
        f"-artifact_prefix={arguments.corpus}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(arguments.corpus)], target.check)
    atheris.Fuzz()


def seeds() -> list[bytes]:
    """Return the golden files, good and bad, and every bad file of the table."""
    import bad_files

    good = (VECTORS / "whole.bstk").read_bytes()
    made = [bad_files.build(change, good) for change, _ in bad_files.OPEN.values()]
    made += [bad_files.build(change, good) for _, change in bad_files.CHUNK.values()]
    made += [path.read_bytes() for path in VECTORS.glob("*.bstk")]
    return [data for data in made if len(data) <= LONGEST]


def resident_mb() -> int:
    """Return the most memory this process has had so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
