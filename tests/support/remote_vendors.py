"""The remote engines side by side: how the stub, the engine and a job of each are made, and the words that its vendor
has for what all of them can say. Every job is a film that begins with a picture.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rushes.engines.remote.base import RemoteJob, Trouble
from rushes.engines.remote.configured import RemoteConfig, Secret
from rushes.engines.remote.dashscope import DashScopeEngine
from rushes.engines.remote.fal import FalEngine
from rushes.engines.remote.openai_video import OpenAIVideoEngine
from rushes.engines.remote.replicate import ReplicateEngine
from rushes.engines.remote.runcomfy import RunComfyEngine
from support import remote_fal, remote_replicate
from support.dashscope_jobs import frames_job
from support.remote_dashscope import DashScopeStub
from support.remote_driving import CLOUDFLARE, queue_film, queue_model
from support.remote_fal import FalStub, Outcome
from support.remote_openai import OpenAIStub, video_job
from support.remote_replicate import ReplicateStub
from support.remote_runcomfy import FLF, RunComfyStub, model, remote_job
from support.remote_stub import HTML, KEY, Fault, RemoteStub, running

GATEWAYS = (500, 502, 503, 504, 520, 524)
"""Statuses of what stands in front of an API, in its place."""


class Row(NamedTuple):
    """An answer, and what it means: the trouble, and the pause in seconds that it asks for."""

    trouble: Trouble
    fault: Fault
    pause: float | None = None


@dataclass(frozen=True)
class Vendor:
    kind: str
    name: str
    """Of the remote, as messages have it."""
    made: Callable[..., Any]
    """Its stub."""
    engine: Callable[..., Any]
    job: Callable[..., RemoteJob]
    """Takes a folder, and keys of the manifest's table."""
    shape: tuple[int, int, int]
    """Width, height and frames of the job's video."""
    submit: str
    polls: tuple[str, ...]
    """Of the calls of one poll of a job that has ended, in their order."""
    cancel: tuple[str, str]
    refused_key: Callable[[str], Fault]
    """What it answers to a key of which it says these words."""
    taken: Callable[[Any], Fault]
    """What it answers when it has taken a job and named it so."""
    fails: Callable[[Any, str], None]
    """Makes the stub's jobs fail with these words."""
    not_taken: tuple[Row, ...]
    """Answers to a submit that took nothing."""
    unreadable: tuple[Fault, ...]
    """Answers to a submit from which nobody knows whether it was taken."""
    unanswered: tuple[Row, ...]
    """Answers to a poll that say nothing of the job."""
    gone: tuple[Fault, ...]
    """Answers to a poll of a job that it does not know."""
    base: str = ""
    """What stands behind the stub's address in the configured one."""
    unknown: str = "nobody/nothing"
    """A model that it has not."""
    cancelled: tuple[str, bool] = ("remote_failed", False)
    """The reason with which a cancelled job ends, and whether it may have cost something."""
    signing: Mapping[str, Any] = field(default_factory=dict)
    """What the stub has to be told for outputs at signed addresses."""
    needs_table: bool = True
    """Whether only models whose manifest names it are served."""

    def connected(self, stub: RemoteStub, key: str | None = KEY, url: str | None = None) -> Any:
        config = RemoteConfig(
            self.name, self.kind, (url or stub.url) + self.base, Secret(key) if key is not None else None
        )
        return self.engine(config, seconds=10)


def fixtures(vendor: Vendor, **settings: Any) -> tuple[Any, Any, Any]:
    """The fixtures ``stub`` (with attributes as ``settings`` have them), ``engine`` and ``job`` of one vendor."""

    @pytest.fixture
    def stub() -> Iterator[RemoteStub]:
        with running(vendor.made()) as started:
            for name, value in settings.items():
                setattr(started, name, value)
            yield started

    @pytest.fixture
    async def engine(stub: RemoteStub) -> AsyncIterator[Any]:
        made = vendor.connected(stub)
        yield made
        await made.close()

    @pytest.fixture
    def job(tmp_path: Path) -> RemoteJob:
        return vendor.job(tmp_path)

    return stub, engine, job


# -- Model Studio ---------------------------------------------------------------------------------------------
def said(code: str, message: str = "these are its words") -> dict[str, str]:
    return {"request_id": "7574ee8f", "code": code, "message": message}


DASHSCOPE = Vendor(
    kind="dashscope",
    name="studio",
    made=DashScopeStub,
    engine=DashScopeEngine,
    job=frames_job,
    shape=(64, 48, 5),
    submit="synthesis$",
    polls=("/tasks/",),
    cancel=("POST", "/cancel$"),
    refused_key=lambda words: Fault(401, said("InvalidApiKey", words)),
    taken=lambda id_: Fault(200, {"output": {"task_id": id_}}),
    fails=lambda stub, words: setattr(stub, "failure", (words, words)),
    not_taken=(
        Row("throttled", Fault(429, said("Throttling.RateQuota"), {"Retry-After": "7"}), 7),
        Row("throttled", Fault(429, said("Throttling"))),
        Row("throttled", Fault(400, said("Throttling.AllocationQuota"))),
        Row("key", Fault(401, said("InvalidApiKey"))),
        Row("key", Fault(403, said("AccessDenied"))),
        Row("model", Fault(403, said("AccessDenied.Unpurchased"))),
        Row("model", Fault(404, said("ModelNotFound"))),
        Row("model", Fault(400, said("InvalidParameter", "Model not exist."))),
        Row("funds", Fault(400, said("Arrearage"))),
        Row("funds", Fault(403, said("AllocationQuota.FreeTierOnly"))),
        Row("fault", Fault(500, said("InternalError"))),
        Row("fault", Fault(503, said("ModelServingError"))),
        Row("fault", Fault(307, "", {"Location": "https://elsewhere.example/"})),
    ),
    unreadable=(
        Fault(500, said("InternalError.Timeout")),
        Fault(200, {"request_id": "7574ee8f"}),
        Fault(200, {"output": {"task_status": "PENDING"}}),
        Fault(200, {"output": {"task_id": ""}} | said("Throttling")),
        Fault(200, said("SomethingNew")),
        Fault(200, said("InternalError.Timeout")),
        Fault(504, said("Throttling")),
        Fault(502, said("DataInspectionFailed")),
        *(Fault(status, said("InternalError"), after=True) for status in (502, 504, 520, 524)),
        *(
            Fault(status, body, {"Retry-After": "120"}, after=True)
            for status in GATEWAYS
            for body in ({"message": "Service Unavailable"}, CLOUDFLARE | {"status": status})
        ),
    ),
    unanswered=(
        Row("throttled", Fault(429, said("Throttling.RateQuota"), {"Retry-After": "3"}), 3),
        Row("fault", Fault(500, said("InternalError"))),
        Row("fault", Fault(200, {"output": None})),
        Row("key", Fault(401, said("InvalidApiKey"))),
        Row("funds", Fault(400, said("Arrearage"))),
    ),
    gone=(
        Fault(404, said("NotFound", "The task cannot be found.")),
        Fault(200, {"output": {"task_id": "7", "task_status": "UNKNOWN"}}),
    ),
    unknown="wan9.9-kf2v-plus",
)

# -- fal ------------------------------------------------------------------------------------------------------
FAL_TABLE: dict[str, Any] = {
    "model": remote_fal.I2V,
    "input": {"prompt": "prompt", "image_url": "start_image", "num_frames": "frames", "resolution": "'720p'"},
}
FAL = Vendor(
    kind="fal",
    name="fal",
    made=FalStub,
    engine=FalEngine,
    job=lambda folder, **table: queue_film(queue_model("fal", FAL_TABLE | table), folder),
    shape=(96, 64, 5),
    submit=rf"^/{remote_fal.I2V}$",
    polls=("/status$", "/requests/[^/]+$"),
    cancel=("PUT", "/cancel$"),
    refused_key=lambda words: Fault(401, {"detail": words}),
    taken=lambda id_: Fault(200, {"request_id": id_}),
    fails=lambda stub, words: setattr(stub, "outcome", Outcome(503, {}, {}, words, "runner_disconnected")),
    not_taken=(
        Row("throttled", Fault(429, {"detail": "Too many requests"}, {"Retry-After": "7"}), 7),
        Row("throttled", Fault(409, {"detail": "Conflict"})),
        Row("fault", Fault(500, {"detail": "Internal Server Error", "error_type": "internal_error"})),
        Row("fault", Fault(503, {"detail": "No", "error_type": "downstream_service_unavailable"})),
        Row("key", Fault(401, {"detail": "No user found for Key ID and Secret"})),
        Row("key", Fault(403, {"detail": "Key has no access to this application"})),
        Row("funds", Fault(403, {"detail": "User is locked. Reason: Exhausted balance. Top up at fal.ai."})),
        Row("funds", Fault(402, {"detail": "Payment required"})),
        Row("model", Fault(404, {"detail": 'Application "wan" not found'})),
    ),
    unreadable=(
        Fault(200, {"status": "IN_QUEUE"}),
        Fault(504, {"detail": "Request timed out", "error_type": "request_timeout"}, after=True),
        *(
            Fault(status, body, {"x-fal-request-id": "4711"}, after=True)
            for status in GATEWAYS
            for body in (HTML, CLOUDFLARE, {"detail": "Internal Server Error"})
        ),
    ),
    unanswered=(
        Row("throttled", Fault(429, {"detail": "Too many requests"}, {"Retry-After": "3"}), 3),
        Row("fault", Fault(500, {"detail": "Internal Server Error"})),
        Row("key", Fault(401, {"detail": "No user found for Key ID and Secret"})),
    ),
    gone=(Fault(404, {"detail": "Request 4711 not found"}),),
    cancelled=("remote_failed", True),
)

# -- OpenAI's wire --------------------------------------------------------------------------------------------
_QUOTA = {"error": {"message": "You exceeded your current quota.", "type": "", "code": "insufficient_quota"}}
_LIMIT = {"error": {"message": "Billing hard limit has been reached", "code": "billing_hard_limit_reached"}}
_RATE = {"error": {"message": "Rate limit reached.", "type": "requests", "code": "rate_limit_exceeded"}}
OPENAI = Vendor(
    kind="openai-video",
    name="box",
    made=OpenAIStub,
    engine=OpenAIVideoEngine,
    job=lambda folder, **table: video_job(folder, table),
    shape=(64, 48, 9),
    submit="^/v1/videos$",
    polls=("^/v1/videos/[^/]+$",),
    cancel=("DELETE", "^/v1/videos/"),
    refused_key=lambda words: Fault(401, {"error": {"message": words, "code": "invalid_api_key"}}),
    taken=lambda id_: Fault(200, {"id": id_}),
    fails=lambda stub, words: setattr(stub, "failure", {"code": words, "message": words}),
    not_taken=(
        Row("throttled", Fault(429, _RATE, {"Retry-After": "11"}), 11),
        Row("funds", Fault(429, _QUOTA)),
        Row("funds", Fault(400, _LIMIT)),
        Row("fault", Fault(503, {"detail": "Task queue is full (max 100 tasks)"})),
        Row("fault", Fault(500, {"error": {"message": "Internal error.", "type": "server_error"}})),
        Row("model", Fault(404, {"detail": "Not Found"})),
        Row("key", Fault(401, {"error": "Unauthorized"})),
    ),
    unreadable=(Fault(200, {"object": "video"}), Fault(cut=9)),
    unanswered=(
        Row("throttled", Fault(429, _RATE, {"Retry-After": "3"}), 3),
        Row("fault", Fault(200, {"status": 7})),
        Row("key", Fault(401, {"detail": "Unauthorized"})),
    ),
    gone=(
        *(
            Fault(404, {"detail": words})
            for words in ("Video not found", "Task not found", "Task 7c1 was not found")
        ),
        Fault(404, {"error": {"message": "Video not found", "type": "invalid_request_error", "code": None}}),
    ),
    base="/v1",
    cancelled=("remote_lost", True),  # it is deleted
    signing={"flavour": "sglang", "bucket": True},
)

# -- Replicate ------------------------------------------------------------------------------------------------
REPLICATE_TABLE: dict[str, Any] = {
    "model": remote_replicate.I2V,
    "input": {"prompt": "prompt", "image": "start_image", "num_frames": "frames"},
}
_SLOWER = {"detail": "Request was throttled."}
_CREDIT = "You have insufficient credit to run this model. Go to https://replicate.com/account"
REPLICATE = Vendor(
    kind="replicate",
    name="replicate",
    made=ReplicateStub,
    engine=ReplicateEngine,
    job=lambda folder, **table: queue_film(queue_model("replicate", REPLICATE_TABLE | table), folder),
    shape=(96, 64, 5),
    submit=rf"^/v1/models/{remote_replicate.I2V}/predictions$",
    polls=(r"^/v1/predictions/[^/]+$",),
    cancel=("POST", "/cancel$"),
    refused_key=lambda words: Fault(401, {"title": "Unauthenticated", "detail": words}),
    taken=lambda id_: Fault(201, {"id": id_, "status": "starting"}),
    fails=lambda stub, words: setattr(stub, "ends", {"status": "failed", "error": words}),
    not_taken=(
        Row("throttled", Fault(429, {"detail": "Throttled. Your rate limit resets in ~30s."}), 30),
        Row("throttled", Fault(429, _SLOWER | {"status": 429, "retry_after": 5}), 5),
        Row("throttled", Fault(429, _SLOWER | {"retry_after": 5}, {"Retry-After": "7"}), 7),
        Row("throttled", Fault(429, _SLOWER)),
        Row("fault", Fault(503, {"detail": "Service unavailable", "status": 503})),
        Row("key", Fault(401, {"title": "Unauthenticated", "detail": "No valid token", "status": 401})),
        Row("funds", Fault(402, {"title": "Insufficient credit", "detail": _CREDIT})),
    ),
    unreadable=(
        Fault(201, HTML),
        Fault(201, {"status": "starting"}),
        *(
            Fault(status, {"title": "Error", "detail": "Something went wrong"}, after=True)
            for status in GATEWAYS
        ),
        *(
            Fault(status, {"detail": "Internal server error", "status": status}, after=True)
            for status in (500, 502, 504)
        ),
    ),
    unanswered=(
        Row("throttled", Fault(429, _SLOWER | {"retry_after": 3}), 3),
        Row("fault", Fault(500, {"detail": "Internal server error", "status": 500})),
        Row("key", Fault(401, {"title": "Unauthenticated", "status": 401})),
        Row("fault", Fault(405, {"detail": "The requested resource could not be found.", "status": 405})),
    ),
    gone=(Fault(404, {"detail": "The requested resource could not be found.", "status": 404}),),
)

# -- the native wire ------------------------------------------------------------------------------------------
_BUSY = {"error_code": 429002, "error_message": "This key has as many waiting requests as it may have."}
_FUNDS = {"error_code": 400002, "error_message": "Not enough balance."}
BROKEN = {"error_code": 500001, "error_message": "The server made a mistake."}
GONE = {"error_code": 404001, "error_message": "There is nothing here under this name."}
RUNCOMFY = Vendor(
    kind="runcomfy",
    name="other",
    made=RunComfyStub,
    engine=RunComfyEngine,
    job=lambda folder, **table: remote_job(model(FLF, **({"runcomfy": table} if table else {})), folder),
    shape=(64, 48, 5),
    submit="/v1/models/",
    polls=("/status$", "/result$"),
    cancel=("POST", "/cancel$"),
    refused_key=lambda words: Fault(401, {"error_code": 400004, "error_message": words}),
    taken=lambda id_: Fault(200, {"request_id": id_}),
    fails=lambda stub, words: setattr(stub, "failure", {"code": words, "message": words}),
    not_taken=(
        Row("throttled", Fault(429, _BUSY, {"Retry-After": "7"}), 7),
        Row("throttled", Fault(429, HTML)),
        Row("funds", Fault(402, _FUNDS)),
        Row("funds", Fault(200, _FUNDS)),
        Row("funds", Fault(200, {"error_code": "400002", "error_message": "Not enough balance."})),
        Row("funds", Fault(200, {"error_code": 400002})),
        Row("throttled", Fault(200, {"error_code": 429001, "message": "Slower."})),
        Row("fault", Fault(503, {"error_code": 503001, "error_message": "No."}, {"Retry-After": "2"}), 2),
        Row("fault", Fault(500, BROKEN)),
        Row("fault", Fault(200, BROKEN)),
        Row("fault", Fault(200, BROKEN | {"status": "failed"})),
        Row("key", Fault(403, {"error_code": 403001, "error_message": "Not yours."})),
    ),
    unreadable=(
        Fault(200, {}),
        # only an error as the wire has them says that nothing was taken
        Fault(500, {"error_code": 500, "error_message": "Oops"}, after=True),
        Fault(500, {"error_code": 500001}, after=True),
        # with an id beside it nobody can tell
        Fault(200, BROKEN | {"request_id": "r-1"}),
    ),
    unanswered=(
        Row("throttled", Fault(429, _BUSY, {"Retry-After": "3"}), 3),
        Row("fault", Fault(500, BROKEN)),
        Row("key", Fault(401, {"error_code": 400004, "error_message": "Who are you?"})),
    ),
    gone=(Fault(404, GONE), Fault(200, GONE)),
    needs_table=False,
)

VENDORS = (DASHSCOPE, FAL, OPENAI, REPLICATE, RUNCOMFY)
