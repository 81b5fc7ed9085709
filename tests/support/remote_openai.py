"""Servers that speak OpenAI's videos and images, as four of them really do, and LightX2V's own tasks.

``flavour`` says whose habits it has. "vllm" (docs/serving/videos_api.md, entrypoints/openai/protocol/videos.py):
checks fields as pydantic does. "sglang" (entrypoints/openai/{video_api,image_api}.py): a form counts where it is
multipart, errors are FastAPI's ``detail``. "openai" (API reference): refuses parameters that it does not know,
moderates, and says when to poll. "lightx2v" (server/api): ``tasks`` in place of ``videos``, and images.
"""

import base64
import re
from pathlib import Path
from typing import Any, Final

import msgspec

from rushes.engines.remote.base import RemoteJob
from support.remote_runcomfy import FLF, T2I, form_parts, model, remote_job
from support.remote_stub import Job, RemoteStub, Reply, Seen, movie, picture

NAME = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
SMALL = {"71_widthx71_height": "64x48", "67_length": 9, "73_frame_rate": 16, "57_noise_seed": 7}
_OPENAI_VIDEO: Final = frozenset({"prompt", "model", "seconds", "size", "input_reference"})
_OPENAI_IMAGE: Final = frozenset({"prompt", "model", "n", "size", "response_format", "quality", "user"})
_INTEGERS: Final = ("num_frames", "fps", "seed", "num_inference_steps", "width", "height", "n")
_NUMBERS: Final = ("guidance_scale", "flow_shift")
_STATES: Final = {"queued": "queued", "running": "in_progress", "done": "completed"}
_TASK_STATES: Final = {
    "queued": "pending",
    "running": "processing",
    "done": "completed",
    "cancelled": "cancelled",
}


def video_job(
    folder: Path, table: dict[str, Any] | None = None, *, last: bool = False, **given: Any
) -> RemoteJob:
    """A video that begins with a picture; with ``last`` it ends with one too."""
    made = model(FLF, openai_video={"model": NAME, **(table or {})})
    if not last:
        inputs = tuple(one for one in made.inputs if one.role != "end_image")
        made = msgspec.structs.replace(made, inputs=inputs)
    return remote_job(made, folder, **{**SMALL, **given})


def image_job(folder: Path, table: dict[str, Any] | None = None, **given: Any) -> RemoteJob:
    values = {"prompt": "a harbour", "aspect_ratio": "100:50", **given}
    return remote_job(model(T2I, openai_video={"model": NAME, **(table or {})}), folder, **values)


class OpenAIStub(RemoteStub):
    """``url`` is without ``/v1``; see :attr:`base`."""

    def __init__(self, *arguments: Any, flavour: str = "vllm", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.flavour = flavour
        self.model = NAME
        self.needs_image = False
        """Whether its model begins with a picture."""
        self.needs_last = False
        """Whether its model ends with a picture, in the field ``last_image``. Real servers take a request without it,
        and make something else.
        """
        self.poll_after: str | None = None
        """Milliseconds in ``openai-poll-after-ms``."""
        self.failure: Any = None
        """The ``error`` of the next jobs; with "openai" and "vllm" an object, with "lightx2v" a text."""
        self.bucket = False
        """Whether videos go to a bucket of the server's own (SGLang), with an address in the job."""
        self.images_as = "b64_json"

    @property
    def base(self) -> str:
        return f"{self.url}/v1"

    # -- errors -----------------------------------------------------------------------------------------------
    def error(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> Reply:
        """In the server's own words: OpenAI and vLLM have an object, FastAPI a text."""
        if self.flavour in ("sglang", "lightx2v"):
            return Reply(status, {"detail": message})
        kind = "invalid_request_error" if status < 500 else "server_error"
        return Reply(status, {"error": {"message": message, "type": kind, "param": param, "code": code}})

    def unauthorized(self, call: Seen) -> Reply:
        given = call.headers.get("authorization", "").removeprefix("Bearer ")
        return self.error(401, f"Incorrect API key provided: {given}.", code="invalid_api_key")

    def _invalid(self, field: str, message: str) -> Reply:
        return Reply(
            422, {"detail": [{"type": "value_error", "loc": ["body", field], "msg": message, "input": ""}]}
        )

    def _checked(self, fields: dict[str, Any], known: frozenset[str]) -> Reply | None:
        """What is wrong with the values of a form or an object, as texts or as what they are."""
        if not fields.get("prompt"):
            return self.error(400, "prompt is required", param="prompt")
        if self.flavour == "openai" and (extra := sorted(fields.keys() - known)):
            return self.error(
                400, f"Unknown parameter: '{extra[0]}'.", code="unknown_parameter", param=extra[0]
            )
        for name in _INTEGERS:
            if name in fields and not re.fullmatch(r"-?\d+", str(fields[name])):
                return self._invalid(name, "Input should be a valid integer")
        for name in _NUMBERS:
            if name in fields and not re.fullmatch(r"-?\d+(\.\d+)?", str(fields[name])):
                return self._invalid(name, "Input should be a valid number")
        if "seconds" in fields and not re.fullmatch(r"[1-9]\d*", str(fields["seconds"])):
            return self._invalid("seconds", "String should match pattern '^[1-9]\\d*$'")
        if "size" in fields and not re.fullmatch(r"\d+x\d+", str(fields["size"])):
            return self._invalid("size", "String should match pattern '^\\d+x\\d+$'")
        if int(fields.get("num_inference_steps", 1)) > 200:
            return self._invalid("num_inference_steps", "Input should be less than or equal to 200")
        if fields.get("model", self.model) != self.model:
            return self.error(
                404, f"The model {fields['model']} does not exist.", code="model_not_found", param="model"
            )
        return None

    # -- calls --------------------------------------------------------------------------------------------------
    def answer(self, call: Seen) -> Reply:
        parts = call.path.strip("/").split("/")
        tasks = self.flavour == "lightx2v"
        match [call.method, *parts]:
            case ["POST", "v1", "videos"] if not tasks:
                return self._create(call)
            case ["GET", "v1", "videos", id_] if id_ in self.jobs:
                return self._retrieve(self.jobs[id_])
            case ["GET", "v1", "videos", id_, "content"] if id_ in self.jobs:
                return self._content(self.jobs[id_], "video/mp4")
            case ["DELETE", "v1", "videos", id_] if id_ in self.jobs:
                self.jobs.pop(id_).cancelled = True
                return Reply(200, {"id": id_, "object": "video.deleted", "deleted": True})
            case ["POST", "v1", "images", "generations"]:
                return self._image(call, call.json, [])
            case ["POST", "v1", "images", "edits"]:
                fields, files = self._form(call)
                return self._image(call, fields, files)
            case ["POST", "v1", "tasks", "video"] if tasks and call.path.endswith("/"):
                return self._task(call.json)
            case ["GET", "v1", "tasks", id_, "status"] if id_ in self.jobs:
                return self._task_status(self.jobs[id_])
            case ["GET", "v1", "tasks", id_, "result"] if id_ in self.jobs:
                return self._content(self.jobs[id_], "video/mp4")
            case ["DELETE", "v1", "tasks", id_] if id_ in self.jobs:
                self.jobs[id_].cancelled = True
                return Reply(200, {"stop_status": "success", "reason": "Task stopped successfully."})
        return self.error(404, "Video not found" if "videos" in parts else "Not Found", code="not_found")

    def _form(self, call: Seen) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
        fields, files = {}, []
        for name, filename, _, content in form_parts(call):
            if filename is None:
                fields[name] = content.decode()
            else:
                files.append((name, content))
        return fields, files

    # -- videos -------------------------------------------------------------------------------------------------
    def _create(self, call: Seen) -> Reply:
        if "multipart/form-data" not in call.headers.get("content-type", ""):
            return self.error(400, "Invalid request body: Field required")
        fields, files = self._form(call)
        if (wrong := self._checked(fields, _OPENAI_VIDEO)) is not None:
            return wrong
        if self.needs_image and "input_reference" not in dict(files):
            return self.error(400, "input_reference is required for image-to-video generation")
        if self.needs_last and "last_image" not in dict(files):
            return self.error(400, "last_image is required for first-last-frame generation")
        job = self.accept(f"video_{len(self.jobs) + 1}", fields | dict.fromkeys(dict(files), "file"))
        job.body["files"] = dict(files)
        return self._job(job, "queued")

    def _retrieve(self, job: Job) -> Reply:
        return self._job(job, _STATES[self.step(job)])

    def _job(self, job: Job, status: str) -> Reply:
        body: dict[str, Any] = {
            "id": job.id,
            "object": "video",
            "model": self.model,
            "status": status,
            "progress": {"queued": 0, "in_progress": 37, "completed": 100}[status],
            "created_at": 1763719200,
            "size": job.body.get("size", ""),
            "seconds": job.body.get("seconds", "4"),
            "error": None,
        }
        if status == "completed":
            if self.refuses and self.refuses in job.body["prompt"]:
                words = "Your request was blocked by our moderation system."
                body |= {"status": "failed", "error": {"code": "moderation_blocked", "message": words}}
            elif self.failure is not None:
                body |= {"status": "failed", "error": self.failure}
            elif self.bucket:
                body["url"] = self.output_url(self._movie(job), "video/mp4")
        headers = {"openai-poll-after-ms": self.poll_after} if self.poll_after else {}
        return Reply(200, body, headers)

    def _movie(self, job: Job) -> bytes:
        """What was asked for, as far as its size, frames and rate go."""
        body = job.body
        if "target_shape" in body:
            height, width = body["target_shape"]
            return movie(width, height, body["target_video_length"], body["target_fps"])
        width, height = (int(side) for side in body.get("size", "64x48").split("x"))
        return movie(width, height, int(body.get("num_frames", 5)), int(body.get("fps", 24)))

    def _content(self, job: Job, content_type: str) -> Reply:
        if job.state != "done":
            return self.error(404, "Generation is still in-progress")
        return Reply(200, self._movie(job), {"Content-Type": content_type})

    # -- images ---------------------------------------------------------------------------------------------------
    def _image(self, call: Seen, fields: dict[str, Any], files: list[tuple[str, bytes]]) -> Reply:
        if (wrong := self._checked(fields, _OPENAI_IMAGE)) is not None:
            return wrong
        if call.path.endswith("/edits") and not files:
            return self.error(422, "Field 'image' is required")
        if self.refuses and self.refuses in fields["prompt"]:
            words = "Your request was rejected by the safety system."
            return self.error(400, words, code="moderation_blocked")
        job = self.accept(f"image_{len(self.jobs) + 1}", fields)
        job.body["files"] = files
        if self.failure is not None:
            return self.error(500, str(self.failure))
        width, height = (int(side) for side in fields.get("size", "64x48").split("x"))
        # Their pipelines round sizes to what their latents take.
        content = picture(width // 16 * 16, height // 16 * 16)
        if self.images_as == "b64_json":
            entry = {"b64_json": base64.b64encode(content).decode(), "url": None, "revised_prompt": None}
        else:
            url = self.output_url(content, "image/png")
            entry = {"url": url.removeprefix(self.url) if self.images_as == "relative" else url}
        return Reply(200, {"created": 1763719200, "data": [entry]})

    # -- LightX2V's tasks -------------------------------------------------------------------------------------------
    def _task(self, body: dict[str, Any]) -> Reply:
        for name in ("target_video_length", "seed", "infer_steps", "target_fps"):
            if name in body and not isinstance(body[name], int):
                return self._invalid(name, "Input should be a valid integer")
        job = self.accept(f"task-{len(self.jobs) + 1}", body)
        return Reply(200, {"task_id": job.id, "task_status": "pending", "save_result_path": job.id})

    def _task_status(self, job: Job) -> Reply:
        status = _TASK_STATES[self.step(job)]
        error = "Task cancelled by user" if status == "cancelled" else None
        if status == "completed" and self.failure is not None:
            status, error = "failed", self.failure
        body = {"task_id": job.id, "status": status, "start_time": "2026-11-21T10:00:00", "end_time": None}
        return Reply(200, body | {"error": error, "error_type": "", "save_result_path": f"{job.id}.mp4"})
