"""What the stub servers of remote vendors share: HTTP on a loopback port, an order book of faults, jobs that are
counted, and real small pictures and videos behind addresses that can expire.

A vendor's stub derives from :class:`RemoteStub`, answers calls in ``answer``, and makes jobs with ``accept``. A job
that is submitted twice fails the test that runs the stub (see :func:`running`).
"""

import io
import json
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from rushes.media.encode import VideoWriter

KEY = "stub-secret-key-0123456789"
HTML = "<html><head><title>502 Bad Gateway</title></head><body><center>nginx</center></body></html>"


@cache
def picture(width: int = 64, height: int = 48, *, kind: str = "PNG") -> bytes:
    """A picture that decodes: a gradient with a corner of its own colour, so that crops and flips show."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    pixels[: max(1, height // 8), : max(1, width // 8)] = (255, 0, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@cache
def movie(width: int = 64, height: int = 48, frames: int = 5, fps: float = 16) -> bytes:
    """H.264 in MP4, as the project itself writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "movie.mp4"
        with VideoWriter(path, width, height, fps) as writer:
            for number in range(frames):
                writer.write(np.full((height, width, 3), 40 * number % 256, np.uint8))
        return path.read_bytes()


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


@dataclass
class Job:
    """One submitted job. ``polls``: how many more polls find it at work."""

    id: str
    body: Any
    polls: int
    state: str = "queued"
    asked: int = 0
    """Polls so far."""
    cancelled: bool = False


class RemoteStub:
    """Programmed by its attributes; ``seen`` has every call, ``jobs`` every job that was accepted."""

    authorization = "Bearer {key}"
    """The form of the header that a right call has."""

    def __init__(self, key: str | None = KEY) -> None:
        self.key = key
        self.seen: list[Seen] = []
        self.jobs: dict[str, Job] = {}
        self.submits: Counter[str] = Counter()
        """How often each job was accepted, by what makes it that job."""
        self.polls = 1
        """How many polls find the next jobs at work before they have ended."""
        self.gate = threading.Event()
        """While it is cleared, jobs do not end."""
        self.gate.set()
        self.refuses: str | None = None
        """Words of a prompt that moderation takes offence at."""
        self.expired_status = 403
        self.expired_outputs = 0
        """How many of the next output addresses have expired when they are given."""
        self.keyed_outputs = False
        """Whether outputs want the key."""
        self.faults: list[tuple[str, str, Fault]] = []
        self.files: dict[str, tuple[str, bytes]] = {}
        self.lock = threading.RLock()
        self._expired: set[str] = set()
        self._http = _Server(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    # -- what a vendor's stub defines -------------------------------------------------------------------------
    def answer(self, call: Seen) -> Reply:
        """The answer to a call with the right key. Called with the lock held."""
        raise NotImplementedError

    def unauthorized(self, call: Seen) -> Reply:
        """The answer to a call with another key or none."""
        raise NotImplementedError

    # -- what tests use ---------------------------------------------------------------------------------------
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

    def expire(self) -> None:
        """Every output address given so far has expired."""
        with self.lock:
            self._expired.update(self.files)

    def assert_once(self) -> None:
        """No job was accepted twice."""
        with self.lock:
            assert {job: times for job, times in self.submits.items() if times > 1} == {}

    # -- what a vendor's stub uses ----------------------------------------------------------------------------
    def accept(self, job_id: str, body: Any, *, same: str | None = None) -> Job:
        """Record a job. ``same`` says which submits are the same job: by default those with the same ``body``."""
        with self.lock:
            self.submits[same if same is not None else json.dumps(body, sort_keys=True)] += 1
            job = self.jobs[job_id] = Job(job_id, body, self.polls)
            return job

    def step(self, job: Job) -> str:
        """One poll of a job; its state: queued, running, done, cancelled."""
        with self.lock:
            job.asked += 1
            if job.cancelled:
                job.state = "cancelled"
            elif job.state != "done":
                job.polls -= 1
                job.state = "done" if job.polls < 0 and self.gate.is_set() else "running"
            return job.state

    def output_url(self, content: bytes, content_type: str) -> str:
        """A fresh address, with a signature in its query, for a file."""
        extension = content_type.rpartition("/")[2]
        with self.lock:
            path = f"/outputs/{len(self.files) + 1}.{extension}"
            self.files[path] = (content_type, content)
            if self.expired_outputs:
                self.expired_outputs -= 1
                self._expired.add(path)
        return f"{self.url}{path}?Expires=1795255200&Signature=s1gnature"

    # -- the server -------------------------------------------------------------------------------------------
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

    def reply(self, call: Seen) -> Reply:
        right = self.key is None or call.headers.get("authorization") == self.authorization.format(key=self.key)
        with self.lock:
            if call.path.startswith("/outputs/"):
                if call.path not in self.files or (self.keyed_outputs and not right):
                    return Reply(404, "<html>no such object</html>")
                if call.path in self._expired:
                    return Reply(self.expired_status, "<Error><Code>AccessDenied</Code></Error>")
                content_type, content = self.files[call.path]
                return Reply(200, content, {"Content-Type": content_type})
            return self.answer(call) if right else self.unauthorized(call)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, stub: RemoteStub) -> None:
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
        headers = {"Content-Type": content_type, "Content-Length": str(len(content))} | reply.headers
        self.send_response(reply.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:cut])
        self.close_connection = self.close_connection or cut is not None


Stub = TypeVar("Stub", bound=RemoteStub)


@contextmanager
def running(stub: Stub, *, once: bool = True) -> Iterator[Stub]:
    """Run a stub for a block; unless ``once`` is False, no job may have been submitted twice in it."""
    stub.start()
    try:
        yield stub
        if once:
            stub.assert_once()
    finally:
        stub.gate.set()
        stub.stop()
