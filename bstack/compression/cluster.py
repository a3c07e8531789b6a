"""Encode matrices on the workers of an existing Dask cluster: the file is the same, byte for byte.

Workers receive arrays and settings and return blocks; they need neither the model nor a path. The scheduler keeps a task's
arrays until it is done, so another worker takes over from one that died.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from bstack.errors import one_line
from bstack.kernels.native import instructions
from bstk.errors import BstkError, Interrupted, UsageError

__all__ = ["Cluster"]

CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 300.0  # how long a run waits for a worker when there is none
POLL_SECONDS = 5.0
# Must be equal everywhere: another version may make other bytes.
PACKAGES = ("bstack", "torch", "numpy")


class Cluster:
    """The workers of the Dask scheduler at an address such as ``tcp://10.0.0.5:8786``; a context manager."""

    device = torch.device("cpu")

    def __init__(self, address: str):
        try:
            import distributed
        except ImportError:
            raise BstkError("Encoding on a cluster needs the package distributed: pip install 'bstack[dask]'") from None
        if ":" not in address:
            raise UsageError(f"{address!r} is not the address of a Dask scheduler, such as tcp://10.0.0.5:8786.")
        for logger in ("distributed", "tornado.application"):  # Dask's event loop writes to the second
            logging.getLogger(logger).setLevel(logging.CRITICAL)  # bstack raises errors of its own
        self.address = address
        with ThreadPoolExecutor(1) as pool:
            self._torch_threads = pool.submit(torch.get_num_threads).result()  # as in a thread that encodes
        self._compared: set[str] = set()
        try:
            _check_connection(address)
            self.client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError, MemoryError) as error:
            # OSError includes TimeoutError. ValueError: not an address; MemoryError: another protocol.
            raise BstkError(
                f"No Dask scheduler answers at {address}: {one_line(error)}.",
                hint="Start one (dask scheduler), and give its address, such as tcp://10.0.0.5:8786.",
            ) from None
        try:
            self._check_workers()
        except BaseException:
            self.client.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.client.close()

    def max_pending(self, _inputs: int, /) -> int:
        """Return how many matrices of any width may be pending: one more than threads, so that no worker waits for the next."""
        return 1 + self.count_threads()

    def count_threads(self) -> int:
        """Return how many threads all workers have."""
        with self._still_there():
            return sum(self.client.nthreads().values())

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> _Task:
        """Call a function of a module with these arguments on a worker."""
        ignored = warnings.catch_warnings(action="ignore", category=UserWarning)  # of large arrays
        with self._still_there(), ignored:
            future = self.client.submit(_call, function, arguments, environment(), self._torch_threads, pure=False)
        return _Task(self, future)

    def interrupted(self, what: str = "went away") -> Interrupted:
        """Return the error of a cluster that is of no use any more."""
        return Interrupted(
            f"The Dask scheduler at {self.address} {what}.",
            hint="Give the same command again to continue, with Dask or without.",
        )

    @contextmanager
    def _still_there(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # dask's CommClosedError among them
            raise self.interrupted() from None

    def _check_workers(self) -> None:
        try:
            self.client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise BstkError(
                f"The Dask scheduler at {self.address} has no workers.", hint=f"Start some: dask worker {self.address}"
            ) from None
        here = environment()
        for worker, found in self.client.run(environment, on_error="return").items():
            if isinstance(found, Exception):
                raise BstkError(
                    f"The worker {worker} cannot run bstack: {one_line(found)}.",
                    hint=f"Install bstack {here['bstack']} in its environment, too.",
                )
            _check_versions(here, found, worker)
            self.compare(worker, found)

    def compare(self, worker: str, found: dict[str, str]) -> None:
        """Warn once of a worker that computes with other instructions."""
        if worker in self._compared:
            return
        self._compared.add(worker)
        here = environment()
        names = [name for name in ("processor", "kernels") if found[name] != here[name]]
        if different := [f"{name} {found[name]}, here {here[name]}" for name in names]:
            warnings.warn(
                f"The worker {worker} computes with other instructions ({'; '.join(different)}): the file is as good, but may "
                "not be the same byte for byte.",
                RuntimeWarning,
                stacklevel=5,
            )


def _check_connection(address: str) -> None:
    """Connect once and close; raise OSError, ValueError, TypeError or MemoryError for what is no scheduler.

    A Dask client that cannot connect waits for 20 seconds when it is collected, and then Python prints its traceback.
    """
    from distributed import Security
    from distributed.comm import connect

    arguments = Security().get_connection_args("client")  # of Dask's settings, as the client uses them

    async def call() -> None:
        comm = await connect(address, timeout=CONNECT_SECONDS, **arguments)
        await comm.close()

    # In a thread, because a notebook's own thread has an event loop already.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, call()).result()


class _Task:
    """A matrix that the cluster encodes."""

    def __init__(self, cluster: Cluster, future: Any):
        self._cluster, self._future = cluster, future

    def result(self) -> Any:
        """Wait for the function, and return or raise what it does; raise Interrupted without workers."""
        from distributed import KilledWorker

        deserted = None
        while True:
            try:
                found, worker, there = self._future.result(timeout=POLL_SECONDS)
                self._cluster.compare(worker, there)
                return found
            except KilledWorker as error:
                raise Interrupted(
                    f"Several workers of {self._cluster.address} died over the same matrix, the last "
                    f"{error.last_worker.address}: most likely they have too little memory for it.",
                    hint="Give them more, or fewer threads, and the same command again to continue.",
                ) from None
            except CancelledError:
                raise self._cluster.interrupted() from None
            except TimeoutError:
                if self._future.status == "error" and isinstance(self._future.exception(), TimeoutError):
                    raise  # the encoder's own
                if self._cluster.client.status != "running":
                    raise self._cluster.interrupted() from None
                now = time.monotonic()
                deserted = None if self._cluster.count_threads() else deserted or now
                if deserted is not None and now - deserted > PATIENCE_SECONDS:
                    raise self._cluster.interrupted(f"has had no workers for {PATIENCE_SECONDS:.0f} s") from None

    def cancel(self) -> None:
        """Drop a matrix that is not needed any more."""
        if self._cluster.client.status == "running":
            self._future.cancel()


def environment() -> dict[str, str]:
    """Return what decides the bytes that an encoder makes, besides its input."""
    return {
        **{package: version(package) for package in PACKAGES},
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "kernels": instructions(),
    }


def _check_versions(here: dict[str, str], there: dict[str, str], worker: str) -> None:
    if different := [f"{name} {there[name]}, not {here[name]}" for name in PACKAGES if here[name] != there[name]]:
        raise BstkError(
            f"The worker {worker} has {' and '.join(different)}: other versions may make other bytes.",
            hint="Install the same ones everywhere.",
        )


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], expected: dict[str, str], threads: int
) -> tuple[Any, str, dict[str, str]]:
    """Run a function on a worker; return its result with the worker's address and environment, which may not be checked yet."""
    import distributed

    worker, here = distributed.get_worker().address, environment()
    _check_versions(expected, here, worker)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # with another number of threads, sums are rounded in another way
    try:
        return function(*arguments), worker, here
    finally:
        torch.set_num_threads(before)
