"""A server that speaks the native wire, from the standard library alone, on a loopback port of its own.

It does what a test tells it: how long a request waits, what each poll says, which answers are errors, which
connections break. What it answers follows the seeds and the project's own decisions where they are silent.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "rushes_stub_key"
MODEL = "community/wan-2-2/vace-fun"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
MOVIE = b"\x00\x00\x00\x18ftypmp42" + bytes(reversed(range(256))) * 4000
SCHEMA = {
    "type": "object",
    "required": ["56_text", "118_image"],
    "properties": {
        "56_text": {"title": "Prompt", "description": "", "type": "string"},
        "118_image": {"title": "Image", "type": "string", "default": "Runcomfy_Example_1290_1.png"},
        "25_value": {"title": "Number of Frames", "type": "integer", "enum": [81, 141], "default": 81},
        "108_cfg": {"title": "Guidance Scale", "type": "float", "minimum": 0, "maximum": 10},
        "loop": {"title": "Loop", "type": "boolean", "default": False},
    },
}


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
class Fault:
    """What happens instead of the right answer. ``drop`` reads the call and hangs up without a word.

    ``cut`` sends the right head of a file and only so many bytes of its body, then hangs up.
    """

    status: int = 500
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    cut: int | None = None


@dataclass
class Job:
    """One request. ``polls`` are the /status bodies still to give before it is completed."""

    id: str
    model: str
    input: Any
    polls: list[dict[str, Any]]
    outcome: dict[str, Any]
    state: str = "in_queue"


class StubServer:
    """Programmed by its attributes; ``seen`` has every call."""

    def __init__(self, key: str | None = KEY) -> None:
        self.key = key
        self.seen: list[Seen] = []
        self.jobs: dict[str, Job] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.files: dict[str, tuple[str, bytes]] = {
            "a.png": ("image/png", PICTURE),
            "a.mp4": ("video/mp4", MOVIE),
        }
        self.polls: list[dict[str, Any]] = [
            {"status": "in_queue", "queue_position": 2},
            {"status": "in_progress", "progress": 0.42, "eta": 0.1, "stage": "rendering"},
        ]
        """What the polls of the next submitted request say, before it is completed."""
        self.hold = False
        """Whether the last of the polls goes on for ever."""
        self.outcome: dict[str, Any] | None = None
        """What the next results are made of; None for a movie."""
        self.public: str | None = None
        """The base of the URLs in answers, where it shall not be the server's own."""
        self.uploads_allowed = True
        self.submit_gate = threading.Event()
        """While it is cleared, accepted submits get no answer."""
        self.submit_gate.set()
        self.faults: list[tuple[str, str, Fault]] = []
        self._lock = threading.Lock()
        self._http = _Server(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def fail(self, method: str, path: str, fault: Fault, *, times: int = 1) -> None:
        """Answer the next ``times`` calls of ``method`` to paths like the pattern ``path`` with ``fault``."""
        self.faults += [(method, path, fault)] * times

    def calls(self, method: str, path: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == method and re.search(path, seen.path)]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def take_fault(self, seen: Seen) -> Fault | None:
        with self._lock:
            self.seen.append(seen)
            for entry in self.faults:
                if entry[0] == seen.method and re.search(entry[1], seen.path):
                    self.faults.remove(entry)
                    return entry[2]
        return None

    def submit(self, model: str, values: Any) -> Job:
        with self._lock:
            number = len(self.jobs) + 1
            identifier = f"0198c0de-0000-7000-8000-{number:012d}"
            base = self.public or self.url
            movie = f"{base}/files/a.mp4?signature=s3cret"
            outcome = self.outcome or {
                "status": "succeeded",
                "output": {"video": movie, "videos": [movie]},
                "engine": "draft",
            }
            job = Job(identifier, model, values, list(self.polls), outcome)
            self.jobs[identifier] = job
            return job

    def poll(self, job: Job) -> dict[str, Any]:
        with self._lock:
            if job.state == "cancelled":
                return {"status": "cancelled"}
            if not job.polls:
                job.state = "completed"
                return {"status": "completed"}
            body = job.polls[0] if self.hold and len(job.polls) == 1 else job.polls.pop(0)
            job.state = body["status"]
            return body


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, stub: StubServer) -> None:
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
    server: _Server

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
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
        stub = self.server.stub
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, parts.path, parse_qs(parts.query), headers, self._body())
        fault = stub.take_fault(seen)
        if fault and fault.drop:
            self.close_connection = True
            return
        if fault and fault.cut is None:
            self._json(fault.status, fault.body, fault.headers)
            return
        if parts.path.startswith("/files/"):
            self._file(parts.path.removeprefix("/files/"), headers, fault.cut if fault else None)
            return
        if stub.key and headers.get("authorization") != f"Bearer {stub.key}":
            self._error(401, 400004, "Send a valid API key: `Authorization: Bearer <key>`.")
            return
        if self.command == "GET":
            self._get(seen)
        else:
            self._post(seen)

    def _get(self, seen: Seen) -> None:
        stub = self.server.stub
        if seen.path == "/v1/models":
            entry = {"model_id": MODEL, "display_name": "Wan 2.2 VACE Fun", "categories": ["image-to-video"]}
            wanted = seen.query.get("search", [""])[0]
            found = [entry] if wanted in MODEL else []
            self._json(200, {"models": found, "total": len(found)})
        elif seen.path == f"/v1/models/{MODEL}":
            schemas = {"input_schema": SCHEMA, "output_schema": {"type": "object"}}
            self._json(200, {"model_id": MODEL, "base_price_usd": 0.05, "price_unit": "second", **schemas})
        elif (job := self._job(seen.path)) is None:
            self._error(404, 404001, "There is nothing here under this name.")
        elif seen.path.endswith("/status"):
            base = f"{stub.public or stub.url}/v1/requests/{job.id}"
            urls = {"status_url": f"{base}/status", "result_url": f"{base}/result"}
            self._json(200, {"request_id": job.id, **stub.poll(job), **urls})
        else:
            self._result(job, cost="include_cost" in seen.query)

    def _result(self, job: Job, *, cost: bool) -> None:
        body: dict[str, Any] = {"request_id": job.id, "status": job.state}
        if job.state == "completed":
            body |= job.outcome
            body |= {"created_at": "2026-11-21T10:00:00Z", "finished_at": "2026-11-21T10:00:04Z"}
            body |= {"cost": 2.85} if cost else {}
        self._json(200, body)

    def _post(self, seen: Seen) -> None:
        stub = self.server.stub
        if seen.path == "/v1/files" and stub.uploads_allowed:
            self._upload(seen)
        elif seen.path == f"/v1/models/{MODEL}":
            job = stub.submit(MODEL, seen.json)
            stub.submit_gate.wait(60)
            base = f"{stub.public or stub.url}/v1/requests/{job.id}"
            urls = {f"{word}_url": f"{base}/{word}" for word in ("status", "result", "cancel")}
            self._json(200, {"request_id": job.id, **urls})
        elif (job := self._job(seen.path)) is not None and seen.path.endswith("/cancel"):
            possible = job.state == "in_queue"
            job.state = "cancelled" if possible else job.state
            outcome = "cancelled" if possible else "not_cancellable"
            self._json(202, {"request_id": job.id, "status": job.state, "outcome": outcome})
        else:
            self._error(404, 404001, "There is nothing here under this name.")

    def _upload(self, seen: Seen) -> None:
        stub = self.server.stub
        head = f"Content-Type: {seen.headers['content-type']}\r\n\r\n".encode()
        message = BytesParser(policy=HTTP).parsebytes(head + seen.body)
        [part] = list(message.iter_parts())
        content = part.get_payload(decode=True)
        identifier = f"file{len(stub.uploads) + 1}"
        stub.uploads[identifier] = {
            "id": identifier,
            "url": f"{stub.url}/v1/files/{identifier}",
            "name": part.get_filename(),
            "content_type": part.get_content_type(),
            "size": len(content),
            "content": content,
            "field": part.get_param("name", header="content-disposition"),
        }
        shown = ("id", "url", "name", "content_type", "size")
        self._json(201, {name: stub.uploads[identifier][name] for name in shown})

    def _file(self, name: str, headers: dict[str, str], cut: int | None) -> None:
        if name not in self.server.stub.files:
            self._error(404, 404001, "There is no such file.")
            return
        content_type, content = self.server.stub.files[name]
        etag = '"one"'
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        if asked and headers.get("if-range", etag) == etag:
            start = int(asked[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if cut is not None:
            self.wfile.write(content[start : start + cut])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _job(self, path: str) -> Job | None:
        found = re.fullmatch(r"/v1/requests/([^/]+)/(status|result|cancel)", path)
        return self.server.stub.jobs.get(found[1]) if found else None

    def _error(self, status: int, code: int, message: str) -> None:
        self._json(status, {"error_code": code, "error_message": message})

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Request-Id", "trace-1")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def running(key: str | None = KEY) -> Iterator[StubServer]:
    stub = StubServer(key)
    stub.start()
    try:
        yield stub
    finally:
        stub.stop()
