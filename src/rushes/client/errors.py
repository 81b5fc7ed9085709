"""What a client raises.

::

    RushesClientError
    ├── ConnectionFailed        the server could not be reached, or the connection broke
    ├── ApiError                the server answered with an error
    │   ├── Unauthorized        no key, a wrong key, or a key without the right (401, 403)
    │   ├── NotFound            no such model or request, or another account's (404)
    │   ├── InvalidInput        the input does not fit; ``fields`` lists every field (400, 413, 422)
    │   ├── RateLimited         too many requests or too many waiting ones; ``retry_after`` (429)
    │   └── ServerError         the server's own mistake, or no answer of this wire (5xx)
    ├── RequestFailed           the request ended as failed; ``result`` has its error
    ├── RequestCancelled        the request was cancelled; ``result`` has its record
    └── WaitTimeout             the wait was given up; the request itself goes on

This package ships alone, so the tree is its own and not the server's.
"""

from collections.abc import Mapping
from typing import Any

from rushes.client.types import FieldError, Result, Status


class RushesClientError(Exception):
    """The root of everything that the client raises on purpose."""


class ConnectionFailed(RushesClientError):
    """No answer came.

    ``sent`` is False where the server certainly got nothing, and True where it may have acted on the call:
    a submit may then have been accepted although its ``request_id`` is lost.
    """

    def __init__(self, message: str, *, url: str, sent: bool) -> None:
        self.message, self.url, self.sent = message, url, sent
        super().__init__(message)


class ApiError(RushesClientError):
    """The server answered, and refused.

    ``status`` is the HTTP status (200 where a server hides its errors behind it), ``error_code`` the wire's
    own code where one was given, ``detail`` whatever the answer's ``detail`` held, ``retry_after`` seconds
    until a new try makes sense, ``trace_id`` the answer's ``X-Request-Id`` for the server's operator.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        error_code: int | str | None = None,
        detail: Any = None,
        fields: tuple[FieldError, ...] = (),
        retry_after: float | None = None,
        trace_id: str | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        self.message, self.status, self.error_code, self.detail = message, status, error_code, detail
        self.fields = fields
        self.retry_after = retry_after
        self.trace_id = trace_id
        self.body = body or {}
        told = [str(field).rstrip(".") for field in fields if field.message not in message]
        super().__init__("; ".join([message.rstrip("."), *told]) if told else message)


class Unauthorized(ApiError):
    """The server does not accept this key, or it got none."""


class NotFound(ApiError):
    """There is no such model or request for this key."""


class InvalidInput(ApiError):
    """The input does not fit the model; ``fields`` lists every failing field."""


class RateLimited(ApiError):
    """The key has too many calls or too many waiting requests."""


class ServerError(ApiError):
    """The server failed, or answered with something that is not this wire."""


class RequestFailed(RushesClientError):
    """The request ended as failed."""

    def __init__(self, result: Result) -> None:
        self.result = result
        reason = str(result.error) if result.error else "the server gave no reason"
        super().__init__(f"request {result.request_id} failed: {reason}")


class RequestCancelled(RushesClientError):
    """The request was cancelled."""

    def __init__(self, result: Result) -> None:
        self.result = result
        super().__init__(f"request {result.request_id} was cancelled")


class WaitTimeout(RushesClientError):
    """The wait ended before the request did. ``status`` is the last one seen, if any."""

    def __init__(self, request_id: str, seconds: float, status: Status | None) -> None:
        self.request_id, self.seconds, self.status = request_id, seconds, status
        state = f"is {status.status}" if status else "gave no answer"
        super().__init__(f"request {request_id} {state} after {seconds:g} s; it goes on without this wait")
