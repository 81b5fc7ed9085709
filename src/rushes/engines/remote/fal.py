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
from rushes.engines.remote.answers import (
    bar_in,
    files_in,
    input_values,
    own_field,
    remote_files,
)
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
from rushes.engines.remote.http import Answer, id_of, retry_after, trouble_of
from rushes.engines.remote.inputs import data_uri
from rushes.engines.remote.keyed import KeyedEngine
from rushes.requests.record import Progress

DEFAULTS: Final = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image_size/width": "width",
    "image_size/height": "height",
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
"""fal's names of our roles, for manifests without a mapping. The size has a usual name for pictures alone."""
_NAMESPACES: Final = frozenset({"workflows", "comfy"})
"""First segments that stand before an owner."""
_OF_PICTURES: Final = "image_size/"
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
_NOT_OF_THE_JOB: Final = frozenset({401, 402, 403, 408, 409, 425, 429})
"""Answers to who asks for a result, and not about it."""
_BAD_INPUT: Final = frozenset({400, 413, 415, 422})
_MOST_PLACES: Final = 1_000_000
_LOCKED: Final = re.compile(r"balance|billing|top.?up|credit", re.IGNORECASE)
_UNFINISHED: Final = re.compile(r"still in progress|not (?:yet )?(?:completed|finished|ready)", re.IGNORECASE)
_UNKNOWN_JOB: Final = re.compile(r"request\b.*\bnot found|no such request|expired", re.IGNORECASE)


class _Handle(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    app: str
    """Owner and app, with the namespace before them where there is one."""
    status: str = ""
    """This address and the next two are kept where they are others than fal's documents describe."""
    response: str = ""
    cancel: str = ""


class FalEngine(KeyedEngine):
    """One account at fal, or another server that speaks its queue's wire. See
    :class:`rushes.engines.remote.base.RemoteEngine`. ``seconds`` bound every call.
    """

    kind = "fal"
    poll_seconds = 1.0
    key_scheme = "Key"

    async def submit(self, job: RemoteJob) -> Accepted:
        table = self._table(job.model)
        app = _app_of(table.model)
        if app is None:
            raise RemoteUnavailable(
                "model",
                f"{job.model.id}: engines.fal.model = {table.model!r} is no OWNER/APP or OWNER/APP/PATH",
            )
        body = await input_values(
            table, job, _defaults(job.model), _addressed if _by_address(table) else data_uri
        )
        answer = await self._http.submit("POST", quote(table.model.strip("/"), safe="/:@"), json=body)
        if not answer.ok:
            raise self._not_taken(answer, table, job.model)
        said = answer.fields()
        request_id = id_of(said.get("request_id"))
        if request_id is None:
            raise SubmitUnknown(f"{self.name} answers the request without an id of it")
        plain = _Handle(request_id, app)
        urls = {
            part: address
            for part in ("status", "response", "cancel")
            if (address := self._http.own(said.get(f"{part}_url"))) and address != self._address(plain, part)
        }
        return Accepted(msgspec.json.encode(_Handle(request_id, app, **urls)).decode())

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        known = self._read(handle)
        answer = await self._http.ask("GET", f"{self._address(known, 'status')}?logs=1", large=True)
        if not answer.ok:
            raise self._troubled(answer)
        said = answer.fields()
        state = said.get("status")
        if state == "COMPLETED" or _error_of(said):
            return await self._result(known, said, job)
        pause = retry_after(answer.headers)
        if state == "IN_PROGRESS":
            return Underway(bar_in(_log_text(said.get("logs")), f"running at {self.name}"), pause)
        position = said.get("queue_position")
        known_place = type(position) is int and 0 < position < _MOST_PLACES
        before = f", {position} before it" if known_place else ""
        return Underway(Progress(stage=f"queued at {self.name}{before}"), pause)

    async def cancel(self, handle: str) -> None:
        with contextlib.suppress(Exception):
            await self._http.ask("PUT", self._address(self._read(handle), "cancel"))

    # -- addresses --------------------------------------------------------------------------------------------
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
        answer = await self._http.ask("GET", self._address(known, "response"), large=True)
        problem = {} if answer.ok else answer.problem()
        if _error_of(said):
            raise self._failed(answer, said, job)
        unfinished = answer.status == 400 and _UNFINISHED.search(_words_of(problem))
        if answer.status == 202 or unfinished:
            return Underway(
                Progress(fraction=1.0, stage=f"running at {self.name}"), retry_after(answer.headers)
            )
        if not answer.ok:
            # What the job came to is there, and paid for: only the model's own words say that it failed.
            raise self._failed(answer, said, job) if _decides(answer, problem) else self._later(answer)
        value = self._shown(answer.json())
        found = files_in(value, job.model.output)
        if not found:
            text = f"{self.name} says that the job succeeded, and its answer names no file."
            raise RemoteRefused("remote_failed", text, billed=True)
        return Finished(await remote_files(found, job.folder, lambda url: self._http.own(url) is not None))

    def _shown(self, value: Any) -> Any:
        """A result without the pictures that its safety checker has found unsafe: fal blackens those, and charges
        for them. Raises RemoteRefused ``content_refused`` where nothing is left.
        """
        flags = value.get("has_nsfw_concepts") if isinstance(value, dict) else None
        if flags is True or (isinstance(flags, list) and flags and all(flag is True for flag in flags)):
            text = f"{self.name} held back what was generated: its safety checker took it for unsafe content."
            raise RemoteRefused("content_refused", text, billed=True)
        pictures = value.get("images") if isinstance(flags, list) else None
        if isinstance(flags, list) and isinstance(pictures, list) and len(flags) == len(pictures):
            left = [one for one, flag in zip(pictures, flags, strict=True) if flag is not True]
            return value | {"images": left}
        return value

    def _failed(self, answer: Answer, said: dict[str, Any], job: RemoteJob) -> RemoteRefused:
        """Why a job has failed. The answer of its result says it best, unless that is about who asks for it."""
        problem = answer.problem()
        about_us = answer.ok or (answer.status in _NOT_OF_THE_JOB and not _decides(answer, problem))
        problem = {} if about_us else problem
        first = _first(problem)
        words = self._http.clean(_words_of(problem) or _error_of(said) or "it gives no reason")
        kind = _text(first.get("type")) or _text(said.get("error_type"))
        kind = kind or ("" if about_us else _error_type(answer, problem))
        hint = "" if about_us else answer.headers.get("x-fal-retryable", "").lower()
        if kind == _MODERATION:
            text = f"{self.name} refuses the content: {words}"
            field = self._field(first, job.model)
            return RemoteRefused("content_refused", text, field=field, billed=True)
        retryable = hint == "true" or (hint != "false" and kind in _TRANSIENT)
        if problem and answer.status in _BAD_INPUT and not retryable and kind not in _TRANSIENT:
            return RemoteRefused(
                "remote_refused",
                f"{self.name} refuses the input: {_located(first)}{words}",
                field=self._field(first, job.model),
                billed=_worked(said),
            )
        free = kind in _TRANSIENT or answer.status >= 500
        return RemoteRefused(
            "remote_failed",
            f"The job failed at {self.name}{f' ({answer.status})' if problem else ''}: {words}",
            retryable=retryable,
            billed=_worked(said) or not free,
        )

    def _later(self, answer: Answer) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        """Why the result of a job that has ended is not to be had now."""
        problem = answer.problem()
        if answer.status in (404, 410) and not _UNKNOWN_JOB.search(_own_words(problem)):
            return answer.unreadable()
        return self._troubled(answer)

    # -- errors -----------------------------------------------------------------------------------------------
    def _troubled(self, answer: Answer) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        """What fal's own words make of an answer that is none of a model."""
        problem = answer.problem()
        words = self._http.clean(_words_of(problem))
        if answer.status in (404, 405, 410) and not answer.submitted and not _lost(answer, problem):
            return answer.unreadable()
        if answer.status == 403 and _LOCKED.search(words):
            return RemoteUnavailable("funds", f"the account at {self.name} is locked (403): {words}")
        if answer.status == 409:  # its own client tries that again, as it does a 429
            return RemoteUnavailable(
                "throttled",
                f"{self.name} asks to try again (409): {words}",
                retry_after=retry_after(answer.headers),
            )
        return trouble_of(answer, words, own_error=bool(_error_type(answer, problem)))

    def _not_taken(
        self, answer: Answer, table: RemoteTable, model: Model
    ) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        problem = answer.problem()
        first = _first(problem)
        if answer.status not in _BAD_INPUT or not problem:
            return self._troubled(answer)
        words = self._http.clean(_words_of(problem))
        field = self._field(first, model)
        if first.get("type") == _MODERATION:
            return RemoteRefused("content_refused", f"{self.name} refuses the content: {words}", field=field)
        text = f"{self.name} refuses the input: {_located(first)}{words}"
        return RemoteRefused("remote_refused", text, field=field)

    def _field(self, problem: dict[str, Any], model: Model) -> str | None:
        """The input of ours that ``problem`` speaks of; its ``loc`` is ``["body", "image_url"]``."""
        table = remote_table(model, self.kind)
        return own_field(table, model, _defaults(model), _place(problem)) if table is not None else None


def _defaults(model: Model) -> dict[str, str]:
    """:data:`DEFAULTS` of a model's kind."""
    pictures = model.output == "image"
    return {name: role for name, role in DEFAULTS.items() if pictures or not name.startswith(_OF_PICTURES)}


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
    lines = [line.get("message") for line in logs if isinstance(line, dict)] if isinstance(logs, list) else []
    return "\n".join(line for line in lines if isinstance(line, str))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _error_of(said: dict[str, Any]) -> Any:
    """What a status says of a job that has failed; nothing where it has not."""
    state = _text(said.get("status"))
    return said.get("error") or (state if state in _ENDED_BADLY else None)


def _error_type(answer: Answer, problem: dict[str, Any]) -> str:
    """The queue's name of an error, in the body or the head, which no proxy writes. That the head has the id of a
    request does not say as much: its own client takes it for a sign that the request has got there.
    """
    return _text(problem.get("error_type")) or answer.headers.get("x-fal-error-type", "")


def _decides(answer: Answer, problem: dict[str, Any]) -> bool:
    """Whether the answer of a result is the model's own refusal, and not trouble on the way to it."""
    if not 400 <= answer.status < 500:
        return False
    listed = isinstance(problem.get("detail"), list) and answer.status not in _NOT_OF_THE_JOB
    return listed or _MODERATION in (_first(problem).get("type"), _error_type(answer, problem))


def _own_words(problem: dict[str, Any]) -> str:
    """The words of an error of fal's. Proxies that speak of problems in JSON give them a ``title``."""
    return "" if "title" in problem else _text(problem.get("detail"))


def _lost(answer: Answer, problem: dict[str, Any]) -> bool:
    """Whether fal itself says that there is no such job."""
    words = _own_words(problem)
    own = "x-fal-request-id" in answer.headers or _error_type(answer, problem)
    return bool(words) and answer.status != 405 and bool(own or _UNKNOWN_JOB.search(words))


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
