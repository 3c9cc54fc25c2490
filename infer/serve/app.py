"""The application of infer.serve: what a request must be, whose turn it is, and the answers."""

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

MOST = 100_000  # bytes of a request
TOO_MUCH = f"the request has more than {MOST:,} bytes; divide the note"
BODY_SECONDS = 10  # in which it must have come
SCRIPTS = ("elements.js", "note.js", "serve.js")
POLICY = f"{policy(SCRIPTS, trace_page.SCRIPTS)}; connect-src 'self'"  # a trace is shown inside the page, under it too
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Json = dict[str, Any]
END = object()


class Asked(BaseModel):
    """A note to answer."""

    text: str = Field(description="the note")
    adapter: bool = Field(True, description="with the adapter; false: by the model without it")


class Traced(Asked):
    """A note and one of its questions."""

    ask: str = Field(description="a phenotype's name, or diagnosis")


class Models:
    """The model with its adapter and, once it is asked for, the model without it: each takes its own memory."""

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
        yield {}
        yield from self.extractor(asked.adapter).stream(asked.text)

    def trace(self, asked: Traced) -> Iterator[str]:
        """The page of infer.trace about one answer, made from the model and the note as they are."""
        if asked.ask not in (*tasks.PHENOTYPES, "diagnosis"):
            raise UserError(f"'ask' is no question of ours; known are {', '.join(tasks.PHENOTYPES)} and diagnosis")
        asker = self.extractor(asked.adapter).asker
        if len(asker.parts(Note("", asked.text))) > 1:
            raise UserError("the note was read in windows, whose answers are not traced; give a shorter one")
        adapter = (str(self.adapter),) if asked.adapter and self.adapter else ()
        how: Json = {"form": asker.form, "adapter": adapter, "grounded": True, "max_new_tokens": 64}
        options = trace.Options(weights=str(self.weights), out=Path(), ask=asked.ask, **how)
        yield trace.traced(options, Note("", asked.text))[0]


class Turns:
    """One job at a time. It is left between two steps when its client has gone or its time is over."""

    def __init__(self, seconds: float) -> None:
        self.turn, self.seconds = asyncio.Lock(), seconds

    async def run(self, steps: Iterator[Any]) -> AsyncIterator[Any]:
        async with self.turn:
            until = time.monotonic() + self.seconds
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, steps, END))
                try:
                    made = await asyncio.shield(step)
                except asyncio.CancelledError:
                    await asyncio.wait([step])  # no other job begins before it has ended
                    raise
                if made is END:
                    return
                if time.monotonic() > until:
                    raise UserError(f"the note took more than {self.seconds:g} seconds; give a shorter one")
                yield made


class Guard:
    """Refuses what must not reach the application, before it is read: other hosts and origins (a page elsewhere, a name
    that was pointed here), a wrong token, a large or slow body, and more jobs than may wait."""

    def __init__(self, app: Any, hosts: set[str], token: str | None, waiting: int) -> None:
        self.app, self.hosts, self.token, self.waiting = app, hosts, token, waiting
        self.jobs = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status, said = self.refusal(scope, headers)
        if said:
            await refused(status, said)(scope, receive, with_headers)
            return
        self.jobs += scope["method"] == "POST"
        try:
            body, (status, said) = await self.body(receive)
            if said:
                await refused(status, said)(scope, receive, with_headers)
            else:
                await self.app(scope, self.again(body, receive), with_headers)
        finally:
            self.jobs -= scope["method"] == "POST"

    def refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str]:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host not in self.hosts:
            return 421, "this server has another name; use the address that it printed"
        if origin is not None and origin != f"http://{host}":
            return 403, "the request comes from a page of another origin"
        if self.token is not None and scope["path"] not in ("/", "/docs"):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                return 401, "the token is missing or another: Authorization: Bearer TOKEN"
        if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > MOST:
            return 413, TOO_MUCH
        if scope["method"] == "POST" and self.jobs >= self.waiting:
            return 503, "others are being answered, and as many wait as may; come again"
        return 200, ""

    async def body(self, receive: Any) -> tuple[bytes, tuple[int, str]]:
        """The body, and why it is refused ("" where it is not)."""
        body, more = b"", True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more and len(body) <= MOST:
                    message = await receive()
                    body, more = body + message.get("body", b""), message.get("more_body", False)
        except TimeoutError:
            return b"", (408, f"the request did not come within {BODY_SECONDS} seconds")
        return body, (413, TOO_MUCH) if len(body) > MOST else (200, "")

    def again(self, body: bytes, receive: Any) -> Callable[[], Any]:
        """A `receive` that gives the body that was read, and then what comes after it."""
        first = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Any:
            return next(first, None) or await receive()

        return receive_again


def refused(status: int, said: str) -> JSONResponse:
    return JSONResponse({"error": said}, status, {"Retry-After": "5"} if status == 503 else None)


def event(name: str, value: Any) -> str:
    """A server-sent event. JSON has no line end of its own, so the value is one line."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"


def make_app(models: Models, host: str, port: int, token: str | None, waiting: int = 8, seconds: float = 120) -> Guard:
    """The ASGI application. `token`: what requests must carry, None on loopback."""
    app = FastAPI(title="CancerLLM: answers about notes", version="1", docs_url=None, redoc_url=None)
    turns = Turns(seconds)

    @app.exception_handler(UserError)
    async def mistake(request: Request, error: UserError) -> Response:
        return refused(400, one_line(error))

    @app.exception_handler(HTTPException)
    async def no_page(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return refused(error.status_code, f"{what}; /docs describes requests")

    @app.exception_handler(RequestValidationError)
    async def no_request(request: Request, error: RequestValidationError) -> Response:
        if any(one["type"] == "json_invalid" for one in error.errors()):
            return refused(422, "the body is not JSON; /docs describes requests")
        wrong = ", ".join(".".join(map(str, one["loc"][1:])) or "the body" for one in error.errors())
        return refused(422, f"not a request of this API ({wrong}); /docs describes them")

    @app.post(
        "/api/answers", summary="A note's record", response_model=None, responses={200: {"description": "A record"}}
    )
    async def answers(asked: Asked, request: Request) -> Response:
        """The eight phenotypes and the diagnosis, with places and probabilities: a line of infer.extract without its
        id."""
        parts = []
        async for part in turns.run(models.stream(asked)):
            parts.append(part)
            if await request.is_disconnected():
                break
        return JSONResponse(parts[-1])

    @app.post("/api/stream", summary="The same as it comes", response_model=None)
    async def stream(asked: Asked) -> StreamingResponse:
        """Server-sent events: `rows` (answers that have ended), at last `record`, or `error`."""

        async def events() -> AsyncIterator[str]:
            record: Json = {}
            try:
                async for record in turns.run(models.stream(asked)):
                    if rows := view.answer_rows(record, {}):
                        yield event("rows", rows)
                yield event("record", record)
            except UserError as error:
                yield event("error", one_line(error))

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/api/trace", summary="What the model looked at", response_class=HTMLResponse)
    async def traced(asked: Traced) -> str:
        """The page of infer.trace about one answer: the same question asked again, and every value of that pass."""
        return [made async for made in turns.run(models.trace(asked))][-1]

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        data = {"letters": view.LETTERS, "adapter": models.adapter is not None, "model": models.weights.name}
        return HTMLResponse(build("serve.html", view.STYLES, SCRIPTS, "Answers about a note", data, POLICY))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()))

    shown = f"[{host}]" if ":" in host else host
    names = {shown} if token else {shown, "localhost", "127.0.0.1", "[::1]"}
    return Guard(app, {f"{name}:{port}" for name in names}, token, waiting)


def api_page(api: Json) -> str:
    """The API's description as a page without scripts."""
    parts = [f"<h1>{html.escape(api['info']['title'])}</h1><p>The same as JSON: <code>/openapi.json</code></p>"]
    for path, methods in api["paths"].items():
        for method, one in methods.items():
            parts.append(f"<section class=card><h2>{method.upper()} {path}: {html.escape(one['summary'])}</h2>")
            parts.append(f"<p>{html.escape(one['description'])}</p></section>")
    parts.append("<h2>Requests</h2><pre>" + html.escape(json.dumps(api["components"]["schemas"], indent=2)) + "</pre>")
    parts.append("<h2>A record</h2><pre>" + html.escape(json.dumps(SCHEMA, indent=2)) + "</pre>")
    style = joined(("page.css",))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>API</title><style>{style}</style>"
    return f"{head}<header>{''.join(parts)}</header></html>"
