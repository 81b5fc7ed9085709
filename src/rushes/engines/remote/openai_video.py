"""The engine ``openai-video``: servers that speak OpenAI's ``/v1/videos`` and ``/v1/images``, and LightX2V.

``endpoint`` in a model's table says which of their addresses a model has; without it, its kind of output does:

- ``videos``: ``POST videos`` as a form, then polls, then ``videos/{id}/content``. vLLM-Omni, SGLang Diffusion and
  OpenAI have it.
- ``images``: ``POST images/generations``, or, with input files, ``images/edits`` as a form. They answer with the
  images themselves, so that nothing is left to poll: what breaks off before the answer remains unknown.
- ``tasks``: LightX2V's own ``POST tasks/video/``, as its server has no ``videos``; its ``images`` are OpenAI's.

Without a mapping in the manifest a request has the fields that the open servers share, which OpenAI itself does not
all take: ``num_frames``, ``fps``, ``seed``, … Sources: OpenAI's API reference (videos, images); vLLM-Omni,
docs/serving/videos_api.md, image_generation_api.md, image_edit_api.md; SGLang, docs/diffusion/api/openai_api.md and
entrypoints/openai/{video_api,image_api,protocol}.py; LightX2V, lightx2v/server/api/{tasks,openai_images.py} and
schema.py. SGLang reads fields out of a form only where it is multipart, and so it always is.
"""

import asyncio
import base64
import contextlib
import math
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args
from urllib.parse import quote, urljoin

import msgspec

from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.remotes import RemoteTable, remote_table
from rushes.engines.remote.answers import input_values, own_field
from rushes.engines.remote.base import (
    Accepted,
    Finished,
    RemoteFile,
    RemoteInput,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
    Underway,
)
from rushes.engines.remote.configured import RemoteConfig
from rushes.engines.remote.http import Answer, RemoteHTTP, id_of, retry_after, trouble_of
from rushes.engines.remote.inputs import data_uri
from rushes.engines.remote.keyed import KeyedEngine
from rushes.requests.record import Progress

Endpoint = Literal["videos", "images", "tasks"]
Part = tuple[str, tuple[str | None, str | bytes] | tuple[str, bytes, str]]
"""One part of a form, as httpx takes it: a value has no file name."""

IMAGE_SECONDS: Final = 900.0
"""How long a synchronous image may take: LightX2V itself gives up after 600 seconds, others do not."""
MOST_FILES: Final = 16
"""Outputs of one request that are brought here."""
_LONGEST_PAUSE: Final = 60.0
_SEEDS: Final = 2**31
"""Seeds that are drawn here are below: NumPy takes no larger ones than 32 bits have."""
_DEFAULTS: Final[Mapping[Endpoint, Mapping[str, str]]] = {
    "videos": {
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "num_frames": "frames",
        "fps": "fps",
        "seed": "seed",
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
        "flow_shift": "shift",
    },
    "images": {
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "seed": "seed",
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
    },
    "tasks": {
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "target_video_length": "frames",
        "target_fps": "fps",
        "seed": "seed",
        "infer_steps": "steps",
    },
}
"""The servers' fields, each with the role that it gets where a manifest has no mapping."""
_FILES: Final[Mapping[Endpoint, Mapping[str, tuple[str, ...]]]] = {
    "videos": {"input_reference": ("start_image", "reference_image", "source_video")},
    "images": {"image": ("start_image", "reference_image", "end_image")},
    "tasks": {"image_path": ("start_image", "reference_image"), "last_frame_path": ("end_image",)},
}
"""The same for files: the first role that the request has; ``image`` may be there several times and gets all."""
_SIZES: Final = frozenset({"size", "width", "height", "target_shape"})
_MODERATED: Final = frozenset(
    {"moderation_blocked", "content_policy_violation", "content_filter", "sexual_content"}
)
_NO_FUNDS: Final = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
_GONE: Final = re.compile(r"\b(video|task)\b.*\bnot found", re.IGNORECASE | re.DOTALL)
_FULL: Final = re.compile(r"\bqueue is full\b", re.IGNORECASE)
"""What SGLang and LightX2V say in FastAPI's ``detail``, which a gateway may have too, but not in these words."""
_LONGEST_DETAIL: Final = 300
_PASSING: Final = frozenset({"server_error", "internal_error", "service_unavailable"})
_SUFFIXES: Final = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
}


class OpenAIVideoEngine(KeyedEngine):
    """See :class:`rushes.engines.remote.base.RemoteEngine`. ``seconds`` bound each call but that for images."""

    kind = "openai-video"
    poll_seconds = 2.0

    def __init__(self, config: RemoteConfig, *, seconds: float = 60.0) -> None:
        super().__init__(config, seconds=seconds)
        self._images = RemoteHTTP(config.name, config.base_url, self.headers(), max(seconds, IMAGE_SECONDS))

    async def submit(self, job: RemoteJob) -> Accepted | Finished:
        table = self._table(job.model)
        endpoint = _endpoint(table, job.model)
        body, files = await self._body(table, endpoint, job)
        body |= table.options.get("extra", {})
        if endpoint == "videos":
            answer = await self._http.submit("POST", "videos", files=await _form(body, files))
        elif endpoint == "tasks":
            answer = await self._http.submit("POST", "tasks/video/", json=await _inlined(body, files))
        elif files:
            form = await _form(body, files)
            answer = await self._images.submit("POST", "images/edits", files=form, large=True)
        else:
            answer = await self._images.submit("POST", "images/generations", json=body, large=True)
        fields = self._fields(answer, job, whole=endpoint == "images")
        if endpoint == "images":
            return await self._image_files(fields, job)
        id_ = id_of(fields.get("task_id" if endpoint == "tasks" else "id"))
        if id_ is None:
            raise answer.unreadable()
        return Accepted(f"{endpoint}/{quote(id_, safe='')}")

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        tasks = handle.startswith("tasks/")
        answer = await self._http.ask("GET", f"{handle}/status" if tasks else handle)
        fields = self._fields(answer, job)
        match fields.get("status"):
            case "queued" | "pending":
                return Underway(Progress(stage="queued"), _pause(answer))
            case "in_progress" | "processing":
                return Underway(_progress(fields), _pause(answer))
            case "completed":
                path = f"{handle}/{'result' if tasks else 'content'}"
                return Finished((self._video(fields.get("url"), path),))
            case "failed":
                raise self._failed(fields)
            case "cancelled" | "canceled" | "deleted":
                raise RemoteRefused("remote_failed", f"The job was cancelled at {self.name}.", billed=True)
            case "expired":
                raise RemoteRefused("remote_lost", f"{self.name} has removed the job already.", billed=True)
            case str():  # a word that is not known here: it has not ended
                return Underway(_progress(fields), _pause(answer))
        raise answer.unreadable()

    async def cancel(self, handle: str) -> None:
        with contextlib.suppress(RemoteUnavailable):
            await self._http.ask("DELETE", handle)

    async def close(self) -> None:
        await super().close()
        await self._images.close()

    # -- the input --------------------------------------------------------------------------------------------
    async def _body(
        self, table: RemoteTable, endpoint: Endpoint, job: RemoteJob
    ) -> tuple[dict[str, Any], dict[str, RemoteInput]]:
        """The server's fields, and the input files by the token that stands for each of them in those fields."""
        files: dict[str, RemoteInput] = {}

        async def token(file: RemoteInput) -> str:
            key = f"file-{secrets.token_hex(16)}"
            files[key] = file
            return key

        tokens: dict[str, str] = {}
        if table.input:
            body = await input_values(table, job, {}, token)
        else:
            tokens = {name: await token(file) for name, file in job.files.items()}
            body = _default_body(endpoint, job, tokens)
        if endpoint != "tasks":  # LightX2V has one model, and no field for it
            body = {"model": table.model} | body
        used = msgspec.json.encode(body).decode()
        for name, key in tokens.items():
            if key not in used:
                raise self._left_out(job.model, name)
        return body, {key: file for key, file in files.items() if key in used}

    def _left_out(self, model: Model, name: str) -> RemoteRefused:
        """The error for a file that no field would get: the server would make something else, and not say so."""
        role = next(field.role for field in model.inputs if field.name == name)
        return RemoteRefused(
            "remote_refused",
            f"{self.name} is not told which field takes the file of {name}, and would leave it out. The operator "
            f"names all fields in [engines.{self.kind}.input] of the model's manifest, this one as in "
            f'last_image = "{role}", or has the model run elsewhere.',
            field=name,
        )

    # -- answers ----------------------------------------------------------------------------------------------
    def _fields(self, answer: Answer, job: RemoteJob, *, whole: bool = False) -> dict[str, Any]:
        """The object that the answer holds. Raises what an error stands for. ``whole`` where a submit is answered
        with the result.
        """
        if answer.ok:
            return answer.fields()
        problem = answer.problem()
        # OpenAI says it in an object "error" with message, type, param and code; old vLLM without that object around
        # it; FastAPI has "detail", a text or a list of objects with loc, msg and type.
        # Gateways have a "message" or a "detail" too: only that object says that the API itself has looked at it.
        error, detail, status = problem.get("error"), problem.get("detail"), answer.status
        own = isinstance(error, dict) and bool(error)
        error = error if isinstance(error, dict) else problem
        text = detail[:_LONGEST_DETAIL] if isinstance(detail, str) else ""
        if not own and not answer.submitted and status in (404, 405, 410) and not _GONE.search(text):
            # Not its API speaks, but something in front of it: the job may be there yet.
            raise RemoteUnavailable("fault", f"{self.name} cannot be found at its address ({status})")
        words = self._words(error.get("message") or error.get("detail") or problem.get("error") or "")
        if whole and (status == 408 or (status >= 500 and status != 503)):
            # It had begun: sent again for as long as it is refused, a request that it cannot do would never end.
            said = f"{self.name}: {words or status}"
            if own and status in (500, 501):
                raise RemoteRefused("remote_failed", said, billed=True)
            raise SubmitUnknown(f"{said}; whether it made anything is not known")
        code = str(error.get("code") or "") if own and status < 500 else ""
        if _is_moderation(code, error.get("type") if own else ""):
            # Before anything was made only where a job would have come of it.
            raise RemoteRefused(
                "content_refused",
                f"{self.name} refuses the content: {words or code}",
                billed=whole or not answer.submitted,
            )
        if code in _NO_FUNDS:
            raise RemoteUnavailable("funds", f"the account at {self.name} has no money left: {words}")
        if code == "model_not_found":
            raise RemoteUnavailable("model", f"{self.name} does not know the model: {words}")
        trouble = trouble_of(answer, words, own_error=own or (status == 503 and bool(_FULL.search(text))))
        if isinstance(trouble, RemoteRefused) and answer.submitted:
            trouble.field = self._field(error, job)
        raise trouble

    def _words(self, said: Any) -> str:
        """What an error says; of a list of problems, where each is and what it is."""
        if isinstance(said, list):
            parts = [
                f"{'.'.join(str(part) for part in entry.get('loc') or ())}: {entry.get('msg')}"
                for entry in said
                if isinstance(entry, dict)
            ]
            said = "; ".join(parts) or said
        return self._http.clean(said) if said else ""

    def _field(self, error: Mapping[str, Any], job: RemoteJob) -> str | None:
        """The input of ours that an error speaks of, by its ``param`` or the ``loc`` of its first problem."""
        table = remote_table(job.model, self.kind)
        detail = error.get("detail")
        loc = (
            detail[0].get("loc")
            if isinstance(detail, list) and detail and isinstance(detail[0], dict)
            else None
        )
        name = error.get("param") or (loc[-1] if isinstance(loc, list) and loc else None)
        if table is None or not isinstance(name, str):
            return None
        if not table.input and name in _SIZES:
            size = job.model.field("resolution")
            return size.name if size is not None else None
        endpoint = _endpoint(table, job.model)
        firsts = {key: roles[0] for key, roles in _FILES[endpoint].items()}
        return own_field(table, job.model, {**_DEFAULTS[endpoint], **firsts}, name)

    def _failed(self, fields: Mapping[str, Any]) -> RemoteRefused:
        """The error of a failed job: OpenAI ``{code, message}``, LightX2V a text and ``error_type``."""
        error = fields.get("error")
        given = error if isinstance(error, dict) else {}
        code = str(given.get("code") or fields.get("error_type") or "")
        words = self._words(given.get("message") or error or "it gave no reason")
        # Whether a vendor charges for what it began is not known here.
        if _is_moderation(code):
            return RemoteRefused("content_refused", f"{self.name} refuses the content: {words}", billed=True)
        return RemoteRefused("remote_failed", f"{self.name}: {words}", retryable=code in _PASSING, billed=True)

    def _video(self, url: Any, path: str) -> RemoteFile:
        """The video of a completed job. SGLang with a bucket of its own gives ``url``, and has no content then."""
        if isinstance(url, str) and url:
            return self._remote_file(url)
        return RemoteFile(f"{self._http.base_url}/{path}", keyed=True)

    def _remote_file(self, url: str) -> RemoteFile:
        try:
            whole = urljoin(self.origin, url)
        except ValueError:
            raise self._unreadable("address") from None
        own = self._http.own(whole)
        return RemoteFile(own or whole, keyed=own is not None)

    def _unreadable(self, what: str) -> RemoteRefused:
        text = f"{self.name} gave an {what} of its output that cannot be read."
        return RemoteRefused("remote_failed", text, billed=True)

    async def _image_files(self, fields: dict[str, Any], job: RemoteJob) -> Finished:
        data, size = fields.get("data"), job.roles.get("resolution")
        files = []
        for number, entry in enumerate(data[:MOST_FILES] if isinstance(data, list) else [], 1):
            given = entry if isinstance(entry, dict) else {}
            if isinstance(text := given.get("b64_json"), str) and text:
                path = job.folder / f"answer-{number}"
                try:
                    await asyncio.to_thread(_write, text, path)
                except ValueError:
                    raise self._unreadable("encoding") from None
                files.append(RemoteFile(path=path, size=size))
            elif isinstance(url := given.get("url"), str) and url:
                files.append(msgspec.structs.replace(self._remote_file(url), size=size))
        if not files:
            raise RemoteRefused("remote_failed", f"{self.name} answered without any image.", billed=True)
        return Finished(tuple(files))


def _endpoint(table: RemoteTable, model: Model) -> Endpoint:
    given = table.options.get("endpoint", f"{model.output}s")
    return next(name for name in get_args(Endpoint) if name == given)


def _default_body(endpoint: Endpoint, job: RemoteJob, tokens: Mapping[str, str]) -> dict[str, Any]:
    # SGLang's own seed is always the same: a model without one would make the same picture for ever.
    body: dict[str, Any] = {"seed": secrets.randbelow(_SEEDS)}
    body |= {name: job.roles[role] for name, role in _DEFAULTS[endpoint].items() if role in job.roles}
    if "resolution" in job.roles:
        width, height = job.roles["resolution"]
        body |= {"target_shape": [height, width]} if endpoint == "tasks" else {"size": f"{width}x{height}"}
    frames, fps = job.roles.get("frames"), job.roles.get("fps")
    if endpoint == "videos" and frames and fps:
        body["seconds"] = str(max(1, round(frames / fps)))  # whole ones; num_frames is what counts
    if endpoint == "images":
        body |= {"n": 1, "response_format": "b64_json"}
    by_role: dict[str, list[str]] = {}
    for field in job.model.inputs:
        if field.role in FILE_ROLES and field.name in tokens:
            by_role.setdefault(field.role, []).append(tokens[field.name])
    for name, roles in _FILES[endpoint].items():
        if given := [token for role in roles for token in by_role.get(role, [])]:
            body[name] = given if endpoint == "images" else given[0]
    return body


async def _form(body: Mapping[str, Any], files: Mapping[str, RemoteInput]) -> list[Part]:
    """A multipart form: a part for each value, for each of a list, and for each file that is a value."""
    parts: list[Part] = []
    for name, value in body.items():
        for item in value if isinstance(value, list) else [value]:
            file = files.get(item) if isinstance(item, str) else None
            if file is None:
                parts.append((name, (None, await _inlined(_plain(item), files))))
                continue
            content = await asyncio.to_thread(file.path.read_bytes)
            suffix = _SUFFIXES.get(file.content_type, file.path.suffix)
            parts.append((name, (f"{name}{suffix}", content, file.content_type)))
    return parts


def _plain(value: Any) -> str:
    """A value as the text of a form."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # fields for whole numbers take no "16.0"
    return msgspec.json.encode(value).decode()


async def _inlined(value: Any, files: Mapping[str, RemoteInput]) -> Any:
    """``value`` with each file's token in it replaced by the file itself, as a data URI."""
    if isinstance(value, str):
        for key in [key for key in files if key in value]:
            value = value.replace(key, await data_uri(files[key]))
        return value
    if isinstance(value, list):
        return [await _inlined(item, files) for item in value]
    if isinstance(value, dict):
        return {name: await _inlined(item, files) for name, item in value.items()}
    return value


def _write(text: str, path: Path) -> None:
    path.write_bytes(base64.b64decode(text.rpartition("base64,")[2], validate=True))


def _is_moderation(code: str, type_: Any = "") -> bool:
    return code in _MODERATED or "moderation" in code or "moderation" in str(type_)


def _progress(fields: Mapping[str, Any]) -> Progress:
    percent = fields.get("progress")
    if not isinstance(percent, int | float):
        return Progress()
    return Progress(fraction=float(min(max(percent, 0.0), 100.0)) / 100)


def _pause(answer: Answer) -> float | None:
    """Seconds until the next poll makes sense, where the server says: OpenAI in milliseconds, others as usual."""
    try:
        milliseconds = float(answer.headers["openai-poll-after-ms"])
    except (KeyError, ValueError):
        return retry_after(answer.headers)
    if not math.isfinite(milliseconds):
        return None
    return min(max(milliseconds / 1000, 0.0), _LONGEST_PAUSE)
