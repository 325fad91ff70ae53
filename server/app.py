"""The app: endpoints of OpenAI's API, health, metrics, and the page."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from server import replies
from server.answering import Answering, timed
from server.engine import QUEUE, Engine
from server.errors import ApiError, add_handlers
from server.jobs import Job
from server.limits import Limits
from server.metrics import Counted, Metrics
from server.objects import new_answer
from server.schema import ChatRequest, CompletionRequest
from transformers_patches import VERSION

PAGE = Path(__file__).with_name("page.html")


class Service:
    """One model, served: `asgi` is the application with its limits, `app` what is behind them."""

    def __init__(
        self,
        answering: Answering,
        names: list[str],
        *,
        api_key: str | None = None,
        local: bool = False,
        queue: int = QUEUE,
    ) -> None:
        """names: what requests may call the model; the first is what it calls itself.
        api_key, local: see Limits. queue: how many requests may wait.
        """
        self.answering, self.names, self.started = answering, names, int(time.time())
        self.engine = Engine(timed(answering, lambda seconds: self.engine.took(seconds)), queue)
        self.metrics = Metrics(answering.loaded, lambda: self.engine.waiting, lambda: self.engine.busy)
        answering.metrics = self.metrics
        self.app = FastAPI(title="PartInfer", version=VERSION, docs_url=None, redoc_url=None)
        add_handlers(self.app)
        self._add_answers()
        self._add_models()
        self._add_state()
        paths = frozenset(route.path for route in self.app.routes)
        self.asgi = Counted(Limits(self.app, api_key, local=local), self.metrics, paths)

    async def reply(self, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        """The response to a request, streamed if it asks for that."""
        self.check_name(asked.model)
        job = Job(asked)
        answer = new_answer(asked, self.names[0], int(job.created), self.answering.tokenizer)
        if asked.stream:
            return replies.EventStream(self.engine, job, answer)
        return await replies.whole(self.engine, job, answer, request)

    def check_name(self, name: str) -> None:
        """Raise ApiError for another model's name; none at all is the served one's."""
        if name and name not in self.names:
            raise ApiError(
                f"model {name:.60} is not served here, {self.names[0]} is", 404, param="model", code="model_not_found"
            )

    def _add_answers(self) -> None:
        @self.app.post("/v1/chat/completions", summary="Answer messages", responses=_ERRORS)
        async def chat_completions(asked: ChatRequest, request: Request) -> Response:
            return await self.reply(asked, request)

        @self.app.post("/v1/completions", summary="Continue a text", responses=_ERRORS)
        async def completions(asked: CompletionRequest, request: Request) -> Response:
            return await self.reply(asked, request)

    def _add_models(self) -> None:
        @self.app.get("/v1/models", summary="The model that is served")
        async def models() -> dict:
            return {"object": "list", "data": [self._model()]}

        @self.app.get("/v1/models/{name:path}", summary="The model that is served", responses=_ERRORS)
        async def model(name: str) -> dict:
            self.check_name(name)
            return self._model()

    def _add_state(self) -> None:
        @self.app.get("/health", summary="Whether the server answers")
        async def health() -> dict:
            return {"status": "ok", "model": self.names[0], "waiting": self.engine.waiting, "busy": self.engine.busy}

        @self.app.get("/metrics", summary="Counters for Prometheus")
        async def metrics() -> Response:
            return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

        page = PAGE.read_text(encoding="utf-8")
        headers = {"Content-Security-Policy": _policy(page), "X-Content-Type-Options": "nosniff"}
        headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

        @self.app.get("/", include_in_schema=False)
        async def chat_page() -> HTMLResponse:
            return HTMLResponse(page, headers=headers)

        @self.app.get("/favicon.ico", include_in_schema=False)
        async def icon() -> Response:
            return Response(status_code=204)

    def _model(self) -> dict:
        """OpenAI's model object, and what the page wants to know."""
        answering, loaded = self.answering, self.answering.loaded
        described = {
            "chat": answering.chats,
            "context": answering.context,
            "layers": loaded.plan.num_layers,
            "sparse_layers": list(loaded.plan.layers),
            "neurons_per_layer": loaded.plan.intermediate_size,
            "loaded_share": loaded.plan.loaded_fraction,
            "weight_bytes_resident": loaded.report.bytes_resident,
            "whole_bytes_per_token": loaded.whole_token_bytes(),
            **answering.settings.described(),
        }
        head = {"id": self.names[0], "object": "model", "created": self.started, "owned_by": "partinfer"}
        return head | {"partinfer": described}

    def close(self) -> None:
        """End all answers; more are refused."""
        self.engine.close()


_ERRORS = {
    code: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for code, text in {
        400: "not understood",
        401: "no valid key",
        404: "another model",
        413: "too large",
        429: "the queue is full",
    }.items()
}


def _policy(page: str) -> str:
    """A content security policy under which the page's own script and style run, and nothing else."""
    found = {name: re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL) for name in ("script", "style")}
    hashes = {
        name: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts
        )
        for name, texts in found.items()
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
