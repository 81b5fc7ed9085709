"""The engine ``dashscope``: Alibaba Cloud Model Studio, where the closed Wan models live.

A task is created with one call and asked for with others; it is known there for 24 hours, and so are the addresses of
what it made. Sources: Model Studio's API references "Wan text-to-image V2", "Wan image-to-video", "Wan first and last
frame to video", "Wan text-to-video", its pages "Manage asynchronous tasks" and "Error codes", and the code of the
`dashscope` package for Python. Prices are by image or by second; answers tell of neither, and failed tasks are free.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec

from rushes.catalog.model import Model
from rushes.catalog.remotes import RemoteTable, remote_values
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
from rushes.engines.remote.http import Answer, between, id_of, retry_after, trouble_of
from rushes.engines.remote.inputs import data_uri, picture_uri, texts, unsent
from rushes.engines.remote.keyed import KeyedEngine
from rushes.requests.record import Progress

_IMAGE_PATH: Final = "api/v1/services/aigc/text2image/image-synthesis"
_VIDEO_PATH: Final = "api/v1/services/aigc/video-generation/video-synthesis"
_KEYFRAME_PATH: Final = "api/v1/services/aigc/image2video/video-synthesis"
_PARAMETERS: Final = "parameters"
"""The table in the manifest's mapping that is about the request's ``parameters``; all else there is its ``input``."""
_SEEDS: Final = 2**31
"""Seeds are below this."""
_PICTURE_SIDE: Final = 2000
_PICTURE_BYTES: Final = 7_000_000
"""Input pictures have 360 to 2000 pixels a side and 10 MB at most, which base64 must not take them over."""

_MODERATION: Final = ("datainspection", "data_inspection", "ipinfringement", "contentfilter", "faqruleblocked")
_NOT_MODERATION: Final = "InvalidParameter.DataInspection"
"""The one of these codes that says that a file could not be read."""
_THROTTLING: Final = ("Throttling", "LimitRequests", "limit_requests", "insufficient_quota", "RateLimit")
_FUNDS: Final = ("Arrearage", "AllocationQuota.FreeTierOnly", "PrepaidBillOverdue", "PostpaidBillOverdue")
_UNKNOWN_MODEL: Final = ("ModelNotFound", "model_not_found", "Model.AccessDenied", "AccessDenied.Unpurchased")
_INPUT: Final = ("Invalid", "BadRequest", "UnsupportedOperation", "DataSizeLimit")
_OWN_FAULTS: Final = ("InternalError", "SystemError", "ServiceUnavailable", "ModelServing", "ModelUnavailable")
_TIMEOUTS: Final = ("InternalError.Timeout", "RequestTimeOut", "ResponseTimeout")
_STATUS_OF: Final[Sequence[tuple[tuple[str, ...], int]]] = (
    (("InvalidApiKey", "AccessDenied"), 401),
    (_INPUT, 400),
    (_OWN_FAULTS, 500),
)
"""What an error that comes with the status 200 should have come with."""
_MOST_FILES: Final = 16
"""Addresses of one task that are looked at. One picture is asked for."""


class Limits(NamedTuple):
    """The sizes of pictures that a model makes."""

    pixels: tuple[int, int]
    sides: tuple[int, int]
    ratio: float
    """The longer side over the shorter one, at most."""


_ANY_SIDE: Final = (16, 16384)
_OF_WAN_2_5: Final = Limits((1280 * 1280, 1440 * 1440), _ANY_SIDE, 4.0)
"""The page has said "768*768 to 1440*1440" and says "1280*1280 to 1440*1440" now: what is in both is taken always."""
_OF_OLDER_WAN: Final = Limits((512 * 512, 1440 * 1440), (512, 1440), 1440 / 512)
_STEP: Final = 16
"""All sizes that the pages recommend are multiples of this."""

_TIERS: Final[Mapping[str, Sequence[tuple[int, int]]]] = {
    "480P": ((832, 480), (480, 832), (624, 624)),
    "720P": ((1280, 720), (720, 1280), (960, 960), (1088, 832), (832, 1088)),
    "1080P": ((1920, 1080), (1080, 1920), (1440, 1440), (1632, 1248), (1248, 1632)),
}
"""The sizes of videos from text; videos from pictures take the tier alone and the picture's ratio."""
_TIERS_OF: Final[Mapping[str, Sequence[str]]] = {
    "wan2.6-i2v": ("720P", "1080P"),
    "wan2.6-t2v": ("720P", "1080P"),
    "wan2.2-i2v-flash": ("480P", "720P"),
    "wan2.2-i2v-plus": ("480P", "1080P"),
    "wan2.2-t2v-plus": ("480P", "1080P"),
    "wan2.1-i2v-turbo": ("480P", "720P"),
    "wan2.1-i2v-plus": ("720P",),
    "wan2.1-kf2v-plus": ("720P",),
    "wan2.1-t2v-turbo": ("480P", "720P"),
    "wan2.1-t2v-plus": ("720P",),
}
_DURATIONS: Final[Mapping[str, Sequence[int]]] = {"wan2.5-": (5, 10), "wan2.6-": (5, 10, 15)}
"""Seconds. Older models make 5 and are not told."""


class DashScopeEngine(KeyedEngine):
    """See :class:`rushes.engines.remote.base.RemoteEngine`. ``seconds`` bound each call."""

    kind = "dashscope"
    poll_seconds = 3.0
    """Twenty questions a second are answered to each account; a picture takes a minute or two."""

    def _base_url(self, config: RemoteConfig) -> str:
        return config.base_url.rstrip("/").removesuffix("/api/v1")  # its own clients have it in their base

    async def submit(self, job: RemoteJob) -> Accepted:
        table = self._table(job.model)
        given, parameters = await self._input(table, job), self._parameters(table, job)
        mapped = given.pop(_PARAMETERS, {})
        parameters |= mapped if isinstance(mapped, dict) else {}
        if job.model.output == "image":
            parameters["n"] = 1  # each one is paid for
        body = {"model": table.model, "input": given, "parameters": parameters}
        headers = {"X-DashScope-Async": "enable"}
        answer = await self._http.submit("POST", _path(table, job.model), json=body, headers=headers)
        if not answer.ok:
            raise self._refused(answer)
        said = answer.fields()
        output = said.get("output")
        task = output.get("task_id") if isinstance(output, dict) else None
        if task is None and said.get("code"):
            raise self._refused(answer)
        if (handle := id_of(task)) is None:
            raise answer.unreadable()
        return Accepted(handle)

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        answer = await self._http.ask("GET", f"api/v1/tasks/{quote(handle, safe='')}")
        if not answer.ok:
            raise self._unanswered(answer)
        output = answer.fields().get("output")
        if not isinstance(output, dict):
            raise answer.unreadable()
        match output.get("task_status"):
            case "SUCCEEDED":
                return self._finished(output, job)
            case "FAILED":
                raise self._failed(output)
            case "CANCELED":
                raise RemoteRefused("remote_failed", f"The task was cancelled at {self.name}.")
            case "UNKNOWN":
                raise RemoteRefused(
                    "remote_lost",
                    f"{self.name} does not know this task any more: it keeps them for 24 hours.",
                    billed=True,
                )
            case "PENDING":
                progress = Progress(stage="queued")
            case _:  # RUNNING, SUSPENDED, and what may come: nothing is decided
                progress = Progress(stage="generating")
        return Underway(progress, retry_after(answer.headers))

    async def cancel(self, handle: str) -> None:
        with contextlib.suppress(RemoteUnavailable):  # tasks that run cannot be cancelled there
            await self._http.ask("POST", f"api/v1/tasks/{quote(handle, safe='')}/cancel")

    # -- what is sent -----------------------------------------------------------------------------------------
    async def _input(self, table: RemoteTable, job: RemoteJob) -> dict[str, Any]:
        """What the mapping says, or what goes where without one. Raises RemoteRefused for a file that would be left
        out: what is made without it is not what was asked for, and is paid for.
        """
        if table.input:
            found = await texts(job, _text)
            given = remote_values(table, job.input, job.roles, found)
            self._check_sent(table, job, unsent(found, given))
            return given
        fields = {"start_image": "img_url"} if "i2v" in table.model else {}
        if "kf2v" in table.model:
            fields = {"start_image": "first_frame_url", "end_image": "last_frame_url"}
        places: dict[str, str] = {}
        for name, role in table.file_fields.items():
            if role in fields and name in job.files:
                places.setdefault(fields[role], name)
        self._check_sent(table, job, (name for name in job.files if name not in places.values()))
        given = {name: job.roles[name] for name in ("prompt", "negative_prompt") if job.roles.get(name)}
        return given | {field: await _text(job.files[name]) for field, name in places.items()}

    def _check_sent(self, table: RemoteTable, job: RemoteJob, left_out: Iterable[str]) -> None:
        for name in left_out:
            role = table.file_fields.get(name, "file").replace("_", " ")
            without = "" if name in job.model.required else f"leave {name} out, or "
            raise RemoteRefused(
                "remote_refused",
                f"{table.model} at {self.name} is given no {role}: {without}map it to the field there that takes it, "
                f"in [engines.{self.kind}.input] of the manifest of {job.model.id}.",
                field=name,
            )

    def _parameters(self, table: RemoteTable, job: RemoteJob) -> dict[str, Any]:
        """The prompt goes as it is, and nothing is drawn over the picture, unless the manifest says so."""
        given: dict[str, Any] = {"prompt_extend": False, "watermark": False}
        name = table.model.replace("wanx", "wan")
        size = job.roles.get("resolution")
        if size is not None and job.model.output == "image":
            width, height = fitting(size, _limits(name))
            given["size"] = f"{width}*{height}"
        elif size is not None:
            given |= _video_size(name, size)
        seed = job.roles.get("seed")
        if isinstance(seed, int) and seed >= 0:
            given["seed"] = seed % _SEEDS
        seconds = next((allowed for start, allowed in _DURATIONS.items() if name.startswith(start)), ())
        frames, fps = job.roles.get("frames"), job.roles.get("fps")
        if seconds and frames and fps and job.model.output == "video":
            given["duration"] = min(seconds, key=lambda allowed: abs(allowed - frames / fps))
        constant = table.options.get(_PARAMETERS)
        return given | (dict(constant) if isinstance(constant, Mapping) else {})

    # -- what comes back --------------------------------------------------------------------------------------
    def _finished(self, output: Mapping[str, Any], job: RemoteJob) -> Finished:
        results = output.get("results")
        entries = [one for one in results if isinstance(one, dict)] if isinstance(results, list) else []
        if isinstance(output.get("video_url"), str):
            entries.append({"url": output["video_url"]})
        addresses = [one["url"] for one in entries if isinstance(one.get("url"), str) and one["url"]][
            :_MOST_FILES
        ]
        if not addresses:
            # "Succeeded" means that one of several did, which is paid for; others have a code in place of an address.
            error = self._failed(next((one for one in entries if one.get("code")), output))
            error.billed = True
            raise error
        size = job.roles.get("resolution") if job.model.output == "image" else None
        wanted = (int(size[0]), int(size[1])) if size is not None else None
        return Finished(tuple(RemoteFile(url, size=wanted) for url in addresses))

    def _said(self, problem: Mapping[str, Any]) -> tuple[str, str]:
        """The code of an error, and what can be shown of it."""
        code = problem.get("code")
        code = code if isinstance(code, str) else ""
        message = self._http.clean(problem.get("message") or "no reason given")
        return code, f"{message} ({self._http.clean(code)})" if code else message

    def _failed(self, output: Mapping[str, Any]) -> RemoteRefused:
        """A task that ended without its output. Such tasks are not charged for."""
        code, words = self._said(output)
        if _moderated(code):
            return _offended(self.name, words)
        if code.startswith(_INPUT):
            return RemoteRefused("remote_refused", f"{self.name} refuses the input: {words}")
        passing = code.startswith((*_OWN_FAULTS, *_TIMEOUTS, *_THROTTLING, *_FUNDS))
        return RemoteRefused("remote_failed", f"{self.name} could not generate: {words}", retryable=passing)

    def _refused(self, answer: Answer) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        """Why a task was not created, by its code first: some come with a status that says something else."""
        if between(answer):
            return trouble_of(answer)
        problem = answer.problem()
        code, words = self._said(problem)
        if _moderated(code):
            return _offended(self.name, words)
        known = self._known_trouble(code, words, answer)
        if known is not None:
            return known
        if code.startswith(_TIMEOUTS) and (answer.ok or answer.status >= 500):
            return SubmitUnknown(f"{self.name} ran out of time over the request: {words}")
        if answer.ok:
            status = next((meant for start, meant in _STATUS_OF if code.startswith(start)), answer.status)
            answer = msgspec.structs.replace(answer, status=status)
        return trouble_of(answer, words if problem else "", own_error=bool(code))

    def _unanswered(self, answer: Answer) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
        problem = answer.problem()
        code, words = self._said(problem)
        if not code and answer.status in (404, 405, 410):  # a proxy's page, not a word on the task
            return RemoteUnavailable("fault", f"{self.name} answers with status {answer.status}")
        return self._known_trouble(code, words, answer) or trouble_of(answer, words if problem else "")

    def _known_trouble(self, code: str, words: str, answer: Answer) -> RemoteUnavailable | None:
        if code.startswith(_FUNDS):
            return RemoteUnavailable("funds", f"the account at {self.name} cannot pay: {words}")
        if code.startswith(_THROTTLING):
            pause = retry_after(answer.headers)
            return RemoteUnavailable(
                "throttled", f"{self.name} takes no more for now: {words}", retry_after=pause
            )
        if answer.submitted and (code.startswith(_UNKNOWN_MODEL) or words.startswith("Model not exist")):
            return RemoteUnavailable("model", f"{self.name} does not give us the model: {words}")
        return None


async def _text(file: RemoteInput) -> str:
    if file.content_type.startswith("image/"):
        return await picture_uri(file, longest=_PICTURE_SIDE, most_bytes=_PICTURE_BYTES)
    return await data_uri(file)


def _path(table: RemoteTable, model: Model) -> str:
    if model.output == "image":
        return _IMAGE_PATH
    return _KEYFRAME_PATH if "kf2v" in table.model else _VIDEO_PATH


def _moderated(code: str) -> bool:
    return code != _NOT_MODERATION and any(word in code.lower() for word in _MODERATION)


def _offended(name: str, words: str) -> RemoteRefused:
    return RemoteRefused(
        "content_refused",
        f"The moderation of {name} refuses the content: {words} Change the prompt or the files.",
    )


# -- sizes ------------------------------------------------------------------------------------------------
def _limits(name: str) -> Limits | None:
    if name.startswith("wan2.5-t2i"):
        return _OF_WAN_2_5
    return _OF_OLDER_WAN if name.startswith(("wan2.0-t2i", "wan2.1-t2i", "wan2.2-t2i")) else None


def fitting(size: tuple[int, int], limits: Limits | None) -> tuple[int, int]:
    """The size, in pixels, to ask for where a picture of ``size`` is wanted: the same one where it is within
    ``limits``, else one of the same ratio as near as they allow, larger rather than smaller.
    """
    width, height = size
    if limits is None or _within(size, limits):
        return width, height
    least, most = limits.pixels
    ratio = min(max(width / height, 1 / limits.ratio), limits.ratio)
    wanted = width * height
    root = math.sqrt(min(max(wanted, least), most) / ratio)
    rounded = math.floor if wanted > most else math.ceil
    sides = [
        min(max(rounded(side / _STEP) * _STEP, limits.sides[0]), limits.sides[1])
        for side in (root * ratio, root)
    ]
    # Rounding may have gone over the widest ratio: the shorter side can always grow by a step.
    shorter = sides.index(min(sides))
    while max(sides) / min(sides) > limits.ratio:
        sides[shorter] += _STEP
    return sides[0], sides[1]


def _within(size: tuple[int, int], limits: Limits) -> bool:
    return (
        limits.pixels[0] <= size[0] * size[1] <= limits.pixels[1]
        and limits.sides[0] <= min(size)
        and max(size) <= limits.sides[1]
        and max(size) / min(size) <= limits.ratio
    )


def _video_size(name: str, size: tuple[int, int]) -> dict[str, str]:
    """The parameter that says how large a video is, as near to ``size`` as there is one."""
    tiers = next((tiers for start, tiers in _TIERS_OF.items() if name.startswith(start)), tuple(_TIERS))
    pixels = size[0] * size[1]

    def distance(one: tuple[int, int]) -> float:
        ratio = math.log(one[0] / one[1] * size[1] / size[0])
        return abs(math.log(one[0] * one[1] / pixels)) + 2 * abs(ratio)

    if "t2v" in name:
        width, height = min((one for tier in tiers for one in _TIERS[tier]), key=distance)
        return {"size": f"{width}*{height}"}
    areas = {tier: _TIERS[tier][0][0] * _TIERS[tier][0][1] for tier in tiers}
    return {"resolution": min(tiers, key=lambda tier: abs(math.log(areas[tier] / pixels)))}
