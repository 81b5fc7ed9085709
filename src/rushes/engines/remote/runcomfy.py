"""The engine ``runcomfy``: any server that speaks the native wire, RunComfy itself or another Rushes.

The other server has the same models under the same ids, or under those that a manifest names, and takes the same
input: every value goes over as it is. Sources: RunComfy's "Async queue endpoints" (submit, status, result, cancel)
and "Error codes"; docs/api.md for what a Rushes adds (``progress``, ``stage``, ``eta``, ``detail``, the ``code`` of
an ``error``). RunComfy's own client takes a top-level ``error_code`` for an error under status 200 too.
"""

import asyncio
import contextlib
from typing import Any, Final
from urllib.parse import quote, urljoin

import msgspec

from rushes.catalog.model import Model
from rushes.catalog.remotes import RemoteTable, remote_table
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
from rushes.engines.remote.http import Answer, RemoteHTTP, retry_after, trouble_of
from rushes.engines.remote.inputs import data_uri, values
from rushes.requests.record import Progress

HOPS_HEADER: Final = "X-Rushes-Hops"
"""Tells another Rushes that a server passes the request on, so that two do not pass it back and forth for ever."""
DATA_BYTES: Final = 40_000_000
"""Bytes of the largest file that goes over inside the JSON: base64 adds a third, and a body ends at 64 MiB."""
_STATUS: Final = {400001: 404, 400002: 402, 400004: 401}
"""What codes mean that do not begin with the HTTP status of it. 400001 is an identifier that cannot be one."""
_MODERATED: Final = frozenset({"content_refused", "content_policy_violation", "moderation_blocked"})
_OPERATORS: Final = frozenset({"model_unusable", "profile_unusable", "scheduler_unusable", "workflow_unusable"})
_PASSING: Final = frozenset(
    {"comfyui_lost", "engine_crashed", "engine_killed", "engine_start_failed", "interrupted"}
    | {"not_begun", "output_not_stored", "worker_lost", "worker_storage"}
)
"""Codes by which a Rushes speaks of its own state: elsewhere the same request may do well."""


class _Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """A handle. The addresses are those that the server gave, where they are at its own origin."""

    id: str
    status: str = ""
    result: str = ""
    cancel: str = ""


class RunComfyEngine:
    """See :class:`rushes.engines.remote.base.RemoteEngine`. ``seconds`` bound each call."""

    kind = "runcomfy"
    poll_seconds = 1.0

    def __init__(self, config: RemoteConfig, *, seconds: float = 60.0) -> None:
        self.name = config.name
        headers = {"Authorization": f"Bearer {config.key.value}"} if config.key else {}
        self._http = RemoteHTTP(config.name, config.base_url, headers, seconds)
        self.origin = self._http.origin

    def serves(self, model: Model) -> bool:
        return remote_table(model, self.kind) is not None

    def headers(self) -> dict[str, str]:
        return dict(self._http.headers)

    async def submit(self, job: RemoteJob) -> Accepted:
        table = remote_table(job.model, self.kind)
        if table is None:
            raise RemoteUnavailable("model", f"the manifest of {job.model.id} names no {self.kind} engine")
        body = await self._input(table, job)
        answer = await self._http.submit(
            "POST",
            f"v1/models/{quote(table.model, safe='/')}",
            json=body,
            headers={HOPS_HEADER: str(job.hops + 1)},
        )
        fields = self._fields(answer, job)
        id_ = fields.get("request_id")
        if not isinstance(id_, str) or not id_:
            raise answer.unreadable()
        urls = {
            verb: self._http.own(fields.get(f"{verb}_url")) or "" for verb in ("status", "result", "cancel")
        }
        return Accepted(msgspec.json.encode(_Task(id_, **urls)).decode())

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        task = msgspec.json.decode(handle, type=_Task)
        answer = await self._http.ask("GET", task.status or _path(task, "status"))
        fields = self._fields(answer, job)
        if fields.get("status") in ("in_queue", "in_progress"):
            return Underway(_progress(fields), retry_after(answer.headers))
        url = task.result or _path(task, "result")
        answer = await self._http.ask("GET", f"{url}{'&' if '?' in url else '?'}include_cost=true")
        fields = self._fields(answer, job)
        match fields.get("status"):
            case "succeeded":
                return Finished(self._files(fields, job), _cost(fields))
            case "failed":
                raise self._failed(fields, job)
            case "cancelled":
                raise RemoteRefused("remote_failed", f"The request was cancelled at {self.name}.")
            case "in_queue" | "in_progress":
                return Underway(_progress(fields), retry_after(answer.headers))
        raise answer.unreadable()

    async def cancel(self, handle: str) -> None:
        with contextlib.suppress(RemoteUnavailable):
            task = msgspec.json.decode(handle, type=_Task)
            await self._http.ask("POST", task.cancel or _path(task, "cancel"))

    async def close(self) -> None:
        await self._http.close()

    # -- the input --------------------------------------------------------------------------------------------
    async def _input(self, table: RemoteTable, job: RemoteJob) -> dict[str, Any]:
        prefer_url = table.options.get("files") == "url"

        async def text(file: RemoteInput) -> str:
            if file.url and prefer_url:
                return file.url
            size = (await asyncio.to_thread(file.path.stat)).st_size
            if size <= DATA_BYTES:
                return await data_uri(file)
            return file.url or await self._upload(file)

        if table.input:
            return await values(table, job, text)
        body = dict(job.input)
        for name, file in job.files.items():
            try:
                body[name] = await text(file)
            except RemoteRefused as error:
                error.field = name
                raise
        return body

    async def _upload(self, file: RemoteInput) -> str:
        """The file at the remote's own uploads, which a Rushes has and RunComfy has not. It makes nobody work, so
        that one without an answer may be repeated.
        """
        content = await asyncio.to_thread(file.path.read_bytes)
        part = (file.path.name, content, file.content_type)
        try:
            answer = await self._http.submit("POST", "v1/files", files={"file": part})
            if answer.status in (404, 405):
                raise RemoteRefused(
                    "remote_refused",
                    f"A file of {len(content):,} bytes can be sent to {self.name} by a public https:// address "
                    "alone. Submit its address, or make it smaller.",
                )
            id_ = self._fields(answer, None).get("id")
            if not isinstance(id_, str) or not id_:
                raise answer.unreadable()
        except SubmitUnknown as error:
            raise RemoteUnavailable("fault", error.why) from None
        return id_

    # -- answers ----------------------------------------------------------------------------------------------
    def _fields(self, answer: Answer, job: RemoteJob | None) -> dict[str, Any]:
        """The object that the answer holds. Raises what an error in it stands for."""
        problem = answer.problem()
        code = problem.get("error_code")
        if answer.ok and code is None:
            return answer.fields()
        own = code is not None or "error" in problem or "detail" in problem
        status = answer.status
        if isinstance(code, int) and answer.status in (200, 400):
            status = _STATUS.get(code, code // 1000)
        if not own and not answer.submitted and status in (404, 405, 410):
            # Not its API speaks, but something in front of it: the job may be there yet.
            raise RemoteUnavailable("fault", f"{self.name} cannot be found at its address ({status})")
        words = next(
            (problem[key] for key in ("error_message", "message", "error", "detail") if problem.get(key)), ""
        )
        error = trouble_of(
            msgspec.structs.replace(answer, status=status if own else answer.status),
            self._http.clean(words) if words else "",
            own_error=own,
        )
        if isinstance(error, RemoteRefused) and job is not None:
            error.field = error.field or _field(problem.get("detail"), job)
        raise error

    def _files(self, fields: dict[str, Any], job: RemoteJob) -> tuple[RemoteFile, ...]:
        output = fields.get("output")
        output = output if isinstance(output, dict) else {}
        kind = job.model.output
        found = _urls(output.get(f"{kind}s")) or _urls(output.get(kind)) or _urls(list(output.values()))
        if not found:
            gone = "has removed the files already" if fields.get("expired_at") else "succeeded without any file"
            raise RemoteRefused("remote_lost", f"{self.name} {gone}.", billed=True)
        urls = [urljoin(self.origin, url) for url in found]
        return tuple(RemoteFile(url, keyed=self._http.own(url) is not None) for url in urls)

    def _failed(self, fields: dict[str, Any], job: RemoteJob) -> RemoteRefused:
        """The error of a failed result: a Rushes has ``code``, ``message`` and ``field``, others anything."""
        error = fields.get("error")
        error = error[0] if isinstance(error, list) and error else error
        given = error if isinstance(error, dict) else {}
        code = str(next((given[key] for key in ("code", "error_code", "errorCode") if given.get(key)), ""))
        keys = ("message", "error_message", "error")
        words = next(
            (given[key] for key in keys if isinstance(given.get(key), str)), error or "it gave no reason"
        )
        reason = "remote_failed"
        if code in _MODERATED or "moderation" in code:
            reason = "content_refused"
        elif code.startswith("input_") or (
            code.endswith(("_unusable", "value_refused")) and code not in _OPERATORS
        ):
            reason = "remote_refused"
        said = self._http.clean(words)
        field = given.get("field")
        return RemoteRefused(
            reason,
            f"{self.name}: {said}" + (f" ({self._http.clean(code)})" if code and code not in said else ""),
            field=field if isinstance(field, str) and field in job.input else None,
            retryable=code in _PASSING,
            billed=_cost(fields) != 0.0,
        )


def _path(task: _Task, verb: str) -> str:
    return f"v1/requests/{quote(task.id, safe='')}/{verb}"


def _progress(fields: dict[str, Any]) -> Progress:
    """How far it is there: the place in the other queue, or what its engine says."""
    if fields.get("status") == "in_queue":
        place = fields.get("queue_position")
        return Progress(stage=f"queued, place {place}" if isinstance(place, int) else "queued")
    fraction, eta, stage = fields.get("progress"), fields.get("eta"), fields.get("stage")
    return Progress(
        fraction=min(max(float(fraction), 0.0), 1.0) if isinstance(fraction, int | float) else 0.0,
        stage=stage[:60] if isinstance(stage, str) else "",
        eta=float(eta) if isinstance(eta, int | float) and eta >= 0 else None,
    )


def _cost(fields: dict[str, Any]) -> float | None:
    cost = fields.get("cost")
    if isinstance(cost, bool) or not isinstance(cost, int | float) or cost < 0:
        return None
    return float(cost)


def _urls(value: Any) -> list[str]:
    """The addresses in a value of ``output``, each once: a text, a list of them, or objects with a ``url``."""
    found: dict[str, None] = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list):
            found |= dict.fromkeys(_urls(item))
        url = item.get("url") if isinstance(item, dict) else item
        if isinstance(url, str) and url.startswith(("https://", "http://", "/")):
            found[url] = None
    return list(found)


def _field(detail: Any, job: RemoteJob) -> str | None:
    """The first field of ours that a list of problems names in its ``loc``."""
    for entry in detail if isinstance(detail, list) else []:
        loc = entry.get("loc") if isinstance(entry, dict) else None
        for part in reversed(loc) if isinstance(loc, list) else ():
            if isinstance(part, str) and part in job.input:
                return part
    return None
