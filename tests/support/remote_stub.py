"""What the stub servers of remote vendors share: jobs that are counted, and real small pictures and videos behind
addresses that can expire.

A vendor's stub derives from :class:`RemoteStub`, answers calls in ``answer``, and makes jobs with ``accept``. A job
that is submitted twice fails the test that runs the stub (see :func:`running`).
"""

import io
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from rushes.media.encode import VideoWriter
from support.http_stub import Fault as Fault
from support.http_stub import HTTPStub, serving
from support.http_stub import Reply as Reply
from support.http_stub import Seen as Seen

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
class Job:
    """One submitted job. ``polls``: how many more polls find it at work."""

    id: str
    body: Any
    polls: int
    state: str = "queued"
    asked: int = 0
    """Polls so far."""
    cancelled: bool = False


class RemoteStub(HTTPStub):
    """Programmed by its attributes; ``seen`` has every call, ``jobs`` every job that was accepted."""

    authorization = "Bearer {key}"
    """The form of the header that a right call has."""

    def __init__(self, key: str | None = KEY) -> None:
        super().__init__()
        self.key = key
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
        self.files: dict[str, tuple[str, bytes]] = {}
        self._expired: set[str] = set()

    # -- what a vendor's stub defines -------------------------------------------------------------------------
    def answer(self, call: Seen) -> Reply:
        """The answer to a call with the right key. Called with the lock held."""
        raise NotImplementedError

    def unauthorized(self, call: Seen) -> Reply:
        """The answer to a call with another key or none."""
        raise NotImplementedError

    # -- what tests use ---------------------------------------------------------------------------------------
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

    # -- the server ------------------------------------------------------------------------------------------
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


Stub = TypeVar("Stub", bound=RemoteStub)


@contextmanager
def running(stub: Stub, *, once: bool = True) -> Iterator[Stub]:
    """Run a stub for a block; unless ``once`` is False, no job may have been submitted twice in it."""
    with serving(stub):
        try:
            yield stub
            if once:
                stub.assert_once()
        finally:
            stub.gate.set()
