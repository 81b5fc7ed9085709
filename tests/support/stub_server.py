"""A server that speaks the native wire, from the standard library alone, on a loopback port of its own.

It does what a test tells it: how long a request waits, what each poll says, which answers are errors, which
connections break. What it answers follows the seeds and the project's own decisions where they are silent.
"""

import re
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from support.http_stub import Fault as Fault
from support.http_stub import HTTPStub, Reply, Seen, serving

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
class Job:
    """One request. ``polls`` are the /status bodies still to give before it is completed."""

    id: str
    model: str
    input: Any
    polls: list[dict[str, Any]]
    outcome: dict[str, Any]
    state: str = "in_queue"


class StubServer(HTTPStub):
    """Programmed by its attributes."""

    headers = {"X-Request-Id": "trace-1"}  # noqa: RUF012  replaced, never changed

    def __init__(self, key: str | None = KEY) -> None:
        super().__init__()
        self.key = key
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

    def submit(self, model: str, values: Any) -> Job:
        with self.lock:
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
        with self.lock:
            if job.state == "cancelled":
                return {"status": "cancelled"}
            if not job.polls:
                job.state = "completed"
                return {"status": "completed"}
            body = job.polls[0] if self.hold and len(job.polls) == 1 else job.polls.pop(0)
            job.state = body["status"]
            return body

    # -- answers ----------------------------------------------------------------------------------------------
    def reply(self, call: Seen) -> Reply:
        if call.path.startswith("/files/"):
            return self._file(call.path.removeprefix("/files/"), call.headers)
        if self.key and call.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, 400004, "Send a valid API key: `Authorization: Bearer <key>`.")
        return self._get(call) if call.method == "GET" else self._post(call)

    def _get(self, seen: Seen) -> Reply:
        if seen.path == "/v1/models":
            entry = {"model_id": MODEL, "display_name": "Wan 2.2 VACE Fun", "categories": ["image-to-video"]}
            wanted = seen.query.get("search", [""])[0]
            found = [entry] if wanted in MODEL else []
            return Reply(200, {"models": found, "total": len(found)})
        if seen.path == f"/v1/models/{MODEL}":
            schemas = {"input_schema": SCHEMA, "output_schema": {"type": "object"}}
            return Reply(200, {"model_id": MODEL, "base_price_usd": 0.05, "price_unit": "second", **schemas})
        if (job := self._job(seen.path)) is None:
            return _error(404, 404001, "There is nothing here under this name.")
        if seen.path.endswith("/status"):
            base = f"{self.public or self.url}/v1/requests/{job.id}"
            urls = {"status_url": f"{base}/status", "result_url": f"{base}/result"}
            return Reply(200, {"request_id": job.id, **self.poll(job), **urls})
        return self._result(job, cost="include_cost" in seen.query)

    def _result(self, job: Job, *, cost: bool) -> Reply:
        body: dict[str, Any] = {"request_id": job.id, "status": job.state}
        if job.state == "completed":
            body |= job.outcome
            body |= {"created_at": "2026-11-21T10:00:00Z", "finished_at": "2026-11-21T10:00:04Z"}
            body |= {"cost": 2.85} if cost else {}
        return Reply(200, body)

    def _post(self, seen: Seen) -> Reply:
        if seen.path == "/v1/files" and self.uploads_allowed:
            return self._upload(seen)
        if seen.path == f"/v1/models/{MODEL}":
            made = self.submit(MODEL, seen.json)
            self.submit_gate.wait(60)
            base = f"{self.public or self.url}/v1/requests/{made.id}"
            urls = {f"{word}_url": f"{base}/{word}" for word in ("status", "result", "cancel")}
            return Reply(200, {"request_id": made.id, **urls})
        if (job := self._job(seen.path)) is not None and seen.path.endswith("/cancel"):
            possible = job.state == "in_queue"
            job.state = "cancelled" if possible else job.state
            outcome = "cancelled" if possible else "not_cancellable"
            return Reply(202, {"request_id": job.id, "status": job.state, "outcome": outcome})
        return _error(404, 404001, "There is nothing here under this name.")

    def _upload(self, seen: Seen) -> Reply:
        head = f"Content-Type: {seen.headers['content-type']}\r\n\r\n".encode()
        message = BytesParser(policy=HTTP).parsebytes(head + seen.body)
        [part] = list(message.iter_parts())
        content = part.get_payload(decode=True)
        identifier = f"file{len(self.uploads) + 1}"
        self.uploads[identifier] = {
            "id": identifier,
            "url": f"{self.url}/v1/files/{identifier}",
            "name": part.get_filename(),
            "content_type": part.get_content_type(),
            "size": len(content),
            "content": content,
            "field": part.get_param("name", header="content-disposition"),
        }
        shown = ("id", "url", "name", "content_type", "size")
        return Reply(201, {name: self.uploads[identifier][name] for name in shown})

    def _file(self, name: str, asked: dict[str, str]) -> Reply:
        if name not in self.files:
            return _error(404, 404001, "There is no such file.")
        content_type, content = self.files[name]
        headers, start = {"Content-Type": content_type, "ETag": '"one"'}, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", asked.get("range", ""))
        if wanted and asked.get("if-range", headers["ETag"]) == headers["ETag"]:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return Reply(206 if start else 200, content[start:], headers)

    def _job(self, path: str) -> Job | None:
        found = re.fullmatch(r"/v1/requests/([^/]+)/(status|result|cancel)", path)
        return self.jobs.get(found[1]) if found else None


def _error(status: int, code: int, message: str) -> Reply:
    return Reply(status, {"error_code": code, "error_message": message})


def running(key: str | None = KEY) -> AbstractContextManager[StubServer]:
    return serving(StubServer(key))
