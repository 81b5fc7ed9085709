"""The outermost layer: every HTTP request comes in here, gets an X-Request-Id, and leaves a line in the log.

The wire's own routes are dispatched by hand (see :mod:`rushes.api.http` for why); all others go to the
Starlette application of :mod:`rushes.api.app`.
"""

import time
import traceback
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rushes import log
from rushes.api.auth import authenticate
from rushes.api.http import Head, answer, error_body, error_headers, read_body
from rushes.api.runcomfy import Native
from rushes.errors import InternalError, NotFound, RushesError
from rushes.service.core import Service
from rushes.settings import Settings

_REQUESTS: Final = "/v1/requests/"
_MODELS: Final = "/v1/models/"


class Gateway:
    """An ASGI application."""

    def __init__(self, service: Service, settings: Settings, others: ASGIApp) -> None:
        self._service = service
        self._native = Native(service)
        self._others = others
        self._public_url = settings.public_url.rstrip("/")
        self._limit = settings.max_body_bytes
        self._log = settings.access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        began = time.perf_counter()
        head = Head(scope, self._public_url)
        key_id = ""
        headers = [(b"x-request-id", head.trace)]
        try:
            hot = head.path.startswith(_REQUESTS) or (head.method == "POST" and head.path.startswith(_MODELS))
            if not hot:
                status = await self._pass_on(head, scope, receive, send)
            else:
                caller = await authenticate(self._service, head.authorization)
                key_id = caller.id
                if head.method == "POST" and head.path.startswith(_MODELS):
                    body = await read_body(receive, head.length, self._limit)
                    model_id = head.path[len(_MODELS) :]
                    status, text = await self._native.submit(caller, model_id, body, head.base_url)
                else:
                    id_, slash, verb = head.path[len(_REQUESTS) :].partition("/")
                    if not slash:
                        raise NotFound("A request has /status, /result and /cancel.")
                    status, text = await self._native.request(
                        caller, head.method, id_, verb, head.base_url, scope["query_string"]
                    )
                await answer(send, status, text, headers)
        except RushesError as error:
            status = await self._refuse(send, error, headers)
        except Exception:
            log.event("error", trace=head.trace.decode(), path=head.path, traceback=traceback.format_exc())
            status = await self._refuse(send, InternalError(), headers)
        if self._log:
            log.event(
                "http",
                method=head.method,
                path=head.path,
                status=status,
                ms=round((time.perf_counter() - began) * 1000, 2),
                trace=head.trace.decode(),
                key=key_id,
            )

    async def _refuse(self, send: Send, error: RushesError, headers: list[tuple[bytes, bytes]]) -> int:
        more = [(name.lower().encode(), value.encode()) for name, value in error_headers(error).items()]
        await answer(send, error.status, error_body(error), [*headers, *more])
        return error.status

    async def _pass_on(self, head: Head, scope: Scope, receive: Receive, send: Send) -> int:
        """Let Starlette answer, adding our header to its answer. Answers the HTTP status."""
        seen = 500

        async def with_id(message: Message) -> None:
            nonlocal seen
            if message["type"] == "http.response.start":
                seen = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", head.trace)]
            await send(message)

        scope["rushes.head"] = head
        await self._others(scope, receive, with_id)
        return seen
