"""From a job's events to an HTTP response: one object, or server-sent events; both end when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from server.engine import Engine
from server.errors import ApiError
from server.jobs import Done, Failed, Job, Piece
from server.objects import ChatAnswer, CompletionAnswer, event

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
Answer = ChatAnswer | CompletionAnswer


@asynccontextmanager
async def _watched(engine: Engine, job: Job, receive: Callable[[], Awaitable[dict]]) -> AsyncIterator[None]:
    """Within this block, a client that goes away ends the job; at its end the job is over in any case."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        engine.cancel(job)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        engine.cancel(job)


async def whole(engine: Engine, job: Job, answer: Answer, request: Request) -> JSONResponse:
    """The answer as one object. Raises ApiError if there is none."""
    texts, logprobs = [], []
    async with _watched(engine, job, request.receive):
        engine.submit(job)
        while not isinstance(happened := await job.next(), Done):
            if isinstance(happened, Failed):
                raise happened.error
            if isinstance(happened, Piece):
                texts.append(happened.text)
                logprobs += happened.logprobs
    given = None if job.request.logprob_count is None else logprobs
    extended = job.request.partinfer is not None
    return JSONResponse(answer.whole("".join(texts), given, happened, extended=extended), headers=HEADERS)


class EventStream(Response):
    """The answer in server-sent events. Errors before its first token are responses of their own."""

    media_type = "text/event-stream"

    def __init__(self, engine: Engine, job: Job, answer: Answer) -> None:
        self.status_code, self.background, self.body = 200, None, b""
        self.engine, self.job, self.answer = engine, job, answer
        self.init_headers(HEADERS)
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]

    async def __call__(self, scope, receive, send) -> None:
        async with _watched(self.engine, self.job, receive):
            try:
                self.engine.submit(self.job)
                first = await self.job.next()
                if isinstance(first, Failed):
                    raise first.error
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for body in self._events():
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        """What is sent, each in one piece."""
        answer, options = self.answer, self.job.request.stream_options
        for chunk in answer.first():
            yield event(chunk)
        while not isinstance(happened := await self.job.next(), Done):
            if isinstance(happened, Failed):
                yield event(happened.error.body())
                return
            if isinstance(happened, Piece):
                extra = {} if happened.reading is None else {"partinfer": happened.reading}
                yield event(answer.chunk(happened.text, happened.logprobs, **extra))
        with_usage = options is not None and bool(options.include_usage)
        extended = self.job.wants_reading or self.job.request.partinfer is not None
        for chunk in answer.last(happened, with_usage=with_usage, extended=extended):
            yield event(chunk)
        yield event("[DONE]")
