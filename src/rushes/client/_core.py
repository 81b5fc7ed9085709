"""The client without its input and output: every operation as a generator of effects.

A flow yields what it wants done (:class:`Send`, :class:`Fetch`, :class:`Pause`, :class:`Tell`) and gets the
outcome sent back, or :class:`Lost` thrown in. Both clients are only drivers of these flows, so retries,
polling and error handling exist once. The clock and the jitter are given, so that tests need not wait.
"""

import os
import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeVar

from rushes.client import _wire as wire
from rushes.client import errors
from rushes.client._pace import Jitter, Lost, Polling, Retries
from rushes.client._wire import Call, Reply, Server
from rushes.client.types import (
    Cancellation,
    FileRef,
    ModelInfo,
    ModelPage,
    Result,
    Status,
    Submitted,
)

DEFAULT_TIMEOUT = 30.0
"""Seconds that one step of an HTTP call (connect, a read, a write) may take."""


@dataclass(frozen=True)
class Send:
    """Make this call; the outcome is its :class:`Reply`. ``timeout`` in seconds."""

    call: Call
    timeout: float


@dataclass(frozen=True)
class Fetch:
    """Make this call and write a good answer's body to ``sink``, from byte ``offset`` of it on.

    The outcome is the :class:`Reply` with ``received`` for ``body``. An answer that is no 2xx, or a 206 that
    does not begin at ``offset``, leaves the sink alone; a 200 begins it anew.
    """

    call: Call
    sink: BinaryIO
    offset: int
    timeout: float


@dataclass(frozen=True)
class Pause:
    """Let so many seconds pass."""

    seconds: float


@dataclass(frozen=True)
class Tell:
    """Show this status to whoever watches the wait."""

    status: Status


Effect = Send | Fetch | Pause | Tell
T = TypeVar("T")
Flow = Generator[Effect, Any, T]


@dataclass(frozen=True)
class Fetched:
    """What a finished download was: for choosing the file's name."""

    content_type: str | None
    size: int


class Core:
    """All operations against one server.

    ``base_url`` and ``api_key`` default to ``RUSHES_BASE_URL`` and ``RUSHES_API_KEY``. Raises ValueError
    where they make no sense.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        retries: Retries | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Jitter = random.random,
    ) -> None:
        environ = os.environ if environ is None else environ
        self.server = Server(
            base_url or environ.get("RUSHES_BASE_URL") or wire.DEFAULT_BASE_URL,
            environ.get("RUSHES_API_KEY") if api_key is None else api_key,
        )
        self.timeout = timeout
        self._retries = retries or Retries()
        self._clock = clock
        self._jitter = jitter
        self._seen = False

    def submit(self, model_id: str, values: Mapping[str, Any]) -> Flow[Submitted]:
        """Raises ValueError, before anything is sent, for an input that is no JSON object."""
        reply = yield from self._exchange(self.server.submit(model_id, values))
        return _parse(reply, wire.submitted)

    def status(
        self, request: str | Submitted, *, deadline: float | None = None, accepted: bool = False
    ) -> Flow[Status]:
        reply = yield from self._exchange(self.server.status(request), deadline=deadline, accepted=accepted)
        return replace(_parse(reply, wire.status), retry_after=wire.retry_after(reply))

    def result(
        self,
        request: str | Submitted,
        *,
        include_cost: bool = False,
        deadline: float | None = None,
        accepted: bool = False,
    ) -> Flow[Result]:
        call = self.server.result(request, include_cost=include_cost)
        reply = yield from self._exchange(call, deadline=deadline, accepted=accepted)
        return _parse(reply, wire.result)

    def cancel(self, request: str | Submitted) -> Flow[Cancellation]:
        reply = yield from self._exchange(self.server.cancel(request))
        return _parse(reply, lambda body: wire.cancellation(_id(request), body))

    def wait(
        self, request: str | Submitted, *, timeout: float | None = None, include_cost: bool = False
    ) -> Flow[Result]:
        """Poll until the end; returns only a succeeded result.

        Raises RequestFailed, RequestCancelled, or WaitTimeout after ``timeout`` seconds. A request that is known
        to be accepted is waited for through :data:`rushes.client._pace.AWAY_SECONDS` without its server.
        """
        accepted = isinstance(request, Submitted)
        deadline = None if timeout is None else self._clock() + timeout
        polling = Polling()
        seen: Status | None = None
        try:
            while True:
                seen = yield from self.status(request, deadline=deadline, accepted=accepted)
                accepted = True
                yield Tell(seen)
                if seen.done:
                    result = yield from self.result(
                        request, include_cost=include_cost, deadline=deadline, accepted=True
                    )
                    if result.done:
                        return _settled(result)
                pause = polling.pause(seen.status, eta=seen.eta, retry_after=seen.retry_after)
                yield Pause(self._before(deadline, pause))
        except _DeadlineReached:
            raise errors.WaitTimeout(_id(request), timeout or 0.0, seen) from None

    def upload(self, source: BinaryIO, name: str, content_type: str | None) -> Flow[FileRef]:
        reply = yield from self._exchange(self.server.upload(source, name, content_type))
        return _parse(reply, wire.file_ref)

    def models(self, query: Mapping[str, str | int | None]) -> Flow[ModelPage]:
        reply = yield from self._exchange(self.server.models(query))
        return _parse(reply, wire.model_page)

    def model(self, model_id: str) -> Flow[ModelInfo]:
        reply = yield from self._exchange(self.server.model(model_id))
        return _parse(reply, wire.model_info)

    def download(self, url: str, sink: BinaryIO) -> Flow[Fetched]:
        """Fill ``sink``, an empty file opened for writing; go on where a lost connection left off."""
        call = self.server.download(url)
        ask, offset, tried = call, 0, 0
        while True:
            tried += 1
            try:
                reply: Reply = yield Fetch(ask, sink, offset, self.timeout)
            except Lost as lost:
                if lost.received > offset:
                    tried = 1
                delay = self._retries.after_loss(call, lost, tried, seen=self._seen, jitter=self._jitter())
                if delay is None:
                    raise self._unreachable(call, lost) from None
                ask, offset = wire.rest_of(call, lost.headers, lost.received)
            else:
                self._seen = True
                if reply.received is not None:
                    kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
                    return Fetched(kind or None, reply.received)
                if offset and reply.status in (206, 416):
                    delay, ask, offset = 0.0, call, 0
                else:
                    wait = self._retries.after_reply(call, reply, tried, jitter=self._jitter())
                    if wait is None:
                        raise wire.error_of(reply)
                    delay = wait
            yield Pause(delay)

    def _exchange(self, call: Call, *, deadline: float | None = None, accepted: bool = False) -> Flow[Reply]:
        """Send until there is a good answer; raises ConnectionFailed or the answer's own error.

        ``accepted`` says that this waits for a request that the server has: then it goes on for longer.
        """
        tried, began = 0, self._clock()
        while True:
            tried += 1
            try:
                reply: Reply = yield Send(call, self._before(deadline, self.timeout))
            except Lost as lost:
                self._before(deadline, 0.0)
                away = self._clock() - began if accepted else None
                delay = self._retries.after_loss(
                    call, lost, tried, seen=self._seen, jitter=self._jitter(), away=away
                )
                if delay is None:
                    raise self._unreachable(call, lost) from None
            else:
                self._seen = True
                if 200 <= reply.status < 300:
                    return reply
                away = self._clock() - began if accepted else None
                delay = self._retries.after_reply(call, reply, tried, jitter=self._jitter(), away=away)
                if delay is None:
                    raise wire.error_of(reply)
            yield Pause(self._before(deadline, delay))

    def _before(self, deadline: float | None, seconds: float) -> float:
        """So many seconds, or fewer where the deadline is nearer; raises where it has passed."""
        if deadline is None:
            return seconds
        left = deadline - self._clock()
        if left <= 0:
            raise _DeadlineReached
        return min(seconds, left)

    def _unreachable(self, call: Call, lost: Lost) -> errors.ConnectionFailed:
        where = self.server.base_url if self.server.owns(call.url) else call.url.partition("?")[0]
        if not lost.sent:
            message = f"cannot connect to {where}: {lost.reason}"
        elif call.repeatable:
            message = f"the connection to {where} broke: {lost.reason}"
        else:
            message = (
                f"the connection to {where} broke after the request was sent: {lost.reason}; "
                "it may have been accepted, so it was not sent again"
            )
        return errors.ConnectionFailed(message, url=where, sent=lost.sent)


class _DeadlineReached(Exception):
    """The time that a wait was given is over."""


def _parse(reply: Reply, build: Callable[[Mapping[str, Any]], T]) -> T:
    body = wire.body_of(reply)
    try:
        return build(body)
    except KeyError as missing:
        raise errors.ServerError(
            f"{reply.url} gave an answer without {missing}; is the address right?",
            status=reply.status,
            trace_id=reply.headers.get("x-request-id"),
            body=body,
        ) from None


def _id(request: str | Submitted) -> str:
    return request if isinstance(request, str) else request.request_id


def _settled(result: Result) -> Result:
    if result.status in ("succeeded", "completed"):
        return result
    if result.status == "cancelled":
        raise errors.RequestCancelled(result)
    raise errors.RequestFailed(result)
