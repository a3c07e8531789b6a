"""The endpoints of the server, as an ASGI application of Starlette."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import bstk
from bstack.serve import requests
from bstack.serve.answers import Answer
from bstack.serve.guard import Guard
from bstack.serve.metrics import Metrics
from bstack.serve.requests import ApiError
from bstack.serve.scheduler import Busy, Chosen, Job, Piece, Scheduler
from bstack.serve.size import AUTO, Size
from bstk.errors import BstkError

__all__ = ["build"]

# Bytes of a body, and seconds: until it is there, between two pings of a quiet stream, and until a reader takes what is sent.
BODY, BODY_SECONDS, PING, SEND_SECONDS = 4 * 2**20, 30.0, 15.0, 60.0
# Threads that read prompts and change the size; each keeps memory of its own.
THREADS = 8
# Seconds between two looks at the size, for the page, and at whether nobody asks.
LOOK, IDLE_LOOK = 0.25, 1.0


class _Stream(StreamingResponse):
    """Server-sent events. When the client goes, or takes nothing for long, the texts end."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def patient(message: Any) -> None:
            with anyio.fail_after(SEND_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, patient)
        except (ClientDisconnect, TimeoutError):
            pass
        finally:
            self._ended()


class _Texts:
    """The texts of one request on their way to its client."""

    def __init__(self, scheduler: Scheduler, asks: Sequence[requests.Ask]):
        self._scheduler = scheduler
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def teller(index: int) -> Callable[[Piece], None]:
            def tell(piece: Piece) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

            return tell

        self.jobs: list[Job] = [scheduler.job(ask, teller(index)) for index, ask in enumerate(asks)]
        try:
            scheduler.submit(self.jobs)
        except Busy as busy:
            raise ApiError(
                503 if busy.stopping else 429,
                "The server stops." if busy.stopping else "Too many requests wait. Try again later.",
                kind="server_error" if busy.stopping else "rate_limit_error",
                code="stopping" if busy.stopping else "queue_full",
                headers={"Retry-After": str(busy.seconds)},
            ) from None

    async def pieces(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """Yield the pieces of all texts as they come, and None where none comes for long."""
        left = len(self.jobs)
        while left:
            try:
                index, piece = await asyncio.wait_for(self._queue.get(), PING)
            except TimeoutError:
                yield None
                continue
            left -= piece.end is not None
            yield index, piece

    def cancel(self) -> None:
        self._scheduler.cancel(self.jobs)

    def usage(self) -> dict[str, Any]:
        # Texts of one prompt read it once.
        prompts = {id(job.ask.ids): job for job in self.jobs}.values()
        prompt, new = sum(len(job.ask.ids) for job in prompts), sum(job.new for job in self.jobs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in prompts)},
        }


class _Chat:
    """The form of /v1/chat/completions."""

    id, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, token: Callable[[int], str], asked: requests.Request):
        self._token = token
        self._answers = [Answer(asked.tools, asked.thinking) for _ in asked.asks]

    def first(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        answer = self._answers[index]
        deltas: list[dict[str, Any]] = answer.add(piece.text, last=piece.end is not None)
        if not deltas and (piece.end or piece.chosen):
            deltas = [{}]
        found: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if found:
            found[0]["logprobs"] = self._chances(piece.chosen)
            found[-1]["finish_reason"] = self._end(answer, piece.end)
        return found

    def whole(self, index: int, text: str, chosen: Sequence[Chosen], end: str | None) -> dict[str, Any]:
        answer = self._answers[index]
        parts = answer.add(text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": _joined(parts, "content"), "refusal": None}
        if thoughts := _joined(parts, "reasoning_content"):
            message["reasoning_content"] = thoughts
        if answer.called:
            message["content"] = message["content"] or None
            calls = [call for part in parts for call in part.get("tool_calls", ())]
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
        end = self._end(answer, end)
        return {"index": index, "message": message, "logprobs": self._chances(chosen), "finish_reason": end}

    def _end(self, answer: Answer, end: str | None) -> str | None:
        return "tool_calls" if end == "stop" and answer.called else end

    def _chances(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not chosen:
            return None

        def entry(token: int, chance: float) -> dict[str, Any]:
            text = self._token(token)
            return {"token": text, "logprob": chance, "bytes": list(text.encode())}

        return {
            "content": [
                {**entry(one.token, one.chance), "top_logprobs": [entry(*other) for other in one.likeliest]}
                for one in chosen
            ],
            "refusal": None,
        }


class _Completion:
    """The form of /v1/completions."""

    id, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, token: Callable[[int], str], _asked: requests.Request):
        self._token = token
        self._lengths: Counter[int] = Counter()

    def first(self, _index: int) -> dict[str, Any] | None:
        return None

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        return [self.whole(index, piece.text, piece.chosen, piece.end)]

    def whole(self, index: int, text: str, chosen: Sequence[Chosen], end: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._chances(index, chosen), "finish_reason": end}

    def _chances(self, index: int, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not chosen:
            return None
        tokens = [self._token(one.token) for one in chosen]
        offsets = []
        for text in tokens:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [one.chance for one in chosen],
            "top_logprobs": [{self._token(token): chance for token, chance in one.likeliest} for one in chosen],
            "text_offset": offsets,
        }


def build(
    scheduler: Scheduler,
    size: Size,
    name: str,
    guard: Guard,
    *,
    origins: Sequence[str] = (),
    idle_after: float | None = None,
) -> Any:
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

    def token(number: int) -> str:
        return scheduler.tokenizer.decode([number], special=True)

    async def texts(
        request: Request, read: Callable[..., requests.Request], kind: type[_Chat] | type[_Completion]
    ) -> Response:
        body = requests.parse(await _body(request))
        asked = await anyio.to_thread.run_sync(read, body, name, scheduler)
        if size.asleep:
            await anyio.to_thread.run_sync(size.wake)
        running = _Texts(scheduler, asked.asks)
        form = kind(token, asked)
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
        return await texts(request, requests.read_chat, _Chat)

    async def completions(request: Request) -> Response:
        return await texts(request, requests.read_completion, _Completion)

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != name:
            raise ApiError(404, "There is no such model.", param="model", code="model_not_found")
        return JSONResponse(model)

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "stopping" if scheduler.stopping else "ok"}, 503 if scheduler.stopping else 200)

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def budget(request: Request) -> Response:
        if request.method == "POST":
            wanted = requests.parse(await _body(request)).get("mb")
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
    middleware = []
    if origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
        )
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=middleware, lifespan=lifespan)

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
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, counted)
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
        elif found[1].end == "error":
            yield _event(_failed(found[1].text).body)
            return
        else:
            for choice in form.parts(*found):
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
        if pieces[-1].end == "error":
            raise _failed(pieces[-1].text)
    return [
        ("".join(piece.text for piece in pieces), [one for piece in pieces for one in piece.chosen], pieces[-1].end)
        for pieces in parts
    ]


def _joined(parts: Sequence[dict[str, Any]], field: str) -> str:
    return "".join(part.get(field, "") for part in parts)


def _failed(message: str) -> ApiError:
    return ApiError(500, f"The text could not be written: {message}.", kind="server_error", code="failed")


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
            await anyio.to_thread.run_sync(size.sleep)


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
