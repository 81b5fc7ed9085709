"""Replicate's predictions and files as its documents and its own client have them, on a loopback port.

Inputs are checked when a prediction is made, content by the models. Outputs are addresses that end after an hour,
when the prediction's data is removed.
"""

import base64
import io
import re
import secrets
from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from PIL import Image

from support.remote_stub import Job, RemoteStub, Reply, Seen, movie, picture

I2V = "wan-video/wan-2.2-i2v-fast"
T2I = "black-forest-labs/flux-schnell"
VERSION = "8beff3369e81422112d93b89ca01426147de542cd4684c244b673b105188fe5f"
_STAMP = "2026-11-21T14:00:00.000Z"
_DONE = ("done", "cancelled")


class ReplicateStub(RemoteStub):
    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.polls = 2
        self.official = {I2V: "video", T2I: "image"}
        """Models that run by their name alone."""
        self.versions = {VERSION: "image"}
        self.ends: dict[str, Any] = {}
        """Fields of every ended prediction that differ from a success: its status, error, metrics, output."""
        self.shape: Callable[[list[str]], Any] | None = None
        """Makes the output of the addresses of its files; by default one address, or the list of pictures."""
        self.public: str | None = None
        """The base of the addresses in answers, where it shall not be the server's own."""
        self.uploads: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.removed = False
        """Whether the hour is over after which data is removed."""

    def unauthorized(self, call: Seen) -> Reply:
        valid = "a valid" if "authorization" in call.headers else "an"
        text = f"You did not pass {valid} authentication token"
        return Reply(401, {"title": "Unauthenticated", "detail": text, "status": 401})

    def answer(self, call: Seen) -> Reply:
        if call.method == "POST" and call.path == "/v1/files":
            return self._upload(call)
        if by_name := re.fullmatch(r"/v1/models/([^/]+/[^/]+)/predictions", call.path):
            if by_name[1] in self.official:
                return self._create(call, by_name[1], "hidden", self.official[by_name[1]])
        elif call.method == "POST" and call.path == "/v1/predictions":
            version = call.json.get("version")
            if version not in self.versions:
                text = "The specified version does not exist (or perhaps you don't have permission to use it?)"
                return Reply(422, {"title": "Invalid version or not permitted", "detail": text, "status": 422})
            return self._create(call, "fofr/film-still", version, self.versions[version])
        elif by_id := re.fullmatch(r"/v1/predictions/(\w+)(/cancel)?", call.path):
            job = self.jobs.get(by_id[1])
            if job is not None and call.method == ("POST" if by_id[2] else "GET"):
                if by_id[2]:
                    job.cancelled = job.state != "done"
                return Reply(200, self._prediction(job, polled=True))
        elif call.method == "GET" and call.path.removeprefix("/v1/files/") in self.uploads:
            return Reply(200, self.uploads[call.path.removeprefix("/v1/files/")])
        return Reply(404, {"detail": "The requested resource could not be found.", "status": 404})

    # -- predictions ------------------------------------------------------------------------------------------
    def _create(self, call: Seen, model: str, version: str, kind: str) -> Reply:
        values = call.json.get("input")
        if problem := _problem(values, kind):
            field, what, text = problem
            place = f"input.{field}" if what != "required" else "input"
            detail = f"- {place}: {text}\n"
            invalid = [{"type": what, "field": place, "description": text}]
            body = {
                "detail": detail,
                "status": 422,
                "title": "Input validation failed",
                "invalid_fields": invalid,
            }
            return Reply(422, body)
        body = {"model": model, "version": version, "kind": kind, "input": values}
        job = self.accept(secrets.token_hex(13), body)
        return Reply(201, self._prediction(job, polled=False))

    def _prediction(self, job: Job, *, polled: bool) -> dict[str, Any]:
        state = self.step(job) if polled else "queued"
        base = f"{self.public or self.url}/v1/predictions/{job.id}"
        body = {
            "id": job.id,
            "model": job.body["model"],
            "version": job.body["version"],
            "input": job.body["input"],
            "logs": "",
            "output": None,
            "data_removed": False,
            "error": None,
            "status": "starting",
            "created_at": _STAMP,
            "urls": {
                "cancel": f"{base}/cancel",
                "get": base,
                "stream": f"https://stream.replicate.com/v1/files/{job.id}",
                "web": f"https://replicate.com/p/{job.id}",
            },
        }
        if state == "running" and job.asked > 1:
            bars = "\n".join(
                f"{25 * step:3}%|{'█' * step:<4}| {step}/4 [00:0{step}<00:04,  1.00s/it]" for step in range(3)
            )
            body |= {"status": "processing", "started_at": _STAMP, "logs": f"Using seed: 7\n{bars}"}
        if state == "cancelled":
            body |= {"status": "canceled", "completed_at": _STAMP, "metrics": {"total_time": 1.2}}
        if state == "done":
            body |= {
                "status": "succeeded",
                "started_at": _STAMP,
                "completed_at": _STAMP,
                "logs": "Using seed: 7\n100%|████| 4/4 [00:04<00:00,  1.00s/it]",
                "metrics": {"predict_time": 4.2, "total_time": 5.0},
            }
            body |= self._ended(job)
        return body

    def _ended(self, job: Job) -> dict[str, Any]:
        if self.refuses is not None and self.refuses in job.body["input"]["prompt"]:
            text = (
                "The input or output was flagged as sensitive. Please try again with different inputs. (E005)"
            )
            return {"status": "failed", "error": text, "metrics": {"predict_time": 0.3}}
        if self.removed:
            return {"input": {}, "output": None, "logs": None, "data_removed": True}
        if self.ends:
            return self.ends
        urls = self._generate(job.body["kind"], job.body["input"])
        whole: Any = urls[0] if job.body["kind"] == "video" else urls
        return {"output": self.shape(urls) if self.shape is not None else whole}

    def _generate(self, kind: str, values: dict[str, Any]) -> list[str]:
        if kind == "image":
            content = picture(values.get("width", 64), values.get("height", 48))
            return [self.output_url(content, "image/png") for _ in range(values.get("num_outputs", 1))]
        with Image.open(io.BytesIO(self._content(values["image"]))) as image:
            size = image.size
        frames, fps = values.get("num_frames", 5), values.get("frames_per_second", 16)
        return [self.output_url(movie(*size, frames=frames, fps=fps), "video/mp4")]

    def _content(self, address: str) -> bytes:
        if address.startswith("data:image/png;base64,"):
            return base64.b64decode(address.partition(",")[2], validate=True)
        if address.startswith("https://"):  # the one picture that there is in the world outside
            return picture()
        return self.contents[address.rpartition("/")[2]]

    # -- files ------------------------------------------------------------------------------------------------
    def _upload(self, call: Seen) -> Reply:
        head = f"Content-Type: {call.headers['content-type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part
            for part in BytesParser(policy=HTTP).parsebytes(head + call.body).iter_parts()
        }
        if "content" not in parts:
            return Reply(400, {"detail": "Missing content", "status": 400})
        content = parts["content"].get_payload(decode=True)
        assert isinstance(content, bytes)
        name = secrets.token_hex(16)
        self.contents[name] = content
        self.uploads[name] = {
            "id": name,
            "name": parts["content"].get_filename(),
            "content_type": parts["content"].get_content_type(),
            "size": len(content),
            "etag": name,
            "checksums": {"sha256": name},
            "metadata": {},
            "created_at": _STAMP,
            "expires_at": "2026-11-22T14:00:00.000Z",
            "urls": {"get": f"{self.public or self.url}/v1/files/{name}"},
        }
        return Reply(201, self.uploads[name])


def _problem(values: Any, kind: str) -> tuple[str, str, str] | None:
    """The first thing that is wrong with an input: the field, the rule, the words."""
    if not isinstance(values, dict) or "prompt" not in values:
        return "prompt", "required", "prompt is required"
    if kind == "video" and "image" not in values:
        return "image", "required", "image is required"
    if values.get("num_frames", 5) > 121:
        return "num_frames", "number_lte", "Must be less than or equal to 121"
    return None
