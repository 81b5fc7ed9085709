"""The engine for Replicate's predictions, in front of a server that behaves as Replicate's documents say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rushes.catalog.model import Model
from rushes.engines.remote.base import (
    RemoteJob,
    RemoteRefused,
)
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
from support.remote_stub import HTML, KEY, Fault
from support.remote_vendors import REPLICATE, REPLICATE_TABLE, fixtures

SUBMIT = rf"^/v1/models/{I2V}/predictions$"
POLL = r"^/v1/predictions/\w+$"
stub, engine, job = fixtures(REPLICATE)


def film(folder: Path, *, model: Model | None = None, **more: Any) -> RemoteJob:
    return queue_film(model or queue_model("replicate", REPLICATE_TABLE), folder, **more)


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
    model = queue_model("replicate", REPLICATE_TABLE | ({"files": files} if files else {}))
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


# -- not taken --------------------------------------------------------------------------------------------------


async def test_a_version_that_is_not_there(engine: Engine, stub: Stub, tmp_path: Path) -> None:
    trouble = await not_taken(engine, still(tmp_path, {"model": "fofr/film-still:0000"}))

    assert ("model", {}) == (trouble.trouble, stub.jobs)


# -- taken or not -----------------------------------------------------------------------------------------------


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
    table = REPLICATE_TABLE | {"input": {"prompt": "prompt", "num_frames": "frames"}}
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


async def test_a_prediction_whose_hour_is_over(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    stub.removed = True

    assert "remote_lost" == (await refused(engine, job)).reason


async def test_a_handle_that_cannot_be_read(engine: Engine, stub: Stub, job: RemoteJob) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll("{", job)

    await engine.cancel("{")
    assert ("remote_lost", []) == (caught.value.reason, stub.seen)


# -- polls that say nothing -------------------------------------------------------------------------------------


# -- later ------------------------------------------------------------------------------------------------------
