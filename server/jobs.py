"""A request's way through the server: a job, and the events that its answer consists of."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from server.errors import ApiError
from server.schema import ChatRequest, CompletionRequest
from transformers_patches.generation.generate import GenerationResult
from transformers_patches.generation.token_logprobs import TokenLogprob


@dataclass(frozen=True)
class Started:
    """The prompt is a valid one, and its answer begins."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """What has become certain with a token; the text may be empty."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    reading: dict | None = None  # what was read for the token, if that was asked for


@dataclass(frozen=True)
class Done:
    """The answer is complete."""

    result: GenerationResult
    reused_tokens: int  # of the prompt, which were not computed again
    summary: dict  # what the answer took


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: ApiError


Event = Started | Piece | Done | Failed


class Job:
    """A request that waits or is answered. Made in the event loop's thread; `put` is called from the worker's."""

    def __init__(self, request: ChatRequest | CompletionRequest) -> None:
        self.request = request
        self.created = time.time()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def wants_reading(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.partinfer)

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it ends after the current token."""
        self._cancelled.set()

    def put(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        return await self._events.get()
