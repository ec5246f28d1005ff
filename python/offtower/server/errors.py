"""Errors of requests, as clients get them."""

from __future__ import annotations

from typing import Any

from offtower.errors import OfftowerError
from offtower.paths import redact


class RequestError(OfftowerError):
    """A request that cannot be answered.

    Args:
        message: what is wrong, and what to do.
        status: of the HTTP response.
        field: of the body or the query; None where the request as a whole is meant.
    """

    def __init__(self, message: str, *, status: int = 422, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


def error_body(error: OfftowerError) -> dict[str, Any]:
    """The JSON content that reports an error."""
    field = error.field if isinstance(error, RequestError) else None
    content = {"type": type(error).__name__, "field": field, "message": redact(str(error))}
    return {"error": content}


def status_of(error: OfftowerError) -> int:
    """HTTP status: 422 for what a request holds, unless the error has one."""
    return error.status if isinstance(error, RequestError) else 422
