"""The engine `openai-video` before servers, and gateways in front of them, that answer what they should not."""

from pathlib import Path
from typing import Any

import pytest

from rushes.engines.remote.base import (
    Finished,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
    Underway,
)
from rushes.engines.remote.openai_video import OpenAIVideoEngine
from rushes.requests.record import Progress
from support.remote_driving import CLOUDFLARE, submitted, to_end
from support.remote_openai import OpenAIStub, image_job, video_job
from support.remote_runcomfy import FLF, model, remote_job
from support.remote_stub import HTML, Fault
from support.remote_vendors import OPENAI, fixtures

TIMED_OUT = {"message": "Endpoint request timed out"}
OWN = {"error": {"message": "CUDA out of memory", "type": "server_error", "code": None}}
stub, engine, job = fixtures(OPENAI)
BUSY = {"error": {"message": "Try again later.", "type": "service_unavailable", "code": 503}}


# -- submits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", [500, 502, 503, 504, 520, 524])
@pytest.mark.parametrize("body", [HTML, CLOUDFLARE, TIMED_OUT, {"detail": "Bad gateway"}])
async def test_an_image_that_was_taken_is_unknown_whatever_a_gateway_says(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, status: int, body: Any
) -> None:
    stub.fail("POST", "/v1/", Fault(status, body, after=True))
    with pytest.raises(SubmitUnknown, match="box"):
        await engine.submit(image_job(tmp_path))
    assert len(stub.jobs) == 1


@pytest.mark.parametrize("status", [408, 502, 504, 507, 524])
async def test_an_image_that_may_have_been_made_is_not_made_again(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, status: int
) -> None:
    stub.fail("POST", "/v1/images", Fault(status, OWN, after=True))
    with pytest.raises(SubmitUnknown, match="CUDA out of memory"):
        await engine.submit(image_job(tmp_path))


@pytest.mark.parametrize("status", [500, 501])
async def test_an_image_that_failed_may_have_cost_something(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, status: int
) -> None:
    stub.fail("POST", "/v1/images", Fault(status, OWN, after=True))
    with pytest.raises(RemoteRefused, match="CUDA out of memory") as caught:
        await engine.submit(image_job(tmp_path))
    assert ("remote_failed", False, True) == (
        caught.value.reason,
        caught.value.retryable,
        caught.value.billed,
    )


@pytest.mark.parametrize("fault", [Fault(429, HTML), Fault(503, BUSY), Fault(503, HTML, {"Retry-After": "3"})])
async def test_an_image_that_is_not_begun_may_be_asked_for_again(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, fault: Fault
) -> None:
    stub.fail("POST", "/v1/images", fault)
    with pytest.raises(RemoteUnavailable):
        await engine.submit(image_job(tmp_path))


@pytest.mark.parametrize("id_", ["", "..", "a b", "a\x9b31m", "x" * 100_000, 7, None])
async def test_the_id_of_a_task_that_cannot_be_one_is_unreadable(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, id_: Any
) -> None:
    stub.fail("POST", "/v1/", Fault(200, {"task_id": id_}))
    with pytest.raises(SubmitUnknown):
        await engine.submit(video_job(tmp_path, {"endpoint": "tasks"}))


# -- input files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mapping", [None, {"prompt": "prompt", "input_reference": "start_image"}])
async def test_a_last_frame_that_no_field_takes_is_refused_before_it_is_sent(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, mapping: Any
) -> None:
    job = video_job(tmp_path, {"input": mapping} if mapping else None, last=True)
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(job)
    assert ("remote_refused", "62_image", False) == (
        caught.value.reason,
        caught.value.field,
        caught.value.billed,
    )
    assert mapping or "[engines.openai-video.input]" in caught.value.message
    assert mapping or 'last_image = "end_image"' in caught.value.message
    assert stub.seen == []


async def test_a_last_frame_goes_over_by_a_mapping(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    stub.needs_image = stub.needs_last = True
    mapping = {"prompt": "prompt", "input_reference": "start_image", "last_image": "end_image"}
    job = video_job(tmp_path, {"input": mapping}, last=True)
    await submitted(engine, job)
    [sent] = [one.body["files"] for one in stub.jobs.values()]
    names = {"input_reference": "68_image", "last_image": "62_image"}
    assert {name: job.files[field].path.read_bytes() for name, field in names.items()} == sent


async def test_without_its_last_frame_the_server_is_not_content(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob
) -> None:
    stub.needs_last = True
    with pytest.raises(RemoteRefused, match="last_image is required"):
        await engine.submit(job)


# -- images in answers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "entry",
    [
        {"b64_json": "!!"},
        {"b64_json": "\xe9" * 20},
        {"b64_json": "A"},
        {"url": "https://[x"},
        {"url": "https://\uff41\u2100/x.png"},
    ],
)
async def test_an_image_that_cannot_be_read_fails_the_request(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, entry: dict[str, str]
) -> None:
    stub.fail("POST", "/images", Fault(200, {"data": [entry]}))
    with pytest.raises(RemoteRefused, match="cannot be read") as caught:
        await engine.submit(image_job(tmp_path))
    assert ("remote_failed", True) == (caught.value.reason, caught.value.billed)


async def test_no_more_than_sixteen_images_come_here(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    urls = [f"https://cdn.example/{number}.png" for number in range(5000)]
    stub.fail("POST", "/images", Fault(200, {"data": [{"url": url} for url in urls]}))
    outcome = await engine.submit(image_job(tmp_path))
    assert isinstance(outcome, Finished)
    assert urls[:16] == [file.url for file in outcome.files]


async def test_an_image_larger_than_other_answers_comes_back(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    stub.fail("POST", "/images", Fault(200, {"data": [{"b64_json": "AAAA" * 600_000}]}))
    outcome = await engine.submit(image_job(tmp_path))
    assert isinstance(outcome, Finished)
    assert outcome.files[0].path is not None
    assert bytes(1_800_000) == outcome.files[0].path.read_bytes()


# -- polls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["archiving", "paused"])
async def test_a_state_that_nobody_knows_has_not_ended(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob, status: str
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", "/videos/", Fault(200, {"id": "video_1", "status": status}))
    assert Underway() == await engine.poll(handle, job)
    await to_end(engine, handle, job)


@pytest.mark.parametrize(
    ("pause", "header"), [(60.0, "1e300"), (None, "nan"), (None, "inf"), (0.0, "-5"), (None, "soon")]
)
async def test_what_is_told_of_a_job_is_bounded(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob, pause: float | None, header: str
) -> None:
    handle = await submitted(engine, job)
    told = {"id": "video_1", "status": "in_progress", "progress": 10**300}
    stub.fail("GET", "/videos/", Fault(200, told, {"openai-poll-after-ms": header}))
    assert Underway(Progress(1.0), pause) == await engine.poll(handle, job)


async def test_the_address_of_a_video_that_cannot_be_read_fails_the_request(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", "/videos/", Fault(200, {"id": "video_1", "status": "completed", "url": "https://[x"}))
    with pytest.raises(RemoteRefused, match="cannot be read") as caught:
        await engine.poll(handle, job)
    assert ("remote_failed", True) == (caught.value.reason, caught.value.billed)


# -- what it may have cost ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("billed", "kind"), [(False, "video"), (True, "image")])
async def test_refused_content_is_billed_where_it_may_have_been_made(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, billed: bool, kind: str
) -> None:
    refusal = {"error": {"message": "Blocked.", "code": "moderation_blocked"}}
    stub.fail("POST", "/v1/", Fault(400, refusal))
    with pytest.raises(RemoteRefused, match=r"Blocked\.") as caught:
        await engine.submit(video_job(tmp_path) if kind == "video" else image_job(tmp_path))
    assert ("content_refused", billed) == (caught.value.reason, caught.value.billed)


async def test_first_last_frame_of_the_catalog_is_not_served_by_chance(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    entry = model(FLF, openai_video={"model": "any"})
    with pytest.raises(RemoteRefused, match="62_image"):
        await engine.submit(remote_job(entry, tmp_path))
    assert stub.jobs == {}
