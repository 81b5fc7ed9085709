"""The engine ``runcomfy``: any server that speaks the native wire, RunComfy itself or another Rushes.

The other server has the same models under the same ids, or under those that a manifest names, and takes the same
input: every value goes over as it is. Sources: RunComfy's "Async queue endpoints" (submit, status, result, cancel)
and "Error codes"; docs/api.md for what a Rushes adds (``progress``, ``stage``, ``eta``, ``detail``, the ``code`` of
an ``error``). RunComfy's own client takes a top-level ``error_code`` for an error under status 200 too. Its documents
want input files as public https addresses, which its own client does not keep to.
"""

import asyncio
import contextlib
from typing import Any, Final
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from rushes import log
from rushes.catalog.model import Model
from rushes.catalog.remotes import RemoteTable, remote_table
from rushes.engines.remote.answers import input_values
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
from rushes.engines.remote.http import Answer, id_of, retry_after, trouble_of
from rushes.engines.remote.inputs import data_uri
from rushes.engines.remote.keyed import KeyedEngine
from rushes.requests.record import Progress

_LONGEST_ENGINE: Final = 60
HOPS_HEADER: Final = "X-Rushes-Hops"
"""Tells another Rushes that a server passes the request on, so that two do not pass it back and forth for ever."""
DATA_BYTES: Final = 40_000_000
"""Bytes of the largest file that goes over inside the JSON: base64 adds a third, and a body ends at 64 MiB."""
MOST_FILES: Final = 16
"""Outputs of one request that are brought here."""
MOST_USD: Final = 10_000.0
"""The largest cost of one request that is believed."""
VENDOR_DOMAIN: Final = "runcomfy.net"
"""Where RunComfy itself is."""
_LONGEST_ADDRESS: Final = 2048
_LONGEST_STAGE: Final = 60
_LONGEST_ETA: Final = 1e9
_STATES: Final = ("in_queue", "in_progress", "completed", "succeeded", "failed", "cancelled")
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
    """A handle. The addresses are those that the server gave, where they are at its own origin and sign nothing: a
    handle is kept, and logged.
    """

    id: str
    status: str = ""
    result: str = ""
    cancel: str = ""


class RunComfyEngine(KeyedEngine):
    """See :class:`rushes.engines.remote.base.RemoteEngine`. ``seconds`` bound each call."""

    kind = "runcomfy"
    poll_seconds = 1.0

    def __init__(self, config: RemoteConfig, *, seconds: float = 60.0) -> None:
        super().__init__(config, seconds=seconds)
        self._files_as = "url" if at_runcomfy(config.base_url) else "data"

    async def submit(self, job: RemoteJob) -> Accepted:
        table = self._table(job.model)
        body = await self._input(table, job)
        answer = await self._http.submit(
            "POST",
            f"v1/models/{quote(table.model, safe='/')}",
            json=body,
            headers={HOPS_HEADER: str(job.hops + 1)},
        )
        fields = self._fields(answer, job)
        id_ = id_of(fields.get("request_id"))
        if id_ is None:
            raise answer.unreadable()
        urls = {verb: self._address(fields.get(f"{verb}_url")) for verb in ("status", "result", "cancel")}
        return Accepted(msgspec.json.encode(_Task(id_, **urls)).decode())

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        task = self._read(handle)
        answer = await self._http.ask("GET", task.status or _path(task, "status"))
        fields = self._fields(answer, job)
        if fields.get("status") in ("in_queue", "in_progress"):
            return Underway(self._progress(fields), retry_after(answer.headers))
        url = task.result or _path(task, "result")
        answer = await self._http.ask("GET", f"{url}?include_cost=true")
        fields = self._fields(answer, job)
        match fields.get("status"):
            case "succeeded":
                cost = self._cost(fields)
                if cost == 0 and self._is_priced(job.model):
                    cost = None  # a Rushes whose models have no price says 0
                engine = fields.get("remote_engine") or fields.get("engine")
                engine = self._http.clean(engine)[:_LONGEST_ENGINE] if isinstance(engine, str) else ""
                return Finished(self._files(fields, job), cost, engine)
            case "failed":
                raise self._failed(fields, job)
            case "cancelled":
                text = f"The request was cancelled at {self.name}."
                raise RemoteRefused("remote_failed", text, billed=self._cost(fields) != 0.0)
            case str():  # one of the others, or a word that is not known here: it has not ended
                return Underway(self._progress(fields), retry_after(answer.headers))
        raise answer.unreadable()

    async def cancel(self, handle: str) -> None:
        with contextlib.suppress(RemoteUnavailable, RemoteRefused):
            task = self._read(handle)
            await self._http.ask("POST", task.cancel or _path(task, "cancel"))

    def _read(self, handle: str) -> _Task:
        try:
            return msgspec.json.decode(handle, type=_Task)
        except msgspec.DecodeError:
            text = f"What was kept of the job at {self.name} cannot be read."
            raise RemoteRefused("remote_lost", text, billed=True) from None

    # -- the input --------------------------------------------------------------------------------------------
    async def _input(self, table: RemoteTable, job: RemoteJob) -> dict[str, Any]:
        prefer_url = table.options.get("files", self._files_as) == "url"

        async def text(file: RemoteInput) -> str:
            if file.url and prefer_url:
                return file.url
            size = (await asyncio.to_thread(file.path.stat)).st_size
            if size <= DATA_BYTES:
                return await data_uri(file)
            return file.url or await self._upload(file)

        if table.input:
            return await input_values(table, job, {}, text)
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
            id_ = id_of(self._fields(answer, None).get("id"))
            if id_ is None:
                raise answer.unreadable()
        except SubmitUnknown as error:
            raise RemoteUnavailable("fault", error.why) from None
        return id_

    # -- answers ----------------------------------------------------------------------------------------------
    def _fields(self, answer: Answer, job: RemoteJob | None) -> dict[str, Any]:
        """The object that the answer holds. Raises what an error in it stands for."""
        problem = answer.problem()
        if answer.ok and problem.get("status") in _STATES and (not answer.submitted or "request_id" in problem):
            return problem  # such as "failed" with a code beside it
        code = _code(problem)
        if answer.ok and code is None:
            return answer.fields()
        status, known = answer.status, code is not None and 100_000 <= code <= 999_999
        # What stands before a server has error codes too, but not such ones: Cloudflare's are the HTTP status.
        own = known and any(
            problem.get(key) and isinstance(problem[key], str) for key in ("error_message", "message")
        )
        if answer.ok:
            # With an id beside it nobody can tell whether it was taken.
            own = known and not (answer.submitted and "request_id" in problem)
        if code is not None and (answer.ok or (own and status == 400)):
            status = _status(code)
        if not own and not answer.submitted and status in (404, 405, 410):
            # Not its API speaks, but something in front of it: the job may be there yet.
            raise RemoteUnavailable("fault", f"{self.name} cannot be found at its address ({status})")
        words = next(
            (problem[key] for key in ("error_message", "message", "error", "detail") if problem.get(key)), ""
        )
        error = trouble_of(
            msgspec.structs.replace(answer, status=status),
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
        return tuple(self._file(url) for url in found[:MOST_FILES])

    def _file(self, url: str) -> RemoteFile:
        try:
            whole = urljoin(self.origin, url)
        except ValueError:
            text = f"{self.name} gave an address of its output that cannot be read."
            raise RemoteRefused("remote_failed", text, billed=True) from None
        own = self._http.own(whole)
        return RemoteFile(own or whole, keyed=own is not None)

    def _address(self, url: Any) -> str:
        """``url`` where it may stand in a handle; else "", and it is built from the id."""
        own = self._http.own(url) or ""
        return own if len(own) <= _LONGEST_ADDRESS and "?" not in own else ""

    def _progress(self, fields: dict[str, Any]) -> Progress:
        """How far it is there: the place in the other queue, or what its engine says."""
        if fields.get("status") == "in_queue":
            place = fields.get("queue_position")
            known = type(place) is int and 0 < place < _LONGEST_ETA
            return Progress(stage=f"queued, place {place}" if known else "queued")
        fraction, eta, stage = fields.get("progress"), fields.get("eta"), fields.get("stage")
        return Progress(
            fraction=float(min(max(fraction, 0.0), 1.0)) if isinstance(fraction, int | float) else 0.0,
            stage=self._http.clean(stage)[:_LONGEST_STAGE] if isinstance(stage, str) else "",
            eta=float(eta) if isinstance(eta, int | float) and 0 <= eta <= _LONGEST_ETA else None,
        )

    def _is_priced(self, model: Model) -> bool:
        table = remote_table(model, self.kind)
        return table is not None and table.price_usd is not None

    def _cost(self, fields: dict[str, Any]) -> float | None:
        """In USD; None where the remote does not say, or says what cannot be."""
        cost = fields.get("cost")
        if isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost <= MOST_USD:
            return float(cost)
        if cost is not None:
            log.event("remote cost not believed", remote=self.name, cost=self._http.clean(cost)[:60])
        return None

    def _failed(self, fields: dict[str, Any], job: RemoteJob) -> RemoteRefused:
        """The error of a failed result: a Rushes has ``code``, ``message`` and ``field``, others anything, or
        ``error_code`` and ``error_message`` beside the state.
        """
        error = fields.get("error")
        error = error[0] if isinstance(error, list) and error else error
        given = error if isinstance(error, dict) else {}
        code = str(next((given[key] for key in ("code", "error_code", "errorCode") if given.get(key)), ""))
        code = code or str(fields.get("error_code") or "")
        keys = ("message", "error_message", "error")
        words = next((given[key] for key in keys if isinstance(given.get(key), str)), error)
        words = words or fields.get("error_message") or fields.get("message") or "it gave no reason"
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
            billed=self._cost(fields) != 0.0,
        )


def _path(task: _Task, verb: str) -> str:
    return f"v1/requests/{quote(task.id, safe='')}/{verb}"


def at_runcomfy(base_url: str) -> bool:
    """Whether this is RunComfy itself, which wants files as addresses, and not another server of its wire."""
    return f".{urlsplit(base_url).hostname}".endswith(f".{VENDOR_DOMAIN}")


def _code(fields: dict[str, Any]) -> int | None:
    """The code of an error; 0 where it is none of this wire, None where there is no error."""
    code = fields.get("error_code")
    if isinstance(code, str) and code.isascii() and code.isdecimal():
        code = int(code) if len(code) < 10 else 1
    return (code if type(code) is int else 0) if code else None


def _status(code: int) -> int:
    """The HTTP status that a code stands for: 400 where it says nothing."""
    status = _STATUS.get(code, code // 1000)
    return status if 400 <= status < 600 else 400


def _urls(value: Any, depth: int = 3) -> list[str]:
    """The addresses in a value of ``output``, each once: a text, a list of them, or objects with a ``url``."""
    found: dict[str, None] = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list) and depth:
            found |= dict.fromkeys(_urls(item, depth - 1))
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
