"""The endpoints of the server, as an ASGI application of Starlette."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import bstk
from bstack.serve import requests
from bstack.serve.forms import Chat, Completion
from bstack.serve.guard import Guard
from bstack.serve.metrics import Metrics
from bstack.serve.requests import ApiError
from bstack.serve.scheduler import Busy, Chosen, Job, Piece, Scheduler
from bstack.serve.size import AUTO, Size
from bstk.errors import BstkError

__all__ = ["build"]

# Bytes of a body, and seconds: until it is there, and between two pings of a quiet stream.
BODY, BODY_SECONDS, PING = 4 * 2**20, 30.0, 15.0
# Pieces of text that a client has not taken.
UNREAD = 4096
# Threads that read prompts and change the size; each keeps memory of its own.
THREADS = 8
# Seconds between two looks at the size, for the page, and at whether nobody asks.
LOOK, IDLE_LOOK = 0.25, 1.0


class _Stream(StreamingResponse):
    """Server-sent events; the texts end with the connection."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._ended()


class _Texts:
    """The texts of one request on their way to its client."""

    def __init__(self, scheduler: Scheduler, asks: Sequence[requests.Ask]):
        self._scheduler = scheduler
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.sent = time.monotonic()  # when something was
        loop = asyncio.get_running_loop()

        def teller(index: int) -> Callable[[Piece], None]:
            def tell(piece: Piece) -> None:
                if self._queue.qsize() >= UNREAD:  # each keeps memory
                    piece = Piece("it is not read", end="error")
                    scheduler.cancel(self.jobs)
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

            return tell

        self.jobs: list[Job] = [scheduler.job(ask, teller(index)) for index, ask in enumerate(asks)]
        try:
            scheduler.submit(self.jobs)
        except Busy as busy:
            if busy.stopping:
                raise _stopping() from None
            raise ApiError(
                429, "Too many requests wait. Try again later.", kind="rate_limit_error", code="queue_full",
                headers={"Retry-After": str(busy.seconds)},
            ) from None  # fmt: skip

    async def pieces(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """Yield the pieces of all texts as they come, and None when nothing was sent for long."""
        left = len(self.jobs)
        while left:
            try:
                index, piece = await asyncio.wait_for(self._queue.get(), max(0.01, self.sent + PING - time.monotonic()))
            except TimeoutError:
                self.sent = time.monotonic()
                yield None
                continue
            left -= piece.end is not None
            yield index, piece

    def cancel(self) -> None:
        self._scheduler.cancel(self.jobs)

    def usage(self) -> dict[str, Any]:
        # Texts of one prompt read it once; the first of them knows what was there before.
        prompts = {id(job.ask.ids): job for job in reversed(self.jobs)}.values()
        prompt, new = sum(len(job.ask.ids) for job in prompts), sum(job.new for job in self.jobs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in prompts)},
        }


def build(scheduler: Scheduler, size: Size, name: str, guard: Guard, *, idle_after: float | None = None) -> Any:
    """Return the application for the model `name`; without requests for `idle_after` seconds the model becomes small."""
    created = int(time.time())
    metrics = Metrics(scheduler, size)
    page, policy = _page()
    model = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "bstack",
        "context_length": scheduler.longest,
    }

    async def texts(
        request: Request, read: Callable[..., requests.Request], kind: type[Chat] | type[Completion]
    ) -> Response:
        raw = await _body(request)
        scheduler.touch()
        asked = await anyio.to_thread.run_sync(lambda: read(requests.parse(raw), name, scheduler))
        running = _Texts(scheduler, asked.asks)
        if idle_after is not None:  # after the texts are there, so that the model does not shrink again
            await anyio.to_thread.run_sync(size.wake)
        form = kind(scheduler.tokenizer.token_bytes, asked)
        head = {
            "id": f"{form.id}-{secrets.token_hex(12)}",
            "object": form.part_object if asked.stream else form.whole_object,
            "created": int(time.time()),
            "model": name,
        }

        def ended() -> None:
            running.cancel()
            metrics.finished(running.jobs)

        if asked.stream:
            return _Stream(_events(running, form, head, asked), ended)
        try:
            found = await _all(request, running)
            if found is None:
                return Response(status_code=499)
            choices = [form.whole(index, *parts) for index, parts in enumerate(found)]
            return JSONResponse({**head, "choices": choices, "usage": running.usage()})
        finally:
            ended()

    async def chat_completions(request: Request) -> Response:
        return await texts(request, requests.read_chat, Chat)

    async def completions(request: Request) -> Response:
        return await texts(request, requests.read_completion, Completion)

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != name:
            raise ApiError(404, "There is no such model.", param="model", code="model_not_found")
        return JSONResponse(model)

    async def health(_request: Request) -> Response:
        status = "failed" if scheduler.failed else "stopping" if scheduler.stopping else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def budget(request: Request) -> Response:
        if request.method == "POST":
            wanted = requests.parse(await _body(request)).get("mb")
            scheduler.touch()  # it stays until nobody asks for long again
            try:
                if isinstance(wanted, bool) or not isinstance(wanted, (int, float, str)):
                    raise bstk.UsageError("mb has to be a number of megabytes, or auto.")
                await anyio.to_thread.run_sync(size.set, AUTO if wanted == AUTO else bstk.budget_bytes(wanted))
            except BstkError as error:
                raise ApiError(400, str(error), param="mb", code="invalid_value") from None
        return JSONResponse(await anyio.to_thread.run_sync(size.state))

    async def budget_events(_request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            last, quiet = None, 0.0
            while not scheduler.stopping:
                now = await anyio.to_thread.run_sync(size.state)
                quiet = quiet + LOOK if now == last else 0.0
                if now != last:
                    yield _event(now)
                elif quiet >= PING:
                    quiet = 0.0
                    yield ": ping\n\n"
                last = now
                await asyncio.sleep(LOOK)

        return _Stream(events(), lambda: None)

    async def show_page(_request: Request) -> Response:
        return HTMLResponse(
            page,
            headers={
                "Content-Security-Policy": policy,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            },
        )

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        task = asyncio.ensure_future(_sleep_when_idle(scheduler, size, idle_after))
        yield
        task.cancel()
        await anyio.to_thread.run_sync(scheduler.stop)

    routes = [
        Route("/", show_page),
        Route("/health", health),
        Route("/metrics", show_metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/budget", budget, methods=["GET", "POST"]),
        Route("/v1/budget/events", budget_events),
    ]
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
    app: Any = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)

    def shared(answer: Any) -> Any:
        """Let pages of other origins read an answer, also one that refuses."""
        options: Any = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["Retry-After"]}
        return CORSMiddleware(answer, allow_origins=guard.origins, **options) if guard.origins else answer

    app = shared(app)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await app(scope, receive, send)
            return
        status = 500

        async def counted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            guard.check(scope["method"], scope["path"], Headers(scope=scope))
        except ApiError as error:
            answer = JSONResponse(error.body, error.status, error.headers)
            await (answer if scope["method"] == "OPTIONS" else shared(answer))(scope, receive, counted)
        else:
            await app(scope, receive, counted)
        finally:
            metrics.answered(scope["path"] if scope["path"] in paths else "other", status)

    paths = {route.path for route in routes}
    return guarded


async def _events(running: _Texts, form: Any, head: dict[str, Any], asked: requests.Request) -> AsyncIterator[str]:
    """Yield the events of a stream."""
    usage = {"usage": None} if asked.usage else {}
    for index in range(len(running.jobs)):
        if (begin := form.first(index)) is not None:
            yield _event({**head, "choices": [begin], **usage})
    async for found in running.pieces():
        if found is None:
            yield ": ping\n\n"
            continue
        if found[1].end in _FAILED:
            yield _event(_failed(found[1]).body)
            return
        for choice in form.parts(*found):
            running.sent = time.monotonic()
            yield _event({**head, "choices": [choice], **usage})
    if asked.usage:
        yield _event({**head, "choices": [], "usage": running.usage()})
    yield "data: [DONE]\n\n"


async def _all(request: Request, running: _Texts) -> list[tuple[str, list[Chosen], str | None]] | None:
    """Return text, chosen tokens and end of each text; None if the client goes meanwhile."""
    parts: list[list[Piece]] = [[] for _ in running.jobs]
    gone = True

    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        async for found in running.pieces():
            if found is not None:
                parts[found[0]].append(found[1])
        gone = False
        group.cancel_scope.cancel()
    if gone:
        return None
    for pieces in parts:
        if pieces[-1].end in _FAILED:
            raise _failed(pieces[-1])
    return [
        ("".join(piece.text for piece in pieces), [one for piece in pieces for one in piece.chosen], pieces[-1].end)
        for pieces in parts
    ]


_FAILED = ("error", "stopping")


def _failed(piece: Piece) -> ApiError:
    if piece.end == "stopping":
        return _stopping()
    return ApiError(500, f"The text could not be written: {piece.text}.", kind="server_error", code="failed")


def _stopping() -> ApiError:
    return ApiError(503, "The server stops.", kind="server_error", code="stopping", headers={"Retry-After": "5"})


def _event(value: Any) -> str:
    return "data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n\n"


async def _body(request: Request) -> bytes:
    """Return a body of at most `BODY` bytes, in at most `BODY_SECONDS` seconds."""
    parts, length = [], 0
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for part in request.stream():
                length += len(part)
                if length > BODY:
                    break
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"The body took more than {BODY_SECONDS:.0f} seconds.", headers=_CLOSE) from None
    except ClientDisconnect:
        raise ApiError(400, "The body is not whole.") from None
    if length > BODY:
        raise ApiError(413, f"The body has more than {BODY // 2**20} MB.", headers=_CLOSE)
    return b"".join(parts)


_CLOSE = {"Connection": "close"}


async def _sleep_when_idle(scheduler: Scheduler, size: Size, after: float | None) -> None:
    while after is not None:
        await asyncio.sleep(min(IDLE_LOOK, after))
        if scheduler.idle >= after and not size.asleep:
            await anyio.to_thread.run_sync(size.sleep, lambda: scheduler.idle >= after)


def _page() -> tuple[str, str]:
    """Return the page, and the policy by which a browser runs its own script and style alone."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return text, (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _api_error(_request: Request, error: Any) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(_request: Request, error: Any) -> Response:
    words = {404: "There is no such address.", 405: "This address does not take that method."}
    answer = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), headers=error.headers)
    return JSONResponse(answer.body, answer.status, answer.headers)


async def _bug(_request: Request, _error: Exception) -> Response:
    answer = ApiError(500, "The server failed; its log says how.", kind="server_error")
    return JSONResponse(answer.body, answer.status)
