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

from bstack.errors import ClusterError, ClusterLostError, MissingPackageError, one_line
from bstack.kernels.native import instructions
from bstk.errors import UsageError

__all__ = ["Cluster"]

CONNECT_SECONDS = 10.0
# How long a run waits for a worker when there is none.
PATIENCE_SECONDS = 300.0
POLL_SECONDS = 5.0
GONE = "went away"
# Must be equal everywhere: another version may make other bytes.
PACKAGES = ("bstack", "torch", "numpy")


class Cluster:
    """The workers of a Dask scheduler; a context manager.

    Parameters
    ----------
    address : str
        Of the scheduler, such as ``tcp://10.0.0.5:8786``.

    Raises
    ------
    bstack.errors.MissingPackageError
        distributed is not installed.
    bstk.UsageError
        `address` is not an address.
    bstack.errors.ClusterError
        There is no scheduler, it has no workers, or a worker has other versions.
    """

    def __init__(self, address: str):
        try:
            import distributed
        except ImportError:
            raise MissingPackageError(
                "Encoding on a cluster needs the package distributed: pip install 'bstack[dask]'"
            ) from None
        if ":" not in address:
            raise UsageError(f"{address!r} is not the address of a Dask scheduler, such as tcp://10.0.0.5:8786.")
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # bstack raises errors of its own
        self._address = address
        self._threads = _torch_threads()
        self._compared: set[str] = set()
        try:
            _knock(address)
            self._client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError, MemoryError) as error:
            # OSError includes TimeoutError. ValueError: not an address; MemoryError: another protocol.
            raise ClusterError(
                f"No Dask scheduler answers at {address}: {one_line(error)}. Start one (dask scheduler), and give its address, such as "
                "tcp://10.0.0.5:8786."
            ) from None
        try:
            self._check_workers()
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._client.close()

    def max_pending(self, inputs: int) -> int:
        with _still_there(self._address):
            return 1 + sum(
                self._client.nthreads().values()
            )  # one more than threads, so that no worker waits for the next

    def submit(self, function: Callable[..., Any], *arguments: Any) -> _Task:
        with (
            _still_there(self._address),
            warnings.catch_warnings(action="ignore", category=UserWarning),
        ):  # of large arrays
            future = self._client.submit(_call, function, arguments, facts(), self._threads, pure=False)
        return _Task(future, self._client, self._address, self._compare)

    def _check_workers(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise ClusterError(
                f"The Dask scheduler at {self._address} has no workers. Start some: dask worker {self._address}"
            ) from None
        here = facts()
        for worker, found in self._client.run(facts, on_error="return").items():
            if isinstance(found, Exception):
                raise ClusterError(
                    f"The worker {worker} cannot run bstack: {one_line(found)}. Install bstack {here['bstack']} in its environment, too."
                )
            _check_versions(here, found, worker)
            self._compare(worker, found)

    def _compare(self, worker: str, found: dict[str, str]) -> None:
        """Warn once of a worker that computes with other instructions."""
        if worker in self._compared:
            return
        self._compared.add(worker)
        here = facts()
        if different := [
            f"{name} {found[name]}, here {here[name]}" for name in ("processor", "kernels") if found[name] != here[name]
        ]:
            warnings.warn(
                f"The worker {worker} computes with other instructions ({'; '.join(different)}): the file is as good, but may "
                "not be the same byte for byte.",
                RuntimeWarning,
                stacklevel=5,
            )


def _knock(address: str) -> None:
    """Connect once and close, or raise what is wrong with the address.

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

    def __init__(self, future: Any, client: Any, address: str, compare: Callable[[str, dict[str, str]], None]):
        self._future, self._client, self._address, self._compare = future, client, address, compare

    def result(self) -> Any:
        from distributed import KilledWorker

        deserted = None
        while True:
            try:
                found, worker, there = self._future.result(timeout=POLL_SECONDS)
                self._compare(worker, there)
                return found
            except KilledWorker as error:
                raise ClusterLostError(
                    f"Several workers of {self._address} died over the same matrix, the last {error.last_worker.address}: most likely they "
                    "have too little memory for it. Give them more, or fewer threads, and the same command again to continue."
                ) from None
            except CancelledError:
                raise _lost(self._address, GONE) from None
            except TimeoutError:
                if self._future.status == "error" and isinstance(self._future.exception(), TimeoutError):
                    raise  # the encoder's own
                if self._client.status != "running":
                    raise _lost(self._address, GONE) from None
                now = time.monotonic()
                with _still_there(self._address):
                    deserted = (deserted or now) if not self._client.nthreads() else None
                if deserted is not None and now - deserted > PATIENCE_SECONDS:
                    raise _lost(self._address, f"has had no workers for {PATIENCE_SECONDS:.0f} s") from None

    def cancel(self) -> None:
        if self._client.status == "running":
            self._future.cancel()


@contextmanager
def _still_there(address: str) -> Iterator[None]:
    """Raise an error of a scheduler that does not answer any more."""
    try:
        yield
    except OSError:  # dask's CommClosedError among them
        raise _lost(address, GONE) from None


def _lost(address: str, what: str) -> ClusterLostError:
    return ClusterLostError(
        f"The Dask scheduler at {address} {what}. Give the same command again to continue, with Dask or without."
    )


def facts() -> dict[str, str]:
    """Return what decides the bytes that an encoder makes, besides its input."""
    return {
        **{package: version(package) for package in PACKAGES},
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "kernels": instructions(),
    }


def _check_versions(here: dict[str, str], there: dict[str, str], worker: str) -> None:
    if different := [f"{name} {there[name]}, not {here[name]}" for name in PACKAGES if here[name] != there[name]]:
        raise ClusterError(
            f"The worker {worker} has {' and '.join(different)}: other versions may make other bytes. Install the same ones everywhere."
        )


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], expected: dict[str, str], threads: int
) -> tuple[Any, str, dict[str, str]]:
    """Run a function on a worker; return its result with the worker's address and facts, which may not be checked yet."""
    import distributed

    worker, here = distributed.get_worker().address, facts()
    _check_versions(expected, here, worker)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # with another number of threads, sums are rounded in another way
    try:
        return function(*arguments), worker, here
    finally:
        torch.set_num_threads(before)


def _torch_threads() -> int:
    """Return how many threads torch uses in a thread of `bstack.compression.workers.Threads`."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()
