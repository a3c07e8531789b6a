"""Listen at an address and serve a model until a signal."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from bstack.engine.native.generate import TextTokenizer
from bstack.engine.native.model import NativeModel
from bstack.engine.native.sequence import PAGE
from bstack.errors import require
from bstk.errors import UsageError

__all__ = ["bind", "check", "listen", "serve"]

# Seconds that running texts have after the first signal, and after that readers of what is left.
GRACE, CLOSING = 10, 5
# Connections beside those of texts that run or wait: of pages, of what asks for metrics, and of those that are told to wait.
CONNECTIONS = 128


def check(host: str, key: str | None, hosts: Sequence[str], origins: Sequence[str]) -> None:
    """Raise an error, before any work, where the server cannot run: packages are missing, or all the network could use it."""
    require("Serving", "serve", ("starlette", "uvicorn", "prometheus_client"))
    from bstack.serve.guard import check_names, is_loopback

    if key is None and not is_loopback(host):
        raise UsageError(f"others can reach {host}, and without a key they could use the model.", option="api_key")
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UsageError("the API key has to be printable ASCII without spaces.")
    check_names(hosts, origins)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with an address, where `listen` listens; UsageError for an address that cannot be had."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise UsageError(f"{host} port {port} cannot be used: {error}.", option="port") from None
    return sock


def listen(sock: socket.socket) -> None:
    """Take connections from now on; until then clients are refused."""
    try:
        sock.listen(CONNECTIONS)
    except OSError as error:
        raise UsageError(f"port {sock.getsockname()[1]} cannot be used: {error}.", option="port") from None


def serve(
    model: NativeModel,
    tokenizer: TextTokenizer,
    sock: socket.socket,
    *,
    name: str,
    wanted: int | str | None,
    key: str | None,
    hosts: Sequence[str],
    origins: Sequence[str],
    parallel: int,
    queue: int,
    cache_bytes: int,
    idle_bytes: int | None,
    idle_after: float | None,
    log: Callable[[str], None],
) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Running texts then have `GRACE` seconds to end; new ones are refused. A second SIGINT ends at once.

    Parameters
    ----------
    model, tokenizer
        From `bstack.engine.native.load.load`.
    sock : socket.socket
        From `bind`, listening.
    name : str
        The model's name for clients.
    wanted, idle_bytes
        As `bstack.serve.size.Size` takes them.
    key : str, optional
        What clients have to send.
    hosts, origins : sequence of str
        Names of this machine in the Host header, and origins of pages that may ask.
    parallel, queue, cache_bytes
        As `bstack.serve.scheduler.Scheduler` takes them.
    idle_after : float, optional
        Seconds without requests after which the model becomes small.
    log : callable
        Receives one line at a time.
    """
    import uvicorn

    from bstack.serve.app import build
    from bstack.serve.connection import Connection
    from bstack.serve.guard import HEADERS, Guard
    from bstack.serve.scheduler import Scheduler
    from bstack.serve.size import Size

    size = Size(model, wanted, idle_bytes, log)
    scheduler = Scheduler(model, tokenizer, parallel=parallel, queue=queue, cache_bytes=cache_bytes, log=log)
    log(
        f"There is room for {scheduler.page_count * PAGE:,} tokens of all texts together (option cache-mb), and {scheduler.longest:,} of "
        "one: its prompt and the most that it may write."
    )
    app = build(scheduler, size, name, Guard(key, hosts, origins), idle_after=idle_after)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=parallel + queue + CONNECTIONS,
        timeout_graceful_shutdown=GRACE + 2 * CLOSING,
        h11_max_incomplete_event_size=2 * HEADERS,  # so that most clients read why
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if not self.should_exit:
                scheduler.refuse()
                timer = threading.Timer(GRACE, scheduler.stop)
                timer.daemon = True
                timer.start()
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            timer = asyncio.get_running_loop().call_later(GRACE + CLOSING, self._abort)
            await super().shutdown(sockets)
            timer.cancel()
            self._abort()
            if tasks := list(self.server_state.tasks):  # they end with their connections
                await asyncio.wait(tasks, timeout=1)
            if self.force_exit:  # uvicorn leaves it out
                await self.lifespan.shutdown()

        def _abort(self) -> None:
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    # uvicorn raises the signals once more when it has ended, for the handlers that were there before.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(config).run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        scheduler.stop()
        size.close()
