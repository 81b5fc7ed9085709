"""The engine for Replicate's predictions, in front of a server that behaves as Replicate's documents say."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rushes.catalog.model import Model
from rushes.engines.remote.base import (
    Finished,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
)
from rushes.engines.remote.configured import RemoteConfig, Secret
from rushes.engines.remote.outputs import OutputNotFetched
from rushes.engines.remote.replicate import INLINE_BYTES
from rushes.engines.remote.replicate import ReplicateEngine as Engine
from rushes.requests.record import Progress
from support.remote_driving import (
    IMAGE,
    PROMPT,
    SIZE,
    brought,
    movie_shape,
    not_taken,
    picture_size,
    queue_film,
    queue_job,
    queue_model,
    refused,
    submitted,
    to_end,
)
from support.remote_replicate import I2V, T2I, VERSION
from support.remote_replicate import ReplicateStub as Stub
from support.remote_stub import HTML, KEY, Fault, running

TABLE = {"model": I2V, "input": {"prompt": "prompt", "image": "start_image", "num_frames": "frames"}}
SUBMIT = rf"^/v1/models/{I2V}/predictions$"
POLL = r"^/v1/predictions/\w+$"


@pytest.fixture
def stub() -> Iterator[Stub]:
    with running(Stub()) as stub:
        yield stub


@pytest.fixture
async def engine(stub: Stub) -> AsyncIterator[Engine]:
    engine = Engine(RemoteConfig("replicate", "replicate", stub.url, Secret(KEY)), seconds=10)
    yield engine
    await engine.close()


@pytest.fixture
def job(tmp_path: Path) -> RemoteJob:
    return film(tmp_path)


def film(folder: Path, *, model: Model | None = None, **more: Any) -> RemoteJob:
    return queue_film(model or queue_model("replicate", TABLE), folder, **more)


def still(folder: Path, table: dict[str, Any], **values: Any) -> RemoteJob:
    model = queue_model("replicate", table, PROMPT, SIZE, output="image")
    return queue_job(model, folder, **({"text": "a fox"} | values))


def large(folder: Path) -> RemoteJob:
    """A film from a picture that no compression makes small."""
    job = film(folder)
    noise = np.random.default_rng(1).integers(0, 255, (320, 320, 3), np.uint8)
    Image.fromarray(noise).save(job.files["picture"].path)
    return job


# -- the good way -----------------------------------------------------------------------------------------------
async def test_a_film_from_a_picture(engine: Engine, stub: Stub, tmp_path: Path) -> None:
    job = film(tmp_path, length=9)
    handle = await submitted(engine, job)
    said, finished = await to_end(engine, handle, job)

    assert [
        Progress(stage="starting at replicate"),
        Progress(fraction=0.5, stage="running at replicate", step=2, steps=4),
    ] == [one.progress for one in said]
    assert (1, None) == (len(finished.files), finished.cost_usd)
    assert (96, 64, 9) == movie_shape(await brought(engine, finished.files[0], tmp_path / "out.mp4"))
    (sent,) = stub.calls("POST", SUBMIT)
    assert (f"Bearer {KEY}", None) == (sent.headers["authorization"], sent.headers.get("prefer"))
    assert ({"input"}, {"prompt", "image", "num_frames"}) == (set(sent.json), set(sent.json["input"]))
    assert sent.json["input"]["image"].startswith("data:image/png;base64,")


async def test_a_version(engine: Engine, stub: Stub, tmp_path: Path) -> None:
    table = {
        "model": f"fofr/film-still:{VERSION}",
        "input": {"prompt": "prompt", "width": "width", "height": "height", "num_outputs": "2"},
    }
    job = still(tmp_path, table, size="80x40")
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert 2 == len(finished.files)
    assert (80, 40) == picture_size(await brought(engine, finished.files[1], tmp_path / "two.png"))
    (sent,) = stub.calls("POST", "^/v1/predictions$")
    assert {
        "version": VERSION,
        "input": {"prompt": "a fox", "width": 80, "height": 40, "num_outputs": 2},
    } == sent.json


async def test_without_a_mapping_roles_have_the_usual_names(engine: Engine, stub: Stub, tmp_path: Path) -> None:
    job = still(tmp_path, {"model": T2I}, size="80x40")
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert {"prompt": "a fox", "width": 80, "height": 40} == stub.seen[0].json["input"]
    assert (80, 40) == picture_size(await brought(engine, finished.files[0], tmp_path / "one.png"))


async def test_a_large_file_is_uploaded(engine: Engine, stub: Stub, tmp_path: Path) -> None:
    job = large(tmp_path)
    size = job.files["picture"].path.stat().st_size
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert size > INLINE_BYTES
    (upload,) = stub.uploads.values()
    assert ("image/png", size) == (upload["content_type"], upload["size"])
    assert upload["urls"]["get"] == stub.calls("POST", SUBMIT)[0].json["input"]["image"]
    assert (320, 320, 5) == movie_shape(await brought(engine, finished.files[0], tmp_path / "out.mp4"))


@pytest.mark.parametrize(
    ("fault", "trouble"),
    [
        (Fault(drop=True), "unreachable"),
        (Fault(lost=True), "unreachable"),
        (Fault(502, HTML), "fault"),
        (Fault(404, {"detail": "Not found", "status": 404}), "fault"),
        (Fault(429, {"detail": "Request was throttled."}), "throttled"),
        (Fault(200, HTML), "unreachable"),
        (Fault(201, {"id": "a"}), "fault"),
    ],
)
async def test_a_failed_upload_is_no_submit(
    engine: Engine, stub: Stub, tmp_path: Path, fault: Fault, trouble: str
) -> None:
    stub.fail("POST", "^/v1/files$", fault)
    job = large(tmp_path)

    assert trouble == (await not_taken(engine, job)).trouble
    assert [] == stub.calls("POST", SUBMIT)
    await to_end(engine, await submitted(engine, job), job)


@pytest.mark.parametrize("files", [None, "url"])
async def test_the_users_own_address_goes_only_where_the_manifest_says_so(
    engine: Engine, stub: Stub, tmp_path: Path, files: str | None
) -> None:
    address = "https://images.example/fox.png?token=abc"
    model = queue_model("replicate", TABLE | ({"files": files} if files else {}))
    await submitted(engine, film(tmp_path, model=model, url=address))

    assert (files == "url") == (stub.seen[0].json["input"]["image"] == address)


@pytest.mark.parametrize(
    "shape",
    [
        lambda urls: urls[0],
        lambda urls: urls,
        lambda urls: {"video": urls[0], "thumbnail": "https://replicate.delivery/a.png"},
        lambda urls: {"debug": {"url": "https://replicate.delivery/a.zip"}, "output": [{"url": urls[0]}]},
        lambda urls: {"image": "https://replicate.delivery/a.png", "files": urls},
    ],
)
async def test_shapes_of_outputs(
    engine: Engine, stub: Stub, tmp_path: Path, shape: Callable[[list[str]], Any]
) -> None:
    stub.shape = shape
    job = film(tmp_path)
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert 1 == len(finished.files)
    assert (96, 64, 5) == movie_shape(await brought(engine, finished.files[0], tmp_path / "out.mp4"))


async def test_addresses_of_another_host_are_not_asked(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    stub.public = "https://api.replicate.invalid"
    handle = await submitted(engine, job)
    _, finished = await to_end(engine, handle, job)

    assert 1 == len(finished.files)
    assert {f"/v1/predictions/{one}" for one in stub.jobs} == {call.path for call in stub.calls("GET", POLL)}


async def test_keyed_outputs_get_the_key(engine: Engine, stub: Stub, job: RemoteJob, tmp_path: Path) -> None:
    stub.keyed_outputs = True
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert [True] == [file.keyed for file in finished.files]
    assert (96, 64, 5) == movie_shape(await brought(engine, finished.files[0], tmp_path / "out.mp4"))


async def test_serves_what_the_manifest_says(engine: Engine, stub: Stub) -> None:
    assert engine.serves(queue_model("replicate", TABLE))
    assert not engine.serves(queue_model("replicate", None))
    assert (stub.url, {"Authorization": f"Bearer {KEY}"}) == (engine.origin, engine.headers())


# -- not taken --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "headers", "pause"),
    [
        ({"detail": "Request was throttled. Your rate limit resets in ~30s."}, {}, 30.0),
        ({"detail": "Request was throttled.", "status": 429, "retry_after": 5}, {}, 5.0),
        ({"detail": "Request was throttled.", "retry_after": 5}, {"Retry-After": "7"}, 7.0),
        ({"detail": "Request was throttled."}, {}, None),
    ],
)
async def test_throttled(
    engine: Engine,
    stub: Stub,
    job: RemoteJob,
    body: Any,
    headers: dict[str, str],
    pause: float | None,
) -> None:
    stub.fail("POST", SUBMIT, Fault(429, body, headers))
    trouble = await not_taken(engine, job)

    assert ("throttled", pause, {}) == (trouble.trouble, trouble.retry_after, stub.jobs)
    await to_end(engine, await submitted(engine, job), job)


@pytest.mark.parametrize(
    ("status", "body", "trouble"),
    [
        (503, {"detail": "Service unavailable", "status": 503}, "fault"),
        (401, {"title": "Unauthenticated", "detail": "You did not pass a valid token", "status": 401}, "key"),
        (
            402,
            {
                "title": "Insufficient credit",
                "detail": "You have insufficient credit to run this model. Go to https://replicate.com/account",
            },
            "funds",
        ),
    ],
)
async def test_not_taken(
    engine: Engine, stub: Stub, job: RemoteJob, status: int, body: Any, trouble: str
) -> None:
    stub.fail("POST", SUBMIT, Fault(status, body))

    assert trouble == (await not_taken(engine, job)).trouble
    assert {} == stub.jobs


@pytest.mark.parametrize("model", ["nobody/nothing", "fofr/film-still:0000"])
async def test_a_model_that_is_not_there(engine: Engine, stub: Stub, tmp_path: Path, model: str) -> None:
    trouble = await not_taken(engine, still(tmp_path, {"model": model}))

    assert ("model", {}) == (trouble.trouble, stub.jobs)


async def test_a_wrong_key_is_in_no_error(stub: Stub, job: RemoteJob) -> None:
    wrong = "r8_WrongWrongWrongWrong0123456789"
    stub.fail("POST", SUBMIT, Fault(401, {"title": "Unauthenticated", "detail": f"Bad token {wrong}"}))
    engine = Engine(RemoteConfig("replicate", "replicate", stub.url, Secret(wrong)))
    for _ in range(2):
        trouble = await not_taken(engine, job)
        assert "key" == trouble.trouble
        assert wrong not in str(trouble)
    await engine.close()


async def test_nobody_there(job: RemoteJob) -> None:
    engine = Engine(RemoteConfig("replicate", "replicate", "http://127.0.0.1:9", Secret(KEY)))

    assert "unreachable" == (await not_taken(engine, job)).trouble


# -- taken or not -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fault", "accepted"),
    [
        (Fault(lost=True), 1),
        (Fault(cut=20), 1),
        (Fault(drop=True), 0),
        (Fault(502, HTML), 0),
        (Fault(504, HTML), 0),
        (Fault(201, HTML), 0),
        (Fault(201, {"status": "starting"}), 0),
    ],
)
async def test_a_lost_answer_is_never_sent_again(
    engine: Engine, stub: Stub, job: RemoteJob, fault: Fault, accepted: int
) -> None:
    stub.fail("POST", SUBMIT, fault)
    with pytest.raises(SubmitUnknown) as caught:
        await engine.submit(job)

    assert KEY not in caught.value.why
    assert (accepted, 1) == (sum(stub.submits.values()), len(stub.calls("POST", SUBMIT)))


# -- refused ----------------------------------------------------------------------------------------------------
async def test_an_input_that_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(film(tmp_path, length=200))

    assert ("remote_refused", "length", False, False) == (
        caught.value.reason,
        caught.value.field,
        caught.value.retryable,
        caught.value.billed,
    )
    assert (
        "replicate refuses the input: Input validation failed: - input.num_frames: "
        "Must be less than or equal to 121" == caught.value.message
    )


async def test_a_missing_input(engine: Engine, stub: Stub, tmp_path: Path) -> None:
    table = TABLE | {"input": {"prompt": "prompt", "num_frames": "frames"}}
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(queue_job(queue_model("replicate", table), tmp_path, text="a fox"))
    assert ("remote_refused", None) == (caught.value.reason, caught.value.field)

    plain = queue_model("replicate", {"model": I2V}, PROMPT, IMAGE)
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(queue_job(plain, tmp_path, text="a fox"))
    assert ("remote_refused", "picture") == (caught.value.reason, caught.value.field)


async def test_moderation(engine: Engine, stub: Stub, tmp_path: Path) -> None:
    stub.refuses = "gore"
    error = await refused(engine, film(tmp_path, text="much gore"))

    assert ("content_refused", False, True) == (error.reason, error.retryable, error.billed)


# -- failed there -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ends", "reason", "retryable", "billed"),
    [
        (
            {
                "status": "failed",
                "error": "NSFW content detected. Try running it again, or try a different prompt.",
                "metrics": {},
            },
            "content_refused",
            False,
            True,
        ),
        (
            {"status": "failed", "error": "CUDA out of memory. Tried to allocate 5.92 GiB"},
            "remote_failed",
            False,
            True,
        ),
        (
            {"status": "failed", "error": "Prediction interrupted; please retry (code: PA)", "metrics": {}},
            "remote_failed",
            True,
            False,
        ),
        ({"status": "failed", "error": None, "metrics": None}, "remote_failed", False, True),
        ({"status": "failed", "started_at": None, "metrics": None}, "remote_failed", False, False),
        (
            {"status": "failed", "error": "Input validation error: input.num_frames: too many", "metrics": {}},
            "remote_refused",
            False,
            False,
        ),
        ({"status": "aborted", "metrics": {}}, "remote_failed", True, False),
        ({"status": "canceled"}, "remote_failed", False, True),
        ({"output": "a poem about a fox"}, "remote_failed", False, True),
        ({"output": None}, "remote_failed", False, True),
    ],
)
async def test_failed_there(
    engine: Engine,
    stub: Stub,
    job: RemoteJob,
    ends: dict[str, Any],
    reason: str,
    retryable: bool,
    billed: bool,
) -> None:
    stub.ends = ends
    error = await refused(engine, job)

    assert (reason, retryable, billed) == (error.reason, error.retryable, error.billed)
    assert ("length" if reason == "remote_refused" else None) == error.field


async def test_a_prediction_that_the_server_does_not_know(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    handle = await submitted(engine, job)
    stub.jobs.clear()
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll(handle, job)

    assert ("remote_lost", True) == (caught.value.reason, caught.value.billed)


async def test_a_prediction_whose_hour_is_over(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    stub.removed = True

    assert "remote_lost" == (await refused(engine, job)).reason


async def test_a_handle_that_cannot_be_read(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll("{", job)

    assert ("remote_lost", []) == (caught.value.reason, stub.seen)


# -- polls that say nothing -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fault", "trouble"),
    [
        (Fault(429, {"detail": "Request was throttled.", "retry_after": 3}), "throttled"),
        (Fault(500, {"detail": "Internal server error", "status": 500}), "fault"),
        (Fault(502, HTML), "fault"),
        (Fault(401, {"title": "Unauthenticated", "status": 401}), "key"),
        (Fault(200, HTML), "fault"),
        (Fault(drop=True), "unreachable"),
    ],
)
async def test_a_poll_without_an_answer_decides_nothing(
    engine: Engine, stub: Stub, job: RemoteJob, fault: Fault, trouble: str
) -> None:
    stub.polls = 0
    handle = await submitted(engine, job)
    stub.fail("GET", POLL, fault, times=2 if fault.drop else 1)
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.poll(handle, job)

    assert trouble == caught.value.trouble
    assert (3.0 if trouble == "throttled" else None) == caught.value.retry_after
    assert KEY not in caught.value.why
    assert isinstance(await engine.poll(handle, job), Finished)


# -- later ------------------------------------------------------------------------------------------------------
async def test_another_engine_goes_on_from_the_handle(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    handle = await submitted(engine, job)
    later = Engine(RemoteConfig("replicate", "replicate", stub.url, Secret(KEY)))
    _, finished = await to_end(later, handle, job)
    await later.close()

    assert (1, 1) == (len(finished.files), len(stub.jobs))


async def test_an_expired_output_has_a_fresh_address(
    engine: Engine, stub: Stub, job: RemoteJob, tmp_path: Path
) -> None:
    stub.expired_outputs = 1
    handle = await submitted(engine, job)
    _, finished = await to_end(engine, handle, job)
    with pytest.raises(OutputNotFetched) as caught:
        await brought(engine, finished.files[0], tmp_path / "out.mp4")
    assert caught.value.expired

    _, again = await to_end(engine, handle, job)
    assert (96, 64, 5) == movie_shape(await brought(engine, again.files[0], tmp_path / "out.mp4"))


async def test_cancel(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    stub.gate.clear()
    handle = await submitted(engine, job)
    await engine.cancel(handle)
    with pytest.raises(RemoteRefused) as caught:
        await to_end(engine, handle, job)

    assert ("remote_failed", False) == (caught.value.reason, caught.value.billed)
    assert 1 == len(stub.calls("POST", "/cancel$"))


async def test_cancel_never_raises(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    handle = await submitted(engine, job)
    stub.fail("POST", "/cancel$", Fault(500, HTML))
    stub.fail("POST", "/cancel$", Fault(drop=True))
    for one in (handle, handle, "{"):
        await engine.cancel(one)

    assert 2 == len(stub.calls("POST", "/cancel$"))
