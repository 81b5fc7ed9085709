"""HTTP on a connection: uvicorn's protocol, with bounds on what a client can make the gateway hold or wait for.

uvicorn's own has none before the application is called: a header of any size is gathered (in httptools, each
piece by copying all before it), a half-sent one is kept for ever, and so is a connection on which nothing is
sent. Here a header or trailer ends at ``head_bytes``, and a connection that is behind at ``head_ticks`` or
``body_ticks``. Times are counted in ticks of one timer for each connection, so that a request pays for no timer
of its own. What is refused here is answered in the API's one form of error.
"""

import asyncio
import resource
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rushes.api.http import error_body, error_headers, new_trace
from rushes.errors import MalformedRequest, RushesError, StoreUnavailable

_SLICE: Final = 8 * 1024
"""What is fed to the parser at once while it reads a header: by so much a header may go past its limit."""
_LINGER_SECONDS: Final = 1.0
"""How long what a refused client still sends is thrown away. Closing at once would reset the connection, and
the client might never read why.
"""
_MOST_CONNECTIONS: Final = 10_000
_OTHER_FILES: Final = 256
"""File descriptors that are not for connections."""


class HeadTooLarge(RushesError):
    """The address and headers of this request are larger than this server accepts."""

    code = 431001
    status = 431


class TooManyConnections(StoreUnavailable):
    """This server has as many connections as it may have. Try again in a moment."""


class GatewayProtocol(HttpToolsProtocol):
    """One connection. The bounds are attributes of the class."""

    head_bytes: ClassVar[int] = 64 * 1024
    """Request line and headers, or trailers, together."""
    tick_seconds: ClassVar[float] = 5.0
    head_ticks: ClassVar[int] = 6
    """From the connection, or a header's first byte, to the header's end."""
    body_ticks: ClassVar[int] = 12
    """Without a byte of a body that has begun and is asked for."""
    most_pipelined: ClassVar[int] = 4096
    """Requests that wait for the answers to those before them. uvicorn reads on after each answer, so that
    only this keeps their number from growing.
    """
    most_connections: ClassVar[int] = _MOST_CONNECTIONS

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._unread = 0  # bytes since the last header that was complete, or piece of a body
        self._late = self._quiet = 0  # ticks
        self._discarding = False
        self._timer: asyncio.TimerHandle | None = None

    # -- the connection ---------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.most_connections:
            self.transport = transport
            self._discarding = True
            transport.write(_answer(TooManyConnections()))
            transport.close()
            return
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.tick_seconds, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _tick(self) -> None:
        self._timer = self.loop.call_later(self.tick_seconds, self._tick)
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            if self.timeout_keep_alive_task is None:  # something has arrived, but no whole header
                self._late += 1
        elif cycle.more_body:
            asked = not self.flow.read_paused and not cycle.waiting_for_100_continue
            self._quiet = self._quiet + 1 if asked else 0
        if self._quiet > self.body_ticks or self._late > self.head_ticks:
            self.transport.abort()

    # -- what arrives -----------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        # The only method of ours on the way of a small request: each would cost it about 1 %.
        if len(data) > _SLICE and not self._in_body():
            self._slice(data)
            return
        if self._discarding:
            return
        self._quiet = 0
        self._unread += len(data)
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._unread = self._late = 0
            if len(self.pipeline) > self.most_pipelined:
                self.transport.abort()
        elif self._unread > self.head_bytes:
            self._refuse(HeadTooLarge(f"Address and headers may have {self.head_bytes} bytes together."))

    def _slice(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            step = len(data) if self._in_body() else _SLICE
            self.data_received(data[at : at + step])
            at += step

    def _in_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_chunk_header(self) -> None:
        """Called before a chunk, and before the trailers: nobody here reads them, and they are no headers."""
        self.headers = []

    # -- refusals ---------------------------------------------------------------------------------------
    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest(f"This is no HTTP request that can be read. ({msg})"))

    def _refuse(self, error: RushesError) -> None:
        """Answer, if it is this request's turn and nobody has; take nothing more; and close."""
        if self.transport.is_closing() or self._discarding:
            return
        self._discarding = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.scope is not self.scope:
                cycle.keep_alive = False  # an earlier request is being answered; its end is the connection's
                return
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started or self.pipeline:
                self.transport.abort()
                return
        self._unset_keepalive_if_required()
        self.transport.write(_answer(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)


def serving_protocol() -> type[GatewayProtocol]:
    """The protocol for this process, with as many connections as it may have files open (at most 10,000).

    Asks for more open files where the usual 1,024 are set and more are allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    most = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)

    class Protocol(GatewayProtocol):
        most_connections = max(_OTHER_FILES, most - _OTHER_FILES)

    return Protocol


def _answer(error: RushesError) -> bytes:
    """A whole answer that ends the connection."""
    body = error_body(error)
    lines = [
        STATUS_LINE[error.status],
        b"content-type: application/json\r\nconnection: close\r\n",
        b"content-length: %d\r\nx-request-id: %s\r\n" % (len(body), new_trace()),
    ]
    lines += [f"{name.lower()}: {value}\r\n".encode() for name, value in error_headers(error).items()]
    return b"".join([*lines, b"\r\n", body])
