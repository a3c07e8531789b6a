"""Kill compress, truncate and grow with SIGKILL between any two steps of writing: python tests/hostile/kill.py --rounds 200

Each round is a child process that kills itself at the n-th call that changes the disk (a long write is torn: half of it is
done), then a second child that is given the same job. In between the output must be the old file whole or the new file
whole, or, where a file is changed in place, a valid cut with no less of the model than before or after. At the end it must be
the result byte for byte, and no temporary file may be left. Rounds go over the jobs in turn, and over each job's steps evenly.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child cannot use the threads that its parent has
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

import jobs  # noqa: E402
from steps import Steps, counted  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "format" / "vectors" / "whole.bstk"


def child(work: Callable[[], None]) -> int:
    """Do some work in a forked process; return its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_steps(job: jobs.Job, folder: Path) -> int:
    """How many calls of the job change the disk."""
    jobs.fresh(job, folder)
    with counted(Steps()) as steps:
        job.run(folder)
    return steps.count


def killed_at(job: jobs.Job, folder: Path, step: int) -> bool:
    """One round; returns whether the job lived to be killed at that step."""

    def run() -> None:
        with counted(Steps(step, lambda: os.kill(os.getpid(), signal.SIGKILL))):
            job.run(folder)

    jobs.fresh(job, folder)
    code = child(run)
    if code not in (0, -signal.SIGKILL):
        raise AssertionError(f"{job.name}: ended with {code} before step {step}")
    job.check_stopped(folder)
    if child(lambda: job.repeat(folder)) != 0:
        raise AssertionError(f"{job.name}: killed at step {step}, the same job fails")
    return code != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument(
        "--no-compress", action="store_true", help="the others alone, on a golden file: seconds, without torch"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bstack-kill-") as name:
        folder = Path(name)
        if arguments.no_compress:
            every = jobs.container_jobs(GOLDEN.read_bytes())
        else:
            import tiny_models

            model = tiny_models.save("llama-tied", folder / "model", num_hidden_layers=2)
            (folder / "reference").mkdir()
            compress = jobs.compress_job(model, folder / "reference")
            every = [*jobs.container_jobs(compress.wanted), compress]
        steps = {job.name: count_steps(job, folder / "round") for job in every}
        killed: Counter[str] = Counter()
        each = -(-arguments.rounds // len(every))
        for job in every:
            for number in range(each):
                # Evenly over the steps, and over all of them again if there are fewer than rounds.
                step = 1 + (number * max(1, steps[job.name] // each)) % steps[job.name]
                killed[job.name] += killed_at(job, folder / "round", step)
            print(f"{job.name}: killed {killed[job.name]} times, {steps[job.name]} steps; whole each time", flush=True)
        print(f"{killed.total()} kills")


if __name__ == "__main__":
    main()
