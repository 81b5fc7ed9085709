"""A server of the native wire, as RunComfy's documents show it and as a Rushes speaks it, and jobs for the engine."""

import json
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import msgspec

from rushes.catalog.load import Catalog
from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.roles import roles_of
from rushes.engines.remote.base import RemoteInput, RemoteJob
from support.remote_stub import Job, RemoteStub, Reply, Seen, movie, picture

FLF = "community/wan-2-2/first-last-frame"
T2I = "wan-ai/wan-2-5/text-to-image"
_CATALOG = Catalog.load(None)


def model(id_: str, **tables: Any) -> Model:
    """A model of the catalog with these tables of remotes alone; keys as in ``openai_video`` for ``openai-video``."""
    entry = _CATALOG.get(id_)
    assert entry is not None
    options = {name.replace("_", "-"): table for name, table in tables.items()}
    return msgspec.structs.replace(entry.model, options=options)


def remote_job(
    model: Model, folder: Path, files: dict[str, RemoteInput] | None = None, **given: Any
) -> RemoteJob:
    """What a worker makes of a request: the defaults, ``given``, and a picture for each file that has none."""
    values = {one.name: one.default for one in model.inputs if one.default is not None} | given
    have = dict(files or {})
    for name, kind in model.files().items():
        if name in values and name not in have:
            assert kind == "image"
            path = folder / f"{name}.png"
            path.write_bytes(picture(32 + len(have), 32))
            have[name] = RemoteInput(path, "image/png")
    roles = {role: value for role, value in roles_of(model, values).items() if role not in FILE_ROLES}
    answers = folder / "answers"
    answers.mkdir(exist_ok=True)
    return RemoteJob("r-1", model, values, roles, have, answers)


class RunComfyStub(RemoteStub):
    """``known`` are the ids of its models. A failed job is one with ``failure`` set, or whose prompt it refuses."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.known: tuple[str, ...] = (FLF, T2I)
        self.queued = 1
        """How many of a job's polls find it in the queue, before those that find it at work."""
        self.failure: Any = None
        """The ``error`` of the next results."""
        self.cost: float | None = 0.25
        self.content: list[tuple[bytes, str]] = []
        """The outputs of the next results; empty for one of the model's kind."""
        self.errors_under_200 = False
        """Whether errors come with status 200, as RunComfy's own client expects that they may."""
        self.urls = True
        """Whether submits and polls are answered with addresses."""
        self.public: str | None = None
        """The base of those addresses, where it is not the server's own."""
        self.uploads: dict[str, bytes] | None = {}
        """None for a server without any, as RunComfy is."""
        self.swept = False
        """Whether retention has removed the outputs."""

    def error(self, status: int, code: int, message: str, **more: Any) -> Reply:
        body = {"error_code": code, "error_message": message, **more}
        return Reply(200 if self.errors_under_200 else status, body)

    def unauthorized(self, call: Seen) -> Reply:
        given = call.headers.get("authorization", "")
        return self.error(401, 400004, f"Send a valid API key, not {given!r}.")

    def answer(self, call: Seen) -> Reply:
        parts = call.path.strip("/").split("/")
        match [call.method, *parts]:
            case ["POST", "v1", "files"] if self.uploads is not None:
                return self._upload(call)
            case ["POST", "v1", "models", *names]:
                return self._submit("/".join(names), call)
            case ["GET", "v1", "requests", id_, "status"] if id_ in self.jobs:
                return self._status(self.jobs[id_])
            case ["GET", "v1", "requests", id_, "result"] if id_ in self.jobs:
                return self._result(self.jobs[id_], cost=call.query.get("include_cost") == ["true"])
            case ["POST", "v1", "requests", id_, "cancel"] if id_ in self.jobs:
                return self._cancel(self.jobs[id_])
        return self.error(404, 404001, "There is nothing here under this name.")

    def _addresses(self, id_: str, *verbs: str) -> dict[str, str]:
        base = f"{self.public or self.url}/v1/requests/{id_}"
        return {f"{verb}_url": f"{base}/{verb}" for verb in verbs} if self.urls else {}

    def _submit(self, name: str, call: Seen) -> Reply:
        if name not in self.known:
            return self.error(404, 404001, f"There is no model {name}.")
        schema = _CATALOG.get(name)
        assert schema is not None
        fields = {one.name for one in schema.model.inputs}
        problems = [
            {"loc": [key], "msg": f"{key} is no field of this model", "type": "unknown_field"}
            for key in call.json
            if key not in fields
        ]
        problems += [
            {"loc": [one.name], "msg": f"{one.name} is at most {one.maximum}", "type": "too_large"}
            for one in schema.model.inputs
            if one.maximum is not None and call.json.get(one.name, one.maximum) > one.maximum
        ]
        if problems:
            message = f"The input does not fit: {problems[0]['msg']}."
            return self.error(422, 422001, message, detail=problems)
        id_ = f"0198c0de-0000-7000-8000-{len(self.jobs) + 1:012d}"
        self.accept(id_, {"model": name, "input": call.json})
        return Reply(200, {"request_id": id_, **self._addresses(id_, "status", "result", "cancel")})

    def _refused(self, job: Job) -> bool:
        return self.refuses is not None and self.refuses in json.dumps(job.body["input"])

    def _status(self, job: Job) -> Reply:
        state = self.step(job)
        body: dict[str, Any] = {"request_id": job.id, "status": "in_progress"}
        if state == "cancelled":
            body["status"] = "cancelled"
        elif state == "done":
            body["status"] = "completed"
        elif job.asked <= self.queued:
            body |= {"status": "in_queue", "queue_position": 3}
        else:
            body |= {"progress": 0.42, "stage": "denoising", "eta": 3.5}
        return Reply(200, body | self._addresses(job.id, "status", "result"))

    def _result(self, job: Job, *, cost: bool) -> Reply:
        body: dict[str, Any] = {"request_id": job.id, "status": "in_progress"}
        if job.state == "cancelled":
            body["status"] = "cancelled"
        elif job.state == "done":
            body |= self._outcome(job)
        if cost and self.cost is not None:
            body["cost"] = self.cost if body["status"] == "succeeded" else 0.0
        return Reply(200, body | {"created_at": "2026-11-21T10:00:00.000Z"})

    def _outcome(self, job: Job) -> dict[str, Any]:
        if self._refused(job):
            return {
                "status": "failed",
                "error": {"code": "content_refused", "message": "The prompt is refused."},
            }
        if self.failure is not None:
            return {"status": "failed", "error": self.failure}
        if self.swept:
            return {"status": "succeeded", "output": {}, "expired_at": "2026-11-21T11:00:00.000Z"}
        kind = "image" if job.body["model"] == T2I else "video"
        usual = (picture(), "image/png") if kind == "image" else (movie(), "video/mp4")
        urls = [self.output_url(*one) for one in self.content or [usual]]
        return {"status": "succeeded", "output": {kind: urls[0], f"{kind}s": urls}}

    def _cancel(self, job: Job) -> Reply:
        possible = job.asked < self.queued and job.state == "queued"
        job.cancelled = job.cancelled or possible
        outcome = "cancelled" if job.cancelled else "not_cancellable"
        return Reply(202, {"request_id": job.id, "status": "cancelled", "outcome": outcome})

    def _upload(self, call: Seen) -> Reply:
        assert self.uploads is not None
        [(_, name, type_, content)] = form_parts(call)
        id_ = f"file_{len(self.uploads) + 1}"
        self.uploads[id_] = content
        url = f"{self.url}/v1/files/{id_}"
        return Reply(200, {"id": id_, "url": url, "name": name, "content_type": type_, "size": len(content)})


def form_parts(call: Seen) -> list[tuple[str, str | None, str, bytes]]:
    """The parts of a multipart form: field, file name, content type, content."""
    head = f"Content-Type: {call.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + call.body)
    assert message.get_content_type() == "multipart/form-data", call.headers
    parts = []
    for part in message.iter_parts():
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        field = str(part.get_param("name", header="content-disposition"))
        parts.append((field, part.get_filename(), part.get_content_type(), content))
    return parts
