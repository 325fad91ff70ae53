"""What is checked before a request is read: its size, who sends it, and which host it asks for."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable

from server.errors import ApiError

MOST_BODY = 4 << 20  # bytes
BODY_SECONDS = 30.0  # for a whole body to arrive
OPEN_PATHS = ("/", "/health", "/favicon.ico")  # need no key
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Receive = Callable[[], Awaitable[dict]]


class Limits:
    """ASGI middleware.

    api_key: what clients have to send as `Authorization: Bearer KEY`; None: nothing.
    local: refuse requests for other hosts than this machine. Without a key, a web page could otherwise reach the server
        through a name of its own that resolves to this machine.
    """

    def __init__(self, app, api_key: str | None, *, local: bool) -> None:
        self.app, self.key, self.local = app, api_key and api_key.encode(), local

    async def __call__(self, scope, receive: Receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            self._check_type(scope["method"], headers)
            receive = await _bounded(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.local and name.lower() not in LOOPBACK:
            raise ApiError("this server answers requests for this machine only", 403, code="wrong_host")

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.key is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
            raise ApiError(
                "a valid API key is needed: Authorization: Bearer KEY",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    @staticmethod
    def _check_type(method: str, headers: dict[bytes, bytes]) -> None:
        """JSON only: browsers send nothing else to a strange server without asking it first."""
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            raise ApiError("the body must be JSON: Content-Type: application/json", 415, code="unsupported_media_type")


async def _bounded(headers: dict[bytes, bytes], receive: Receive) -> Receive:
    """Read the body, and return what gives it again. Raises ApiError for one that is too large or does not come."""
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > MOST_BODY:
        raise _too_large()
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    break
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MOST_BODY:
                    raise _too_large()
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise ApiError(f"the body did not come within {BODY_SECONDS:g} seconds", 408, code="timeout") from None
    waiting = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
    if message["type"] == "http.disconnect":
        waiting = [message]

    async def again() -> dict:
        return waiting.pop() if waiting else await receive()

    return again


def _too_large() -> ApiError:
    return ApiError(f"the body is larger than {MOST_BODY >> 20} MiB: shorten it", 413, code="body_too_large")
