"""What the engine for fal's queue makes of proxies, blackened pictures, and answers that nobody would expect."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rushes.engines.remote.base import (
    Finished,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    Underway,
)
from rushes.engines.remote.fal import FalEngine
from rushes.requests.record import Progress
from support.remote_driving import (
    CLOUDFLARE,
    PROMPT,
    SIZE,
    brought,
    picture_size,
    queue_film,
    queue_job,
    queue_model,
    refused,
    submitted,
    to_end,
)
from support.remote_fal import I2V, T2I, FalStub, Outcome, problem
from support.remote_stub import HTML, Fault
from support.remote_vendors import FAL, fixtures

SUBMIT = rf"^/{I2V}$"
STATUS = r"/status$"
RESULT = r"/requests/[^/]+$"
stub, engine, job = fixtures(FAL, polls=0)
LIST = problem("prompt", "Field required", "missing")


def stills(folder: Path, count: int = 1, **values: Any) -> RemoteJob:
    table = {"model": T2I, "input": {"prompt": "prompt", "num_images": str(count)}}
    return queue_job(queue_model("fal", table, PROMPT, output="image"), folder, **({"text": "a fox"} | values))


# -- taken, and then -------------------------------------------------------------------------------------------


# -- a result that is not to be had now ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fault", "trouble"),
    [
        (Fault(401, {"detail": "x", "error_type": "auth_error"}), "key"),
        (Fault(402, {"detail": "Payment required"}), "funds"),
        (Fault(403, {"detail": "User is locked. Reason: Exhausted balance."}), "funds"),
        (Fault(403, problem("", "Forbidden", "forbidden")), "key"),
        (Fault(408, {"detail": "slow"}), "throttled"),
        (Fault(429, {"detail": "slow", "error_type": "rate_limited"}), "throttled"),
        (
            Fault(
                500,
                {"detail": "Internal server error", "error_type": "internal_error"},
                {"x-fal-error-type": "internal_error", "x-fal-retryable": "true"},
            ),
            "fault",
        ),
        (Fault(500, problem("", "Internal server error", "internal_server_error")), "fault"),
        (Fault(503, {"detail": "Runner disconnected", "error_type": "runner_disconnected"}), "fault"),
        (Fault(524, CLOUDFLARE), "fault"),
        (Fault(400, HTML), "fault"),
        (Fault(422, HTML), "fault"),
        (Fault(404, {"detail": "Not Found"}, {"x-fal-request-id": "4711"}), "fault"),
    ],
)
async def test_a_paid_result_is_asked_for_again(
    engine: FalEngine, stub: FalStub, job: RemoteJob, fault: Fault, trouble: str
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", RESULT, fault)
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.poll(handle, job)

    assert trouble == caught.value.trouble
    assert isinstance(await engine.poll(handle, job), Finished)


@pytest.mark.parametrize(
    ("outcome", "reason", "billed"),
    [
        (Outcome(422, LIST), "remote_refused", False),
        (Outcome(422, LIST, inference_time=0.4), "remote_refused", True),
        (Outcome(422, {"detail": ["no"]}), "remote_refused", False),
        (Outcome(404, problem("", "No such voice", "not_found")), "remote_failed", True),
        (
            Outcome(403, {"detail": "Flagged", "error_type": "content_policy_violation"}),
            "content_refused",
            True,
        ),
        (Outcome(422, problem("prompt", "Flagged", "content_policy_violation")), "content_refused", True),
    ],
)
async def test_the_models_own_words_decide(
    engine: FalEngine, stub: FalStub, job: RemoteJob, outcome: Outcome, reason: str, billed: bool
) -> None:
    stub.outcome = outcome
    error = await refused(engine, job)

    assert (reason, False, billed) == (error.reason, error.retryable, error.billed)


@pytest.mark.parametrize("fault", [Fault(401, {"detail": "No user found"}), Fault(429, {"detail": "No user"})])
async def test_a_failed_job_is_told_by_its_status_where_its_result_is_not_to_be_had(
    engine: FalEngine, stub: FalStub, job: RemoteJob, fault: Fault
) -> None:
    stub.outcome = Outcome(503, {}, {}, "Runner disconnected", "runner_disconnected")
    stub.fail("GET", RESULT, fault)
    error = await refused(engine, job)

    assert ("remote_failed", True, False) == (error.reason, error.retryable, error.billed)
    assert "The job failed at fal: Runner disconnected" == error.message


# -- 404s of others --------------------------------------------------------------------------------------------


# -- pictures that the safety checker has made black ---------------------------------------------------------------
@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("flags", [[True], [True, True], True])
async def test_all_black(
    engine: FalEngine, stub: FalStub, tmp_path: Path, flags: list[bool] | bool, inline: bool
) -> None:
    stub.inline, stub.unsafe = inline, flags
    error = await refused(engine, stills(tmp_path, 2))

    assert ("content_refused", False, True) == (error.reason, error.retryable, error.billed)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("flags", [[True, False], [False, True], [True, True, False]])
async def test_black_pictures_are_no_results(
    engine: FalEngine, stub: FalStub, tmp_path: Path, flags: list[bool], inline: bool
) -> None:
    stub.inline, stub.unsafe = inline, flags
    job = stills(tmp_path, len(flags))
    _, finished = await to_end(engine, await submitted(engine, job), job)

    (file,) = finished.files
    path = await brought(engine, file, tmp_path / "one.png")
    assert (64, 48) == picture_size(path)
    with Image.open(path) as left:
        assert (255, 0, 0) == left.convert("RGB").getpixel((0, 0))


# -- inputs that have no place there -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "table",
    [
        {"model": T2I, "input": {"prompt": "prompt"}},
        {"model": T2I, "input": {"prompt": "prompt", "mode": "'i2v' if start_image else 't2v'"}},
    ],
)
async def test_a_file_without_a_place_is_refused(
    engine: FalEngine, stub: FalStub, tmp_path: Path, table: dict[str, Any]
) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(queue_film(queue_model("fal", table), tmp_path))

    assert ("remote_refused", "picture", False) == (
        caught.value.reason,
        caught.value.field,
        caught.value.billed,
    )
    assert [] == stub.seen


async def test_without_a_mapping_pictures_have_the_usual_size(
    engine: FalEngine, stub: FalStub, tmp_path: Path
) -> None:
    model = queue_model("fal", {"model": T2I}, PROMPT, SIZE, output="image")
    job = queue_job(model, tmp_path, text="a fox", size="80x40")
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert (80, 40) == picture_size(await brought(engine, finished.files[0], tmp_path / "one.png"))


async def test_what_is_wrong_with_the_size_is_told_of_it(
    engine: FalEngine, stub: FalStub, tmp_path: Path
) -> None:
    body = problem("image_size", "Input should be a multiple of 8", "multiple_of")
    body["detail"][0]["loc"].append("height")
    stub.outcome = Outcome(422, body)
    for table in ({}, {"input": {"prompt": "prompt", "image_size": {"width": "width", "height": "height"}}}):
        model = queue_model("fal", {"model": T2I} | table, PROMPT, SIZE, output="image")
        error = await refused(engine, queue_job(model, tmp_path, text=f"fox {table}", size="81x41"))
        assert ("remote_refused", "size") == (error.reason, error.field)


# -- answers that nobody expects -----------------------------------------------------------------------------------
async def test_a_result_of_some_megabytes(engine: FalEngine, stub: FalStub, tmp_path: Path) -> None:
    content = bytes(3 << 20)
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    stub.outcome = Outcome(200, {"images": [{"url": address, "content_type": "image/png"}]})
    job = stills(tmp_path)
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert [content] == [file.path.read_bytes() for file in finished.files if file.path]


@pytest.mark.parametrize(
    ("body", "progress"),
    [
        (b'{"status": "IN_QUEUE", "queue_position": ' + b"9" * 4000 + b"}", Progress(stage="queued at fal")),
        (b'{"status": "IN_QUEUE", "queue_position": true}', Progress(stage="queued at fal")),
        (b'{"status": ["COMPLETED"], "error": ""}', Progress(stage="queued at fal")),
        (
            b'{"status": "IN_PROGRESS", "logs": [7, {"message": ' + b"9" * 4000 + b'}, {"message": null}]}',
            Progress(stage="running at fal"),
        ),
        (
            b'{"status": "IN_PROGRESS", "logs": [{"message": "5%|#| ' + b"9" * 4000 + b'/10"}]}',
            Progress(fraction=0.05, stage="running at fal"),
        ),
    ],
)
async def test_odd_statuses(
    engine: FalEngine, stub: FalStub, job: RemoteJob, body: bytes, progress: Progress
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", STATUS, Fault(200, body))
    answer = await engine.poll(handle, job)

    assert isinstance(answer, Underway)
    assert progress == answer.progress


@pytest.mark.parametrize("kind", [["runner_disconnected"], {"a": 1}, 7, None])
async def test_odd_failures(engine: FalEngine, stub: FalStub, job: RemoteJob, kind: Any) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", STATUS, Fault(200, {"status": "COMPLETED", "error": [kind], "error_type": kind}))
    stub.fail("GET", RESULT, Fault(422, {"detail": [{"loc": 7, "msg": kind, "type": kind}]}))
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll(handle, job)

    assert ("remote_refused", None) == (caught.value.reason, caught.value.field)


async def test_handles_are_small(engine: FalEngine, stub: FalStub, job: RemoteJob) -> None:
    own, long = f"{stub.url}/mine/{{}}", f"{stub.url}/{'a' * 5000}"
    usual = await submitted(engine, job)
    body = {"request_id": "../../keys", "status_url": long, "response_url": own.format(1), "cancel_url": long}
    stub.fail("POST", SUBMIT, Fault(200, body))
    odd = await submitted(engine, job)
    stub.fail("GET", "keys", Fault(200, {"status": "COMPLETED"}))
    with pytest.raises(RemoteUnavailable):
        await engine.poll(odd, job)

    assert {"id": next(iter(stub.jobs)), "app": "fal-ai/wan"} == json.loads(usual)
    assert {"id": "../../keys", "app": "fal-ai/wan", "response": own.format(1)} == json.loads(odd)
    assert ["/fal-ai/wan/requests/..%2F..%2Fkeys/status", "/mine/1"] == [call.path for call in stub.seen[-2:]]
