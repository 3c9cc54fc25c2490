"""The ASGI application of infer.serve: checks requests, queues them, and answers them."""

from __future__ import annotations

import asyncio
import html
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from infer import tasks, trace, view
from infer.extract.answers import SCHEMA
from infer.extract.extractor import Extractor
from infer.extract.notes import Note
from infer.inspect import page as trace_page
from infer.inspect.html import build, joined, policy
from model.support.cli import UserError, one_line

MAX_BYTES = 100_000  # size of a request's body
TOO_LARGE = f"the request has more than {MAX_BYTES:,} bytes; divide the note"
BODY_SECONDS = 10  # time to receive a request's body
SCRIPTS = ("elements.js", "note.js", "serve.js")
POLICY = f"{policy(SCRIPTS, trace_page.SCRIPTS)}; connect-src 'self'"  # also for the trace page, shown in an iframe
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Json = dict[str, Any]
END = object()  # next(steps, END) when there are no more


class Asked(BaseModel):
    """A note to answer."""

    text: str = Field(description="the note")
    adapter: bool = Field(True, description="use the adapter; false: the model without it")


class Traced(Asked):
    """A note and the question whose answer is traced."""

    ask: str = Field(description="a phenotype's name, or diagnosis")


class Models:
    """The model with its adapter and the model without it, each loaded on first use, in its own memory."""

    def __init__(self, weights: Path, adapter: Path | None) -> None:
        self.weights, self.adapter = weights, adapter
        self.loaded: dict[bool, Extractor] = {}
        self.lock = threading.Lock()

    def extractor(self, adapted: bool) -> Extractor:
        adapted = adapted and self.adapter is not None
        with self.lock:
            if adapted not in self.loaded:
                self.loaded[adapted] = Extractor(self.weights, self.adapter if adapted else None)
            return self.loaded[adapted]

    def stream(self, asked: Asked) -> Iterator[Json]:
        """Yields the note's record as it grows, {} first."""
        yield {}
        yield from self.extractor(asked.adapter).stream(asked.text)

    def trace(self, asked: Traced) -> Iterator[str]:
        """Yields the page of infer.trace about one answer."""
        if asked.ask not in (*tasks.PHENOTYPES, "diagnosis"):
            raise UserError(f"'ask' is not a known question; known are {', '.join(tasks.PHENOTYPES)} and diagnosis")
        asker = self.extractor(asked.adapter).asker
        if len(asker.parts(Note("", asked.text))) > 1:
            raise UserError("the note is read in windows, whose answers cannot be traced; give a shorter note")
        adapter = (str(self.adapter),) if asked.adapter and self.adapter else ()
        more: Json = {"form": asker.form, "adapter": adapter, "grounded": True, "max_new_tokens": 64}
        options = trace.Options(weights=str(self.weights), out=Path(), ask=asked.ask, **more)
        yield trace.traced(options, Note("", asked.text))[0]


class Queue:
    """Runs one job at a time. A job is a blocking iterator, stepped in a thread; it is stopped between steps when its
    client disconnects or its time is over."""

    def __init__(self, seconds: float) -> None:
        self.lock, self.seconds = asyncio.Lock(), seconds

    async def run(self, steps: Iterator[Any]) -> AsyncIterator[Any]:
        """Yields the job's items. Raises UserError after `seconds`."""
        async with self.lock:
            deadline = time.monotonic() + self.seconds
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, steps, END))
                try:
                    item = await asyncio.shield(step)
                except asyncio.CancelledError:
                    await asyncio.wait([step])  # the thread must end before the next job starts
                    raise
                if item is END:
                    return
                if time.monotonic() > deadline:
                    raise UserError(f"the note took more than {self.seconds:g} seconds; give a shorter one")
                yield item


class Guard:
    """ASGI middleware that refuses requests before the application reads them: other hosts (DNS rebinding) or origins,
    a wrong token, a body that is too large or too slow, and more than `waiting` jobs at once."""

    def __init__(self, app: Any, hosts: set[str], token: str | None, waiting: int, body_seconds: float) -> None:
        self.app, self.hosts, self.token, self.waiting = app, hosts, token, waiting
        self.body_seconds = body_seconds
        self.jobs = 0  # number of POST requests that are waiting or being answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self.refusal(scope, headers):
            await refusal(scope, receive, with_headers)
            return
        is_job = scope["method"] == "POST"
        self.jobs += is_job
        try:
            body = await self.body(receive)
            if isinstance(body, bytes):
                await self.app(scope, self.replayed(body, receive), with_headers)
            else:
                await body(scope, receive, with_headers)
        finally:
            self.jobs -= is_job

    def refusal(self, scope: Any, headers: dict[str, str]) -> JSONResponse | None:
        """The response to a request that is refused by its headers, or None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if host not in self.hosts:
            return refused(421, "this server has another name; use the address that it printed")
        if origin is not None and origin != f"http://{host}":
            return refused(403, "the request comes from a page of another origin")
        if self.token is not None and scope["path"] not in ("/", "/docs"):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                return refused(401, "the token is missing or wrong; send the header Authorization: Bearer TOKEN")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BYTES:
            return refused(413, TOO_LARGE)
        if scope["method"] == "POST" and self.jobs >= self.waiting:
            return refused(503, "the queue is full; try again later")
        return None

    async def body(self, receive: Any) -> bytes | JSONResponse:
        """The request's body, or the response that refuses it."""
        body, more = b"", True
        try:
            async with asyncio.timeout(self.body_seconds):
                while more and len(body) <= MAX_BYTES:
                    message = await receive()
                    body, more = body + message.get("body", b""), message.get("more_body", False)
        except TimeoutError:
            return refused(408, f"the request's body was not received within {self.body_seconds:g} seconds")
        return refused(413, TOO_LARGE) if len(body) > MAX_BYTES else body

    def replayed(self, body: bytes, receive: Any) -> Callable[[], Any]:
        """A `receive` that returns the body that was read, then further messages."""
        first = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Any:
            return next(first, None) or await receive()

        return receive_again


def refused(status: int, error: str) -> JSONResponse:
    return JSONResponse({"error": error}, status, {"Retry-After": "5"} if status == 503 else None)


def event(name: str, value: Any) -> str:
    """A server-sent event. json.dumps writes no line ends, so the value is one line."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"


def add_error_handlers(app: FastAPI) -> None:
    """Errors as {"error": line}."""

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return refused(400, one_line(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        return refused(error.status_code, f"{where}: {error.detail}; /docs describes requests")

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        if any(one["type"] == "json_invalid" for one in error.errors()):
            return refused(422, "the body is not JSON; /docs describes requests")
        wrong = ", ".join(".".join(map(str, one["loc"][1:])) or "the body" for one in error.errors())
        return refused(422, f"the request has a missing or wrong field ({wrong}); /docs describes requests")


def add_api(app: FastAPI, models: Models, queue: Queue) -> None:
    """The routes /api/answers, /api/stream and /api/trace."""

    @app.post(
        "/api/answers", summary="A note's record", response_model=None, responses={200: {"description": "A record"}}
    )
    async def answers(asked: Asked, request: Request) -> Response:
        """The eight phenotypes and the diagnosis, with places and probabilities: a record of infer.extract without its
        id."""
        parts = []
        async for part in queue.run(models.stream(asked)):
            parts.append(part)
            if await request.is_disconnected():
                break
        return JSONResponse(parts[-1])

    @app.post("/api/stream", summary="A note's record, streamed", response_model=None)
    async def stream(asked: Asked) -> StreamingResponse:
        """Server-sent events: `rows` (the finished answers so far), and at the end `record` or `error`."""

        async def events() -> AsyncIterator[str]:
            record: Json = {}
            try:
                async for record in queue.run(models.stream(asked)):
                    if rows := view.answer_rows(record, {}):
                        yield event("rows", rows)
                yield event("record", record)
            except UserError as error:
                yield event("error", one_line(error))

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/api/trace", summary="Trace of an answer", response_class=HTMLResponse)
    async def traced(asked: Traced) -> str:
        """The page of infer.trace about one answer, which is generated again."""
        return [page async for page in queue.run(models.trace(asked))][-1]


def make_app(
    models: Models,
    host: str,
    port: int,
    token: str | None,
    waiting: int = 8,
    seconds: float = 120,
    body_seconds: float = BODY_SECONDS,
) -> Guard:
    """The ASGI application. Requests must carry `token` unless it is None (on loopback)."""
    app = FastAPI(title="CancerLLM: answers about notes", version="1", docs_url=None, redoc_url=None)
    queue = Queue(seconds)
    add_error_handlers(app)
    add_api(app, models, queue)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        data = {"letters": view.LETTERS, "adapter": models.adapter is not None, "model": models.weights.name}
        return HTMLResponse(build("serve.html", view.STYLES, SCRIPTS, "Answers about a note", data, POLICY))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()))

    shown = f"[{host}]" if ":" in host else host
    names = {shown} if token else {shown, "localhost", "127.0.0.1", "[::1]"}
    return Guard(app, {f"{name}:{port}" for name in names}, token, waiting, body_seconds)


def api_page(api: Json) -> str:
    """The OpenAPI description as an HTML page without scripts."""
    parts = [f"<h1>{html.escape(api['info']['title'])}</h1><p>The same as JSON: <code>/openapi.json</code></p>"]
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            parts.append(f"<section class=card><h2>{method.upper()} {path}: {html.escape(route['summary'])}</h2>")
            parts.append(f"<p>{html.escape(route['description'])}</p></section>")
    parts.append("<h2>Requests</h2><pre>" + html.escape(json.dumps(api["components"]["schemas"], indent=2)) + "</pre>")
    parts.append("<h2>A record</h2><pre>" + html.escape(json.dumps(SCHEMA, indent=2)) + "</pre>")
    style = joined(("page.css",))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>API</title><style>{style}</style>"
    return f"{head}<header>{''.join(parts)}</header></html>"
