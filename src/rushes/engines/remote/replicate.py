"""The engine ``replicate``: models behind Replicate's predictions.

A model that Replicate keeps running is asked by its name, any other by its version. Answers never wait for the
result (no ``Prefer: wait``): the prediction's id comes at once and is polled. Small input files go along as data
URIs; larger ones are uploaded first, as its documents ask for.

Sources: Replicate's HTTP reference ("Create a prediction", "Get a prediction", "Create a file"), "Prediction
lifecycle" (``aborted``: never began and is not charged), "Rate limits" (429 with ``retry_after`` in the body),
"Error codes", "Data retention" (outputs are removed after an hour: ``data_removed``), "Billing" (time at work is
charged), and replicate 1.0.7 (the progress bar in logs). Errors are problem details: ``title``, ``detail``,
``status``; that of a failed prediction is free text, in which E005 and the words of moderation are those of the
models. Nothing says what a prediction cost.
"""

import asyncio
import contextlib
import re
from typing import Any, Final
from urllib.parse import quote

import msgspec

from rushes.catalog.model import Model
from rushes.catalog.remotes import remote_table
from rushes.engines.remote.answers import (
    LONGEST_ADDRESS,
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
from rushes.engines.remote.http import LONGEST_PAUSE, Answer, id_of, retry_after, trouble_of
from rushes.engines.remote.inputs import data_uri
from rushes.engines.remote.keyed import KeyedEngine
from rushes.requests.record import Progress

DEFAULTS: Final = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image": "start_image",
    "last_image": "end_image",
    "video": "source_video",
    "width": "width",
    "height": "height",
    "num_frames": "frames",
    "frames_per_second": "fps",
    "seed": "seed",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
"""Replicate's names of our roles, for manifests without a mapping: models there name their inputs as they like."""
INLINE_BYTES: Final = 256 * 1024
"""Files up to this size go along as data URIs."""
_BAD_MODEL: Final = re.compile(r"invalid version|not permitted|version .*does not exist", re.IGNORECASE)
_MODERATION: Final = re.compile(
    r"\bE005\b|flagged as sensitive|\bNSFW\b|content (?:policy|moderation|filter)|moderat(?:ion|ed)\b"
    r"|safety (?:filter|checker|system)|sensitive content",
    re.IGNORECASE,
)
_INPUT: Final = re.compile(r"^\s*(?:input )?validation (?:error|failed)|^invalid input", re.IGNORECASE)
_TRANSIENT: Final = re.compile(
    r"\b(?:E6716|E8765|E9243)\b|prediction interrupted|please retry|director: unexpected error", re.IGNORECASE
)
"""Failures of the platform, by its error codes and words: the prediction did not start, or its machine went away."""
_OF_PROXIES: Final = frozenset({"type", "instance", "error_code", "cloudflare_error", "ray_id"})
"""Keys of the problem details that networks in front of an API write, and Replicate does not."""


class _Handle(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    get: str = ""
    """This address and the next are kept where they are others than Replicate's documents describe."""
    cancel: str = ""


class ReplicateEngine(KeyedEngine):
    """One account at Replicate, or another server that speaks its wire. See
    :class:`rushes.engines.remote.base.RemoteEngine`. ``seconds`` bound every call.
    """

    kind = "replicate"
    poll_seconds = 1.0

    async def submit(self, job: RemoteJob) -> Accepted:
        table = self._table(job.model)
        by_address = table.options.get("files") == "url"

        async def text(file: RemoteInput) -> str:
            return (file.url if by_address else None) or await self._text(file)

        body: dict[str, Any] = {"input": await input_values(table, job, DEFAULTS, text)}
        name, _, version = table.model.partition(":")
        path = f"v1/models/{quote(name, safe='/')}/predictions"
        if version:
            path, body = "v1/predictions", {"version": version} | body
        answer = await self._http.submit("POST", path, json=body, large=True)  # it comes with the whole input
        if not answer.ok:
            raise self._troubled(answer, job.model)
        said = answer.fields()
        prediction = id_of(said.get("id"))
        if prediction is None:
            raise SubmitUnknown(f"{self.name} answers the request without an id of it")
        plain, urls = _Handle(prediction), said.get("urls")
        given = urls if isinstance(urls, dict) else {}
        known = {
            part: address
            for part in ("get", "cancel")
            if (address := self._http.own(given.get(part))) and address != self._address(plain, part)
        }
        return Accepted(msgspec.json.encode(_Handle(prediction, **known)).decode())

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        answer = await self._http.ask("GET", self._address(self._read(handle), "get"), large=True)
        if not answer.ok:
            raise self._troubled(answer, job.model)
        said = answer.fields()
        match said.get("status"):
            case "succeeded":
                return await self._finished(said, job)
            case "failed":
                raise self._failed(said, job.model)
            case "canceled":
                raise RemoteRefused(
                    "remote_failed", f"The job was cancelled at {self.name}.", billed=_worked(said)
                )
            case "aborted":
                raise RemoteRefused(
                    "remote_failed", f"{self.name} gave the job up before it began.", retryable=True
                )
            case "processing":
                logs = said.get("logs")
                return Underway(
                    bar_in(logs if isinstance(logs, str) else "", f"running at {self.name}"),
                    retry_after(answer.headers),
                )
        return Underway(Progress(stage=f"starting at {self.name}"), retry_after(answer.headers))

    async def cancel(self, handle: str) -> None:
        with contextlib.suppress(Exception):
            await self._http.ask("POST", self._address(self._read(handle), "cancel"))

    # -- inputs -----------------------------------------------------------------------------------------------
    async def _text(self, file: RemoteInput) -> str:
        """What stands for a file: itself, or the address under which Replicate keeps it for this account."""
        size = (await asyncio.to_thread(file.path.stat)).st_size
        if size <= INLINE_BYTES:
            return await data_uri(file)
        content = await asyncio.to_thread(file.path.read_bytes)
        try:
            answer = await self._http.submit(
                "POST", "v1/files", files={"content": (file.path.name, content, file.content_type)}
            )
            said = answer.fields() if answer.ok else {}
        except SubmitUnknown as unknown:  # an upload is no job: it may be sent again
            raise RemoteUnavailable("unreachable", f"uploading an input file: {unknown.why}") from None
        if not answer.ok:
            raise self._not_uploaded(answer)
        urls = said.get("urls")
        address = urls.get("get") if isinstance(urls, dict) else None
        if not isinstance(address, str) or not 0 < len(address) <= LONGEST_ADDRESS:
            raise RemoteUnavailable("fault", f"{self.name} took an input file and gave no address of it")
        return address

    def _not_uploaded(self, answer: Answer) -> RemoteRefused | RemoteUnavailable:
        trouble = self._troubled(answer, None)
        if isinstance(trouble, SubmitUnknown):
            return RemoteUnavailable("fault", f"uploading an input file: {trouble.why}")
        if isinstance(trouble, RemoteUnavailable) and trouble.trouble == "model":
            return RemoteUnavailable("fault", f"{self.name} takes no input files ({answer.status})")
        return trouble

    # -- addresses --------------------------------------------------------------------------------------------
    def _read(self, handle: str) -> _Handle:
        try:
            return msgspec.json.decode(handle, type=_Handle)
        except msgspec.DecodeError:
            raise RemoteRefused(
                "remote_lost", f"What was kept of the job at {self.name} cannot be read.", billed=True
            ) from None

    def _address(self, known: _Handle, part: str) -> str:
        """The address that Replicate gave, where our key may go there; else the one that its documents describe."""
        if given := self._http.own(getattr(known, part)):
            return given
        built = f"{self._http.base_url}/v1/predictions/{quote(known.id, safe='')}"
        return built if part == "get" else f"{built}/{part}"

    # -- results ----------------------------------------------------------------------------------------------
    async def _finished(self, said: dict[str, Any], job: RemoteJob) -> Finished:
        found = files_in(said.get("output"), job.model.output)
        if not found and said.get("data_removed"):
            text = f"{self.name} has removed the outputs: it keeps them for an hour."
            raise RemoteRefused("remote_lost", text, billed=True)
        if not found:
            text = f"{self.name} says that the job succeeded, and its output names no file."
            raise RemoteRefused("remote_failed", text, billed=True)
        return Finished(await remote_files(found, job.folder, lambda url: self._http.own(url) is not None))

    def _failed(self, said: dict[str, Any], model: Model) -> RemoteRefused:
        raw = said.get("error")
        words = self._http.clean(raw) if raw else "it gives no reason"
        billed = _worked(said)
        if _MODERATION.search(words):
            # Of the input or of what was generated from it: that is not told apart.
            return RemoteRefused("content_refused", f"{self.name} refuses the content: {words}", billed=True)
        if _INPUT.search(words):
            field = self._field(_named(words), model)
            text = f"{self.name} refuses the input: {words}"
            return RemoteRefused("remote_refused", text, field=field, billed=billed)
        retryable = bool(_TRANSIENT.search(words))
        text = f"The job failed at {self.name}: {words}"
        return RemoteRefused("remote_failed", text, retryable=retryable, billed=billed)

    # -- errors -----------------------------------------------------------------------------------------------
    def _troubled(
        self, answer: Answer, model: Model | None
    ) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        """What Replicate's own words make of an answer that is no success."""
        problem = answer.problem()
        words = self._http.clean(_words_of(problem))
        if answer.submitted and answer.status in (400, 404, 422) and _BAD_MODEL.search(words):
            return RemoteUnavailable("model", f"{self.name} does not run this model ({answer.status}): {words}")
        if answer.submitted and answer.status in (400, 422) and problem:
            return self._refused(problem, words, model)
        own = _is_own(answer, problem)
        lost = own and answer.status != 405
        if answer.status in (404, 405, 410) and not answer.submitted and not lost:
            return answer.unreadable()
        # A fault of 500 says nothing of whether the prediction was made before it.
        trouble = trouble_of(answer, words, own_error=own and answer.status == 503)
        if isinstance(trouble, RemoteUnavailable) and trouble.trouble == "throttled":
            return RemoteUnavailable("throttled", trouble.why, retry_after=_pause(trouble, problem))
        return trouble

    def _refused(self, problem: dict[str, Any], words: str, model: Model | None) -> RemoteRefused:
        if _MODERATION.search(words):
            return RemoteRefused("content_refused", f"{self.name} refuses the content: {words}")
        invalid = problem.get("invalid_fields")
        first = invalid[0] if isinstance(invalid, list) and invalid else None
        named = str(first.get("field") or "") if isinstance(first, dict) else ""
        name = named.removeprefix("input").lstrip(".") or _named(words)
        field = self._field(name, model) if model is not None else None
        return RemoteRefused("remote_refused", f"{self.name} refuses the input: {words}", field=field)

    def _field(self, name: str | None, model: Model) -> str | None:
        """The input of ours that the model's input ``name`` was made from."""
        table = remote_table(model, self.kind)
        return own_field(table, model, DEFAULTS, name) if table is not None else None


def _worked(said: dict[str, Any]) -> bool:
    """Whether the prediction was at work for a time, which is charged; where it does not say for how long, whether it
    began.
    """
    metrics = said.get("metrics")
    return bool(metrics.get("predict_time") if isinstance(metrics, dict) else said.get("started_at"))


def _is_own(answer: Answer, problem: dict[str, Any]) -> bool:
    """Whether an error is of Replicate's API: ``detail`` and ``status``, and nothing that proxies add to those."""
    said = isinstance(problem.get("detail"), str) and problem.get("status") == answer.status
    return said and not _OF_PROXIES & problem.keys()


def _words_of(problem: dict[str, Any]) -> str:
    title, detail = problem.get("title"), problem.get("detail")
    parts = [part.strip() for part in (title, detail) if isinstance(part, str) and part.strip()]
    return ": ".join(parts)


def _named(words: str) -> str | None:
    """The field in ``- input.num_frames: Must be less than or equal to 121``, or ``- input: prompt is required``."""
    found = re.search(r"\binput\.(\w+)", words) or re.search(r"\binput: (\w+) is required", words)
    return found[1] if found else None


def _pause(trouble: RemoteUnavailable, problem: dict[str, Any]) -> float | None:
    """The header's pause, else that of the body: ``"retry_after": 5``, or "resets in ~30s" in its words."""
    if trouble.retry_after is not None:
        return trouble.retry_after
    said = problem.get("retry_after")
    if isinstance(said, bool) or not isinstance(said, int | float):
        found = re.search(r"resets in ~?(\d{1,9}(?:\.\d{1,9})?)\s*s", _words_of(problem))
        said = float(found[1]) if found else None
    return float(min(max(said, 0.0), LONGEST_PAUSE)) if said is not None else None
