"""Refusals, and the answers that clients get: each API has its own shape for an error."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

STATUS = {  # of the worker's errors; what is not listed is a bug
    "RequestError": 400,
    "ModelNotFoundError": 404,
    "CheckpointError": 422,
    "MemoryBudgetError": 422,
    "NumericsError": 503,
    "DeviceError": 503,
}
ADJUSTED = "X-MLX-ZImage-Adjusted"  # the header that says what was changed in a request
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 413: "too_large", 429: "queue_full"}


class Refusal(Exception):
    """An answer other than 200: what is wrong, and what to do. param names the field; code is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)
        self.headers = headers or {}


def unavailable(message: str, retry: bool = True) -> Refusal:
    """503; without `retry`, OpenAI's clients are asked not to send the request again."""
    headers = {"Retry-After": "5"} if retry else {"x-should-retry": "false"}
    return Refusal(503, message, code="unavailable", headers=headers)


def openai_error(refusal: Refusal) -> dict:
    kind = TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def a1111_error(refusal: Refusal) -> dict:
    return {"error": refusal.code or "Error", "detail": refusal.message, "body": "", "errors": refusal.message}


def answer(path: str, refusal: Refusal) -> JSONResponse:
    """The refusal in the shape of the API that the path belongs to; A1111 answers wrong values with 422."""
    a1111 = path.startswith(("/sdapi/", "/controlnet/"))
    status = 422 if a1111 and refusal.status == 400 else refusal.status
    return JSONResponse(a1111_error(refusal) if a1111 else openai_error(refusal), status, dict(refusal.headers))
