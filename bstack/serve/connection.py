"""Connections that end when nothing moves on them: uvicorn alone waits for ever for a request, and for a reader."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Connection"]

# Seconds until the headers of a request are there, until a reader takes what is sent, and until it has taken the last of it.
HEADER_SECONDS, SEND_SECONDS, LAST_SECONDS = 30.0, 60.0, 30.0


class Connection(H11Protocol):
    """A connection of uvicorn with bounds on its time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._abort_after(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing."""
        self._abort_after(None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Take what has come; the time for a request ends when its headers are there."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._abort_after(None)

    def on_response_complete(self) -> None:
        """Wait for the next request, or until the last of an answer is taken."""
        super().on_response_complete()
        self._abort_after(LAST_SECONDS)

    def pause_writing(self) -> None:
        """Wait for a reader."""
        super().pause_writing()
        self._abort_after(SEND_SECONDS)

    def resume_writing(self) -> None:
        """Go on: the reader has taken most of what was sent."""
        super().resume_writing()
        self._abort_after(None)

    def _abort_after(self, seconds: float | None) -> None:
        """Set the only timer anew."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
