"""The outermost layer: every HTTP request comes in here, gets an X-Request-Id, and leaves a line in the log.

The wire's own routes are dispatched by hand (see :mod:`rushes.api.http` for why); all others go to the
Starlette application of :mod:`rushes.api.app`.
"""

import time
import traceback
from pathlib import Path
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rushes import log
from rushes.api.auth import authenticate
from rushes.api.bodies import Bodies
from rushes.api.http import Head, answer, error_body, error_headers
from rushes.api.runcomfy import Native
from rushes.errors import InternalError, MalformedRequest, NotFound, RushesError
from rushes.requests.record import Key
from rushes.service.core import Service
from rushes.settings import Settings

_REQUESTS: Final = "/v1/requests/"
_MODELS: Final = "/v1/models/"


class Gateway:
    """An ASGI application."""

    def __init__(self, service: Service, settings: Settings, others: ASGIApp, scratch: Path) -> None:
        """``scratch`` is a folder for large bodies on their way."""
        self._service = service
        self._native = Native(service)
        self._others = others
        self._public_url = settings.public_url.rstrip("/")
        self._bodies = Bodies(scratch, settings.max_body_bytes)
        self._log = settings.access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        began = time.perf_counter()
        head = Head(scope, self._public_url)
        try:
            if not head.base_url:
                raise MalformedRequest("The Host header is none that a URL could have.")
            submits = head.method == "POST" and head.path.startswith(_MODELS)
            if not submits and not head.path.startswith(_REQUESTS):
                await self._pass_on(head, scope, receive, send)
            else:
                caller = await authenticate(self._service, head)
                if submits:
                    status, text = await self._submit(caller, head, receive)
                else:
                    id_, slash, verb = head.path[len(_REQUESTS) :].partition("/")
                    if not slash:
                        raise NotFound("A request has /status, /result and /cancel.")
                    status, text = await self._native.request(
                        caller, head.method, id_, verb, head.base_url, scope["query_string"]
                    )
                head.status = status
                await answer(send, status, text, [(b"x-request-id", head.trace)])
        except RushesError as error:
            if head.status:
                log.event("error", trace=head.trace.decode(), path=head.path, message=error.message)
            await self._refuse(head, send, error)
        except Exception:
            log.event("error", trace=head.trace.decode(), path=head.path, traceback=traceback.format_exc())
            await self._refuse(head, send, InternalError())
        if self._log:
            log.event(
                "http",
                method=head.method,
                path=head.path,
                status=head.status,
                ms=round((time.perf_counter() - began) * 1000, 2),
                trace=head.trace.decode(),
                key=head.key,
            )

    async def _submit(self, caller: Key, head: Head, receive: Receive) -> tuple[int, bytes]:
        await self._service.admit(caller)
        model_id = head.path[len(_MODELS) :]
        body = await self._bodies.small(receive, head.length)
        if isinstance(body, bytes):
            return await self._native.submit(caller, model_id, body, head.base_url, head.hops)
        async with self._bodies.large(body) as whole:
            return await self._native.submit(caller, model_id, whole, head.base_url, head.hops)

    async def _refuse(self, head: Head, send: Send, error: RushesError) -> None:
        """Answer with the error. Where an answer has begun it is too late: left unfinished, its connection is
        closed by the server, by which the client knows.
        """
        if head.status:
            return
        head.status = error.status
        more = [(name.lower().encode(), value.encode()) for name, value in error_headers(error).items()]
        await answer(send, error.status, error_body(error), [(b"x-request-id", head.trace), *more])

    async def _pass_on(self, head: Head, scope: Scope, receive: Receive, send: Send) -> None:
        """Let Starlette answer, adding our header to its answer."""

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                head.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", head.trace)]
            await send(message)

        scope["rushes.head"] = head
        await self._others(scope, receive, with_id)
