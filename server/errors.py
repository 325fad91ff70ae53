"""Errors as OpenAI's API gives them: one object with a line that says what to do."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from transformers_patches import cli

INVALID = "invalid_request_error"
INTERNAL = "the server failed; its own output says why"


class ApiError(Exception):
    """An answer that is an error. `status`: of HTTP; `param`: the field that is wrong; `code`: a word for programs."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind, self.headers = status, param, code, kind, headers

    def body(self) -> dict:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def internal(error: BaseException) -> ApiError:
    """What a client is told of a failure that is not its own; the reason is printed here and stays here."""
    cli.show_error(error)
    return ApiError(INTERNAL, 500, kind="server_error", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Every error of the app in one form."""

    @app.exception_handler(ApiError)
    async def own(_request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(str(error.detail), error.status_code, code=code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> JSONResponse:
        return internal(error).response()


def from_validation(found: Sequence[dict]) -> ApiError:
    """The first of pydantic's complaints in one line."""
    first = found[0] if found else {"loc": (), "msg": "invalid", "type": ""}
    place = [str(part) for part in first["loc"] if part != "body" and not str(part).startswith(("function-", "list["))]
    name = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError("the body is no JSON object", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            f"{name} is not supported by this server: leave it out", param=name, code="unsupported_parameter"
        )
    if first["type"] == "unsupported":
        return ApiError(first["msg"], param=first["ctx"]["name"], code="unsupported_parameter")
    said = first["msg"].removeprefix("Value error, ")
    return ApiError(f"{name}: {said}" if name else said, param=name, code="invalid_value")
