"""The small part of HTTP that the hot routes need, on bare ASGI: headers, bodies, answers.

Why not the framework's request and response objects here: a status poll is two database look-ups of a few
microseconds, and routing and wrapping cost several times that. Everything else goes through Starlette.
"""

import itertools
import re
import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
from starlette.types import Scope, Send

from rushes.errors import MalformedRequest, MethodNotAllowed, RushesError

JSON_TYPE: Final = (b"content-type", b"application/json")
_TRACE: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{0,5})?")


_PROCESS: Final = secrets.token_hex(6).encode()
_numbers: Final = itertools.count(1)


def new_trace() -> bytes:
    """An id that no other process and no other request has; it need not be unguessable."""
    return b"%s-%x" % (_PROCESS, next(_numbers))


def trace_of(given: bytes) -> bytes:
    """The client's own X-Request-Id, if it is decent, else a new one."""
    return given if _TRACE.fullmatch(given) else new_trace()


class Head:
    """What we read from a request's line and headers, in one pass."""

    __slots__ = ("authorization", "base_url", "hops", "key", "length", "method", "path", "status", "trace")

    def __init__(self, scope: Scope, public_url: str) -> None:
        self.method: str = scope["method"]
        self.key = ""  # the id of the caller's key, once it is known; for the log
        self.path: str = scope["path"]
        self.authorization = b""
        self.length = -1
        self.hops = 0
        """How many servers have passed the request on to this one, for all that it says."""
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
            elif name == b"x-rushes-hops":
                self.hops = int(value) if value.isdigit() and len(value) < 4 else 0
        self.status = 0
        """Of the answer, from the moment at which it begins."""
        self.trace = trace_of(trace) if trace else new_trace()
        authority = _authority(host) if host else _own_address(scope)
        self.base_url = authority and (public_url or f"{scope['scheme']}://{authority}")
        """The base of the URLs in answers, without a slash at its end; "" where the Host header is none."""


@lru_cache(maxsize=256)
def _authority(host: bytes) -> str:
    """A Host header's value, if it can be part of a URL, else ""."""
    if not _HOST.fullmatch(host):
        return ""
    text = host.decode("ascii")
    try:
        usable = bool(urlsplit(f"http://{text}").hostname) and urlsplit(f"http://{text}").port != 0
    except ValueError:
        return ""
    return text if usable else ""


def _own_address(scope: Scope) -> str:
    host, port = scope.get("server") or ("localhost", 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """One whole JSON answer."""
    headers += (JSON_TYPE, (b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class WrongMethod(MethodNotAllowed):
    """This address does not take this method."""

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


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
    if isinstance(error, WrongMethod):
        headers["Allow"] = error.allow
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
