"""fal's queue as its documents and its own client have it, on a loopback port.

Submit takes anything for an app that there is: what is wrong with an input is found by the model and told with the
result. A job that failed reads COMPLETED, with ``error`` and ``error_type``; its result has the model's status. By-id
addresses name the owner and the app alone. What an unknown id is answered with is not documented: 404 is inferred.
"""

import base64
import io
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from support.remote_stub import Job, RemoteStub, Reply, Seen, movie, picture

I2V = "fal-ai/wan/v2.2-a14b/image-to-video"
T2I = "fal-ai/flux/dev"
_BY_ID = re.compile(
    r"/(?P<app>(?:workflows/|comfy/)?[^/]+/[^/]+)/requests/(?P<id>[^/]+)(?P<part>/status|/cancel)?"
)
_STAMP = "2026-11-21T14:00:00.000000Z"
_FLAGGED = "The content could not be processed because it contained material flagged by a content checker."


@dataclass
class Outcome:
    """What a job comes to instead of a success: the answer of its result, and what its status says of it."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    error_type: str | None = None
    inference_time: float | None = None


def problem(place: str, message: str, kind: str, **context: Any) -> dict[str, Any]:
    """The body of a model's error."""
    entry = {"loc": ["body", place] if place else ["body"], "msg": message, "type": kind}
    return {
        "detail": [
            entry | {"url": f"https://docs.fal.ai/errors#{kind}"} | ({"ctx": context} if context else {})
        ]
    }


class FalStub(RemoteStub):
    authorization = "Key {key}"

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.polls = 2
        self.queued = 1
        """How many polls find a job in the queue, of those that find it unfinished."""
        self.models = {I2V: "video", T2I: "image", "workflows/ada/film": "video"}
        self.outcome: Outcome | None = None
        """What every job comes to; None: to what its input says."""
        self.public: str | None = None
        """The base of the addresses in answers, where it shall not be the server's own."""
        self.unsafe: list[bool] | bool | None = None
        """What the safety checker says of pictures; those that it finds unsafe are black."""
        self.inline = False
        """Whether pictures come in the answer itself, as with ``sync_mode``."""
        self._results: dict[str, Outcome | dict[str, Any]] = {}

    def unauthorized(self, call: Seen) -> Reply:
        if "authorization" not in call.headers:
            return Reply(401, {"detail": "Authentication is required to access this application."})
        return Reply(401, {"detail": "No user found for Key ID and Secret"})

    def answer(self, call: Seen) -> Reply:
        if by_id := _BY_ID.fullmatch(call.path):
            return self._by_id(call, by_id["app"], by_id["id"], by_id["part"] or "")
        if call.method == "POST":
            return self._submit(call)
        return Reply(404, {"detail": "Not Found"})

    def _submit(self, call: Seen) -> Reply:
        path = call.path.strip("/")
        if not any(_app(path) == _app(model) for model in self.models):
            return Reply(404, {"detail": f'Application "{path.split("/")[-1]}" not found'})
        job = self.accept(str(uuid.uuid4()), {"app": path, "input": call.json})
        body = self._links(job) | {"status": "IN_QUEUE", "queue_position": 0}
        return Reply(200, body, {"x-fal-request-id": job.id})

    def _links(self, job: Job) -> dict[str, Any]:
        base = f"{self.public or self.url}/{_app(job.body['app'])}/requests/{job.id}"
        return {
            "request_id": job.id,
            "response_url": base,
            "status_url": f"{base}/status",
            "cancel_url": f"{base}/cancel",
        }

    def _by_id(self, call: Seen, app: str, job_id: str, part: str) -> Reply:
        job = self.jobs.get(job_id)
        if job is None or _app(job.body["app"]) != app:
            lost = {"status": "NOT_FOUND"} if part == "/cancel" else {"detail": "Request not found"}
            return Reply(404, lost)
        head = {"x-fal-request-id": job.id}
        if part == "/cancel" and call.method == "PUT":
            if job.state == "done":
                return Reply(400, {"status": "ALREADY_COMPLETED"}, head)
            job.cancelled = True
            return Reply(202, {"status": "CANCELLATION_REQUESTED"}, head)
        if part == "/status" and call.method == "GET":
            return self._status(job, with_logs=call.query.get("logs", ["0"])[0].lower() in ("1", "true"))
        if not part and call.method == "GET":
            return self._result(job)
        return Reply(405, {"detail": "Method Not Allowed"})

    def _status(self, job: Job, *, with_logs: bool) -> Reply:
        state = self.step(job)
        body = self._links(job)
        if state == "running" and job.asked <= self.queued:
            return Reply(202, body | {"status": "IN_QUEUE", "queue_position": self.queued - job.asked + 2})
        logs = None
        if with_logs:
            bars = [
                f"Sampling: {10 * step:3}%|{'█' * step:<10}| {step}/10 [00:0{step}<00:05]" for step in (1, 5)
            ]
            logs = [
                {"timestamp": _STAMP, "level": level, "source": "USER", "message": text}
                for level, text in (("INFO", "loading weights"), *(("STDERR", bar) for bar in bars))
            ]
        if state == "running":
            return Reply(202, body | {"status": "IN_PROGRESS", "logs": logs})
        body |= {"status": "COMPLETED", "logs": logs, "metrics": {"inference_time": 12.5}}
        outcome = self._outcome(job)
        if isinstance(outcome, Outcome):
            body["metrics"] = {"inference_time": outcome.inference_time} if outcome.inference_time else {}
            said = {"error": outcome.error, "error_type": outcome.error_type}
            body |= {name: value for name, value in said.items() if value is not None}
        return Reply(200, body)

    def _result(self, job: Job) -> Reply:
        if job.state not in ("done", "cancelled"):
            return Reply(400, {"detail": "Request is still in progress"})
        head = {"x-fal-request-id": job.id}
        outcome = self._outcome(job)
        if isinstance(outcome, Outcome):
            kind = {"x-fal-error-type": outcome.error_type} if outcome.error_type else {}
            return Reply(outcome.status, outcome.body, head | kind | outcome.headers)
        if outcome.get("video"):  # addresses are public and stay; the stub makes a fresh one for each answer
            file = outcome["video"]
            outcome = outcome | {"video": file | {"url": self.output_url(file["url"], "video/mp4")}}
        elif not self.inline:
            files = [
                file | {"url": self.output_url(file["url"], file["content_type"])} for file in outcome["images"]
            ]
            outcome = outcome | {"images": files}
        else:
            files = [
                file | {"url": "data:image/png;base64," + base64.b64encode(file["url"]).decode()}
                for file in outcome["images"]
            ]
            outcome = outcome | {"images": files}
        return Reply(200, outcome, head | {"x-fal-billable-units": "1"})

    # -- the models -------------------------------------------------------------------------------------------
    def _outcome(self, job: Job) -> "Outcome | dict[str, Any]":
        """Of a job that has ended. Files stand in it as their bytes."""
        if job.cancelled:
            text = "Request was cancelled by the client"
            return Outcome(
                499, {"detail": text, "error_type": "client_cancelled"}, {}, text, "client_cancelled"
            )
        if self.outcome is not None:
            return self.outcome
        if job.id not in self._results:
            self._results[job.id] = self._generate(job.body["app"], job.body["input"])
        return self._results[job.id]

    def _generate(self, model: str, values: dict[str, Any]) -> "Outcome | dict[str, Any]":
        if model not in self.models:
            return _bad(404, {"detail": f"Path /{'/'.join(model.split('/')[2:])} not found"})
        prompt = values.get("prompt")
        if prompt is None:
            return _bad(422, problem("prompt", "Field required", "missing"))
        if self.refuses is not None and self.refuses in prompt:
            return _bad(422, problem("prompt", _FLAGGED, "content_policy_violation"), 0.4)
        if values.get("num_frames", 1) > 161:
            text = "Input should be less than or equal to 161"
            return _bad(422, problem("num_frames", text, "less_than_equal", le=161))
        if self.models[model] == "image":
            return self._pictures(values)
        size = _size_of(values.get("image_url")) if model == I2V else (64, 48)
        if size is None:
            return _bad(422, problem("image_url", "Image load error", "image_load_error"))
        content = movie(*size, frames=values.get("num_frames", 5), fps=values.get("frames_per_second", 16))
        return {
            "video": {
                "url": content,
                "content_type": "video/mp4",
                "file_name": "output.mp4",
                "file_size": len(content),
            },
            "seed": values.get("seed", 7),
            "prompt": prompt,
        }

    def _pictures(self, values: dict[str, Any]) -> dict[str, Any]:
        size = values.get("image_size", {"width": 64, "height": 48})
        count = values.get("num_images", 1)
        flags = [False] * count if self.unsafe is None else self.unsafe
        seen = flags if isinstance(flags, list) else [flags] * count
        files = [
            {
                "url": _black(size["width"], size["height"])
                if flag
                else picture(size["width"], size["height"]),
                "width": size["width"],
                "height": size["height"],
                "content_type": "image/png",
            }
            for flag in seen
        ]
        return {
            "images": files,
            "timings": {"inference": 2.1},
            "seed": values.get("seed", 7),
            "has_nsfw_concepts": flags,
            "prompt": values["prompt"],
        }


def _bad(status: int, body: Any, worked: float | None = None) -> Outcome:
    return Outcome(status, body, {"x-fal-retryable": "false"}, f"Invalid status code: {status}", None, worked)


def _app(model: str) -> str:
    parts = model.split("/")
    return "/".join(parts[: 3 if parts[0] in ("workflows", "comfy") else 2])


def _black(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def _size_of(url: Any) -> tuple[int, int] | None:
    """Of the picture in a data URI, or of the one picture that there is behind https addresses."""
    if isinstance(url, str) and url.startswith("https://"):
        return 64, 48
    if not isinstance(url, str) or not url.startswith("data:image/png;base64,"):
        return None
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return image.size
