"""A server on a loopback port, for tests that want HTTP spoken in earnest: it remembers every call, and does what an
order book of faults says. What it answers otherwise is its heir's.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit


@dataclass
class Seen:
    """One call as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    """One answer. ``body``: bytes as they are, text as HTML, anything else as JSON."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault(Reply):
    """What happens instead of the right answer: this answer, without the call being looked at.

    ``after``: the call is answered for real and its effects stay, and this answer is sent in place of the right one.
    ``lost``: likewise, but the connection ends without a word. ``drop``: it ends so without the call being looked at.
    ``cut``: the right answer, so many bytes of its body, the end.
    """

    status: int = 500
    after: bool = False
    lost: bool = False
    drop: bool = False
    cut: int | None = None


class HTTPStub:
    """``seen`` has every call."""

    headers: dict[str, str] = {}  # noqa: RUF012  replaced, never changed
    """What every answer has."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.faults: list[tuple[str, str, Fault]] = []
        self.lock = threading.RLock()
        self._http = _Server(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def reply(self, call: Seen) -> Reply:
        """The right answer to a call."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def fail(self, method: str, path: str, fault: Fault, *, times: int = 1) -> None:
        """Treat the next ``times`` calls of ``method`` to paths that the pattern ``path`` finds with ``fault``."""
        with self.lock:
            self.faults += [(method, path, fault)] * times

    def calls(self, method: str, path: str) -> list[Seen]:
        with self.lock:
            return [seen for seen in self.seen if seen.method == method and re.search(path, seen.path)]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def take_fault(self, seen: Seen) -> Fault | None:
        with self.lock:
            self.seen.append(seen)
            for entry in self.faults:
                if entry[0] == seen.method and re.search(entry[1], seen.path):
                    self.faults.remove(entry)
                    return entry[2]
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, stub: HTTPStub) -> None:
        self.stub = stub
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is a part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one piece: two wait for each other's acknowledgement
    server: _Server

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, parts.path, parse_qs(parts.query), headers, self._body())
        fault = self.server.stub.take_fault(seen)
        if fault is not None and not fault.lost and not fault.drop and fault.cut is None:
            if fault.after:
                self.server.stub.reply(seen)
            self._send(fault, None)
            return
        reply = None if fault is not None and fault.drop else self.server.stub.reply(seen)
        if reply is None or (fault is not None and fault.lost):
            self.close_connection = True
            return
        self._send(reply, fault.cut if fault is not None else None)

    def _send(self, reply: Reply, cut: int | None) -> None:
        body, content_type = reply.body, "application/json"
        if isinstance(body, str):
            content, content_type = body.encode(), "text/html"
        else:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": content_type, "Content-Length": str(len(content))}
        headers |= self.server.stub.headers | reply.headers
        self.send_response(reply.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:cut])
        self.close_connection = self.close_connection or cut is not None


Stub = TypeVar("Stub", bound=HTTPStub)


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """Run a stub for a block."""
    stub.start()
    try:
        yield stub
    finally:
        stub.stop()
