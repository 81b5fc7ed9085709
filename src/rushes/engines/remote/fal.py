"""The engine ``fal``: models behind fal's queue.

Submit, status, result and cancel are four addresses; the last three come with the submit's answer and name only the
owner and the app, not the path below it. A job that failed reads COMPLETED: why is in the answer of its result, with
the status that the model itself answered. The queue tries jobs again by itself, so that nothing here does.

Sources: fal's "Queue API reference", "Model errors" (``detail`` as a list of ``loc``, ``msg``, ``type``; the header
X-Fal-Retryable), "Request error types" (``detail`` as text, ``error_type``, the header X-Fal-Error-Type), its FAQ
(5xx are never charged, a 422 may be where a runner had worked), and fal_client 1.0.3. That the account has no money
left is said with 403 and "User is locked. Reason: Exhausted balance." What a job cost is not said in money: the
header X-Fal-Billable-Units counts units whose price is elsewhere.
"""

import contextlib
import re
from typing import Any, Final
from urllib.parse import quote

import msgspec

from rushes.catalog.model import Model
from rushes.catalog.remotes import RemoteTable, remote_table
from rushes.engines.remote.answers import bar_in, files_in, input_values, own_field, remote_files
from rushes.engines.remote.base import (
    Accepted,
    Finished,
    RemoteInput,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
    Underway,
)
from rushes.engines.remote.configured import RemoteConfig
from rushes.engines.remote.http import Answer, RemoteHTTP, retry_after, trouble_of
from rushes.engines.remote.inputs import data_uri
from rushes.requests.record import Progress

DEFAULTS: Final = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image_url": "start_image",
    "end_image_url": "end_image",
    "video_url": "source_video",
    "num_frames": "frames",
    "frames_per_second": "fps",
    "seed": "seed",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "shift": "shift",
}
"""fal's names of our roles, for manifests without a mapping. Sizes have no usual name there."""
_NAMESPACES: Final = frozenset({"workflows", "comfy"})
"""First segments that stand before an owner."""
_MODERATION: Final = "content_policy_violation"
_ENDED_BADLY: Final = frozenset({"FAILED", "ERROR", "CANCELED", "CANCELLED"})
"""No states of fal's, but what servers say that speak its wire."""
_TRANSIENT: Final = frozenset(
    {
        "startup_timeout",
        "runner_scheduling_failure",
        "runner_connection_timeout",
        "runner_disconnected",
        "runner_connection_refused",
        "runner_connection_error",
        "runner_incomplete_response",
        "internal_error",
        "downstream_service_unavailable",
    }
)
"""Errors of the platform and not of the model or its input: the same request may do well another time."""
_LOCKED: Final = re.compile(r"balance|billing|top.?up|credit", re.IGNORECASE)
_UNFINISHED: Final = re.compile(r"still in progress|not (?:yet )?(?:completed|finished|ready)", re.IGNORECASE)
_UNKNOWN_JOB: Final = re.compile(r"request\b.*\bnot found|no such request|expired", re.IGNORECASE)


class _Handle(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    app: str
    """Owner and app, with the namespace before them where there is one."""
    status: str = ""
    response: str = ""
    cancel: str = ""


class FalEngine:
    """One account at fal, or another server that speaks its queue's wire. See
    :class:`rushes.engines.remote.base.RemoteEngine`. ``seconds`` bound every call.
    """

    kind: str = "fal"
    poll_seconds: float = 1.0

    def __init__(self, config: RemoteConfig, *, seconds: float = 60.0) -> None:
        self.name = config.name
        self._key = config.key
        self._http = RemoteHTTP(config.name, config.base_url, self.headers(), seconds)
        self.origin = self._http.origin

    def serves(self, model: Model) -> bool:
        return remote_table(model, self.kind) is not None

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Key {self._key.value}"} if self._key is not None else {}

    async def submit(self, job: RemoteJob) -> Accepted:
        table = self._table(job.model)
        app = _app_of(table.model)
        if app is None:
            raise RemoteUnavailable(
                "model",
                f"{job.model.id}: engines.fal.model = {table.model!r} is no OWNER/APP or OWNER/APP/PATH",
            )
        body = await input_values(table, job, DEFAULTS, _addressed if _by_address(table) else data_uri)
        answer = await self._http.submit("POST", quote(table.model.strip("/"), safe="/:@"), json=body)
        if not answer.ok:
            raise self._not_taken(answer, table, job.model)
        said = answer.fields()
        request_id = said.get("request_id")
        if not isinstance(request_id, str) or not request_id:
            raise SubmitUnknown(f"{self.name} answers the request without an id of it")
        urls = {
            part: self._http.own(said.get(f"{part}_url")) or "" for part in ("status", "response", "cancel")
        }
        return Accepted(msgspec.json.encode(_Handle(request_id, app, **urls)).decode())

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        known = self._read(handle)
        answer = await self._http.ask("GET", self._address(known, "status") + "?logs=1")
        if not answer.ok:
            raise self._troubled(answer)
        said = answer.fields()
        state = said.get("status")
        if state == "COMPLETED" or said.get("error") or state in _ENDED_BADLY:
            return await self._result(known, said, job)
        pause = retry_after(answer.headers)
        if state == "IN_PROGRESS":
            return Underway(bar_in(_log_text(said.get("logs")), f"running at {self.name}"), pause)
        position = said.get("queue_position")
        before = f", {position} before it" if isinstance(position, int) and position > 0 else ""
        return Underway(Progress(stage=f"queued at {self.name}{before}"), pause)

    async def cancel(self, handle: str) -> None:
        with contextlib.suppress(Exception):
            await self._http.ask("PUT", self._address(self._read(handle), "cancel"))

    async def close(self) -> None:
        await self._http.close()

    # -- addresses --------------------------------------------------------------------------------------------
    def _table(self, model: Model) -> RemoteTable:
        table = remote_table(model, self.kind)
        if table is None:
            raise RemoteUnavailable("model", f"the manifest of {model.id} does not say how {self.kind} runs it")
        return table

    def _read(self, handle: str) -> _Handle:
        try:
            return msgspec.json.decode(handle, type=_Handle)
        except msgspec.DecodeError:
            raise RemoteRefused(
                "remote_lost", f"What was kept of the job at {self.name} cannot be read.", billed=True
            ) from None

    def _address(self, known: _Handle, part: str) -> str:
        """The address that fal gave, where our key may go there; else the one that its documents describe."""
        if given := self._http.own(getattr(known, part)):
            return given
        built = f"{self._http.base_url}/{quote(known.app, safe='/:@')}/requests/{quote(known.id, safe='')}"
        return built if part == "response" else f"{built}/{part}"

    # -- results ----------------------------------------------------------------------------------------------
    async def _result(self, known: _Handle, said: dict[str, Any], job: RemoteJob) -> Underway | Finished:
        answer = await self._http.ask("GET", self._address(known, "response"))
        if answer.status == 202:
            return Underway(
                Progress(fraction=1.0, stage=f"running at {self.name}"), retry_after(answer.headers)
            )
        if not answer.ok:
            if answer.status == 400 and _UNFINISHED.search(_words_of(answer.problem())):
                return Underway(Progress(fraction=1.0, stage=f"running at {self.name}"))
            raise self._failed(answer, said, job)
        if (problem := said.get("error")) or said.get("status") in _ENDED_BADLY:
            words = self._http.clean(problem or said["status"])
            kind = said.get("error_type")
            raise self._refusal(
                "remote_failed", f"The job failed at {self.name}: {words}", retryable=kind in _TRANSIENT
            )
        value = answer.json()
        found = files_in(value, job.model.output)
        flags = value.get("has_nsfw_concepts") if isinstance(value, dict) else None
        if isinstance(flags, list) and flags and len(flags) == len(found):
            # fal blackens what its safety checker finds, and charges for it: such a picture is no result.
            found = [one for one, flagged in zip(found, flags, strict=True) if flagged is not True]
            if not found:
                text = (
                    f"{self.name} held back what was generated: its safety checker took it for unsafe content."
                )
                raise self._refusal("content_refused", text, billed=True)
        if not found:
            text = f"{self.name} says that the job succeeded, and its answer names no file."
            raise self._refusal("remote_failed", text, billed=True)
        return Finished(await remote_files(found, job.folder, lambda url: self._http.own(url) is not None))

    def _failed(
        self, answer: Answer, said: dict[str, Any], job: RemoteJob
    ) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        """Why a job that has ended has no result, or why that is not to be had now."""
        problem = answer.problem()
        first = _first(problem)
        words = self._http.clean(_words_of(problem) or said.get("error") or "")
        kind = (
            first.get("type")
            or problem.get("error_type")
            or answer.headers.get("x-fal-error-type")
            or said.get("error_type")
        )
        hint = answer.headers.get("x-fal-retryable", "").lower()
        of_the_job = bool(kind or hint or said.get("error"))
        if answer.status in (401, 402, 403, 408, 429) or answer.status >= 500 or answer.status < 400:
            if not of_the_job:
                return self._troubled(answer)
        elif answer.status in (404, 410) and not said.get("error") and _UNKNOWN_JOB.search(words):
            return trouble_of(answer, words)
        retryable = hint == "true" or (hint != "false" and kind in _TRANSIENT)
        if kind == _MODERATION:
            text = f"{self.name} refuses the content: {words}"
            return self._refusal("content_refused", text, field=self._field(first, job.model), billed=True)
        if answer.status in (400, 413, 415, 422) and not retryable and kind not in _TRANSIENT:
            return self._refusal(
                "remote_refused",
                f"{self.name} refuses the input: {_located(first)}{words}",
                field=self._field(first, job.model),
                billed=_worked(said),
            )
        text = f"The job failed at {self.name} ({answer.status}){f': {words}' if words else ''}"
        return self._refusal("remote_failed", text, retryable=retryable, billed=answer.status < 500)

    # -- errors -----------------------------------------------------------------------------------------------
    def _troubled(self, answer: Answer) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        """What fal's own words make of an answer that is none of a model."""
        problem = answer.problem()
        words = self._http.clean(_words_of(problem))
        if answer.status == 403 and _LOCKED.search(words):
            return RemoteUnavailable("funds", f"the account at {self.name} is locked (403): {words}")
        if answer.status == 409:  # its own client tries that again, as it does a 429
            return RemoteUnavailable(
                "throttled",
                f"{self.name} asks to try again (409): {words}",
                retry_after=retry_after(answer.headers),
            )
        own = bool(problem.get("detail") or problem.get("error_type"))
        return trouble_of(answer, words, own_error=own)

    def _not_taken(
        self, answer: Answer, table: RemoteTable, model: Model
    ) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        problem = answer.problem()
        first = _first(problem)
        if answer.status not in (400, 413, 415, 422) or not problem:
            return self._troubled(answer)
        words = self._http.clean(_words_of(problem))
        field = self._field(first, model)
        if first.get("type") == _MODERATION:
            return self._refusal("content_refused", f"{self.name} refuses the content: {words}", field=field)
        text = f"{self.name} refuses the input: {_located(first)}{words}"
        return self._refusal("remote_refused", text, field=field)

    def _field(self, problem: dict[str, Any], model: Model) -> str | None:
        """The input of ours that ``problem`` speaks of; its ``loc`` is ``["body", "image_url"]``."""
        table = remote_table(model, self.kind)
        return own_field(table, model, DEFAULTS, _place(problem)) if table is not None else None

    @staticmethod
    def _refusal(
        reason: str, text: str, *, field: str | None = None, retryable: bool = False, billed: bool = False
    ) -> RemoteRefused:
        return RemoteRefused(reason, text, field=field, retryable=retryable, billed=billed)


def _app_of(model: str) -> str | None:
    """Owner and app of ``fal-ai/wan/v2.2-a14b/image-to-video``, with the namespace that stands before them; None
    where there is no app.
    """
    parts = model.strip("/").split("/")
    length = 3 if parts[0] in _NAMESPACES else 2
    return "/".join(parts[:length]) if len(parts) >= length and all(parts) else None


def _by_address(table: RemoteTable) -> bool:
    return table.options.get("files") == "url"


async def _addressed(file: RemoteInput) -> str:
    """The user's own public address, where there was one."""
    return file.url or await data_uri(file)


def _log_text(logs: Any) -> str:
    lines = logs if isinstance(logs, list) else []
    return "\n".join(str(line.get("message", "")) for line in lines if isinstance(line, dict))


def _worked(said: dict[str, Any]) -> bool:
    """Whether a runner spent time on the job."""
    metrics = said.get("metrics")
    return isinstance(metrics, dict) and bool(metrics.get("inference_time"))


def _first(problem: dict[str, Any]) -> dict[str, Any]:
    """The first of a model's errors; empty where the answer lists none."""
    detail = problem.get("detail")
    first = detail[0] if isinstance(detail, list) and detail else None
    return first if isinstance(first, dict) else {}


def _words_of(problem: dict[str, Any]) -> str:
    first = _first(problem)
    detail = first.get("msg") if first else problem.get("detail")
    return detail if isinstance(detail, str) else ""


def _place(problem: dict[str, Any]) -> str | None:
    loc = problem.get("loc")
    names = [one for one in loc if isinstance(one, str) and one != "body"] if isinstance(loc, list) else []
    return names[0] if names else None


def _located(problem: dict[str, Any]) -> str:
    place = _place(problem)
    return f"{place}: " if place else ""
