"""The small part of HTTP that the hot routes need, on bare ASGI: headers, bodies, answers.

Why not the framework's request and response objects here: a status poll is two database look-ups of a few
microseconds, and routing and wrapping cost several times that. Everything else goes through Starlette.
"""

import itertools
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

import orjson
from starlette.types import Receive, Scope, Send

from rushes.errors import BodyTooLarge, MalformedRequest, RushesError

JSON_TYPE: Final = (b"content-type", b"application/json")
_TRACE: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


_PROCESS: Final = secrets.token_hex(6).encode()
_numbers: Final = itertools.count(1)


def _new_trace() -> bytes:
    """An id that no other process and no other request has; it need not be unguessable."""
    return b"%s-%x" % (_PROCESS, next(_numbers))


class Head:
    """What we read from a request's line and headers, in one pass."""

    __slots__ = ("authorization", "base_url", "length", "method", "path", "trace")

    def __init__(self, scope: Scope, public_url: str) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.authorization = b""
        self.length = -1
        host = trace = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                self.authorization = value
            elif name == b"host":
                host = value
            elif name == b"content-length":
                self.length = int(value) if value.isdigit() and len(value) < 16 else -1
            elif name == b"x-request-id":
                trace = value
        self.trace = trace if trace and _TRACE.fullmatch(trace) else _new_trace()
        self.base_url = public_url or f"{scope['scheme']}://{host.decode('latin-1') or _own_address(scope)}"


def _own_address(scope: Scope) -> str:
    server = scope.get("server") or ("localhost", 80)
    return f"{server[0]}:{server[1]}"


async def read_body(receive: Receive, length: int, limit: int) -> bytes:
    """The whole body. Raises BodyTooLarge past ``limit`` bytes, before reading where the length says so."""
    too_large = BodyTooLarge(f"The body may have {limit} bytes; upload large files with POST /v1/files.")
    if length > limit:
        raise too_large
    message = await receive()
    if not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise too_large
        return body
    parts, total = [message.get("body", b"")], len(message.get("body", b""))
    while message.get("more_body"):
        message = await receive()
        part = message.get("body", b"")
        total += len(part)
        if total > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """One whole JSON answer."""
    headers += (JSON_TYPE, (b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(error: RushesError) -> bytes:
    """The one form of every error on the native wire."""
    body: dict[str, Any] = {"error_code": error.code, "error_message": error.message}
    if error.detail is not None:
        body["detail"] = error.detail
    return dumps(body)


def error_headers(error: RushesError) -> Mapping[str, str]:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, -int(-error.retry_after // 1)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def flag(text: str | None, name: str) -> bool:
    """A yes or no of the query. Raises MalformedRequest for anything else."""
    value = {None: False, "true": True, "1": True, "": True, "false": False, "0": False}.get(
        text if text is None else text.lower()
    )
    if value is None:
        raise MalformedRequest(f"{name} must be true or false.")
    return value


def dumps(value: Any) -> bytes:
    """JSON. Lone surrogates, which a client's escapes can carry in, become question marks."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        import json

        return json.dumps(value, ensure_ascii=True).encode()
