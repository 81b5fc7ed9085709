"""The engine for fal's queue, in front of a server that behaves as fal's documents say."""

from pathlib import Path
from typing import Any

import pytest

from rushes.catalog.model import Model
from rushes.engines.remote.base import (
    Finished,
    RemoteJob,
    RemoteRefused,
    Underway,
)
from rushes.engines.remote.fal import FalEngine
from rushes.requests.record import Progress
from support.remote_driving import (
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
from support.remote_fal import I2V, T2I, FalStub, Outcome, problem
from support.remote_stub import HTML, KEY, Fault
from support.remote_vendors import FAL, FAL_TABLE, fixtures

SUBMIT = rf"^/{I2V}$"
STATUS = r"/status$"
RESULT = r"/requests/[^/]+$"
stub, engine, job = fixtures(FAL)


def film(folder: Path, *, model: Model | None = None, **more: Any) -> RemoteJob:
    return queue_film(model or queue_model("fal", FAL_TABLE), folder, **more)


# -- the good way -----------------------------------------------------------------------------------------------
async def test_a_film_from_a_picture(engine: FalEngine, stub: FalStub, tmp_path: Path) -> None:
    job = film(tmp_path, length=9)
    handle = await submitted(engine, job)
    said, finished = await to_end(engine, handle, job)

    assert [
        Progress(stage="queued at fal, 2 before it"),
        Progress(fraction=0.5, stage="running at fal", step=5, steps=10),
    ] == [one.progress for one in said]
    assert (1, None) == (len(finished.files), finished.cost_usd)
    assert (96, 64, 9) == movie_shape(await brought(engine, finished.files[0], tmp_path / "out.mp4"))
    (sent,) = stub.calls("POST", SUBMIT)
    assert f"Key {KEY}" == sent.headers["authorization"]
    assert {"prompt", "image_url", "num_frames", "resolution"} == set(sent.json)
    assert ("a fox in the snow", 9, "720p") == (
        sent.json["prompt"],
        sent.json["num_frames"],
        sent.json["resolution"],
    )


async def test_without_a_mapping_roles_have_fals_names(
    engine: FalEngine, stub: FalStub, tmp_path: Path
) -> None:
    job = film(tmp_path, model=queue_model("fal", {"model": I2V}), length=7)
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert {"prompt", "image_url", "num_frames"} == set(stub.calls("POST", SUBMIT)[0].json)
    assert (96, 64, 7) == movie_shape(await brought(engine, finished.files[0], tmp_path / "out.mp4"))


async def test_several_pictures(engine: FalEngine, stub: FalStub, tmp_path: Path) -> None:
    table = {"model": T2I, "input": {"prompt": "prompt", "num_images": "3"}}
    job = queue_job(queue_model("fal", table, PROMPT, output="image"), tmp_path, text="foxes")
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert 3 == len({file.url for file in finished.files})
    assert (64, 48) == picture_size(await brought(engine, finished.files[2], tmp_path / "one.png"))


async def test_a_picture_that_comes_in_the_answer(engine: FalEngine, stub: FalStub, tmp_path: Path) -> None:
    stub.inline = True
    job = queue_job(queue_model("fal", {"model": T2I}, PROMPT, output="image"), tmp_path, text="a fox")
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert finished.files[0].path is not None
    assert (64, 48) == picture_size(await brought(engine, finished.files[0], tmp_path / "one.png"))


@pytest.mark.parametrize("files", [None, "url"])
async def test_the_users_own_address_goes_only_where_the_manifest_says_so(
    engine: FalEngine, stub: FalStub, tmp_path: Path, files: str | None
) -> None:
    table = FAL_TABLE | ({"files": files} if files else {})
    address = "https://images.example/fox.png?token=abc"
    await submitted(engine, film(tmp_path, model=queue_model("fal", table), url=address))
    await submitted(engine, film(tmp_path, model=queue_model("fal", table), text="another fox"))

    first, second = (call.json["image_url"] for call in stub.calls("POST", SUBMIT))
    assert (files == "url") == (first == address)
    assert second.startswith("data:image/png;base64,")


async def test_by_id_addresses_name_owner_and_app_alone(
    engine: FalEngine, stub: FalStub, job: RemoteJob
) -> None:
    stub.public = "https://queue.fal.invalid"
    handle = await submitted(engine, job)
    await to_end(engine, handle, job)

    assert {f"/fal-ai/wan/requests/{one}/status" for one in stub.jobs} == {
        call.path for call in stub.calls("GET", STATUS)
    }


async def test_a_workflow_keeps_its_namespace(engine: FalEngine, stub: FalStub, tmp_path: Path) -> None:
    stub.public = "https://queue.fal.invalid"
    model = queue_model("fal", {"model": "workflows/ada/film"}, PROMPT)
    job = queue_job(model, tmp_path, text="a fox")
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert 1 == len(finished.files)
    assert stub.calls("GET", "^/workflows/ada/film/requests/")


async def test_keyed_are_only_outputs_of_the_remote_itself(
    engine: FalEngine, stub: FalStub, job: RemoteJob
) -> None:
    stub.outcome = Outcome(
        200, {"videos": [{"url": "https://v3.fal.media/a.mp4"}, {"url": f"{stub.url}/b.mp4"}]}
    )
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert [("https://v3.fal.media/a.mp4", False), (f"{stub.url}/b.mp4", True)] == [
        (file.url, file.keyed) for file in finished.files
    ]


# -- not taken --------------------------------------------------------------------------------------------------


async def test_a_model_that_is_no_app(engine: FalEngine, stub: FalStub, tmp_path: Path) -> None:
    job = queue_job(queue_model("fal", {"model": "workflows/ada"}, PROMPT), tmp_path, text="a fox")
    trouble = await not_taken(engine, job)

    assert ("model", []) == (trouble.trouble, stub.seen)


# -- taken or not -----------------------------------------------------------------------------------------------


# -- refused ----------------------------------------------------------------------------------------------------
async def test_an_input_that_the_model_refuses(engine: FalEngine, tmp_path: Path) -> None:
    error = await refused(engine, film(tmp_path, length=200))

    assert ("remote_refused", "length", False, False) == (
        error.reason,
        error.field,
        error.retryable,
        error.billed,
    )
    assert "fal refuses the input: num_frames: Input should be less than or equal to 161" == error.message


async def test_an_input_that_the_queue_refuses(engine: FalEngine, stub: FalStub, job: RemoteJob) -> None:
    stub.fail(
        "POST", SUBMIT, Fault(422, problem("image_url", "Image too large", "image_too_large", max_width=99))
    )
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(job)

    assert ("remote_refused", "picture", False) == (
        caught.value.reason,
        caught.value.field,
        caught.value.billed,
    )


async def test_a_size_is_told_of_the_resolution(engine: FalEngine, stub: FalStub, tmp_path: Path) -> None:
    table = {"model": T2I, "input": {"prompt": "prompt", "height": "height"}}
    stub.outcome = Outcome(422, problem("height", "Input should be a multiple of 8", "multiple_of"))
    model = queue_model("fal", table, PROMPT, SIZE, output="image")
    error = await refused(engine, queue_job(model, tmp_path, text="a fox", size="81x41"))

    assert ("remote_refused", "size") == (error.reason, error.field)


async def test_moderation(engine: FalEngine, stub: FalStub, tmp_path: Path) -> None:
    stub.refuses = "gore"
    error = await refused(engine, film(tmp_path, text="much gore"))

    assert ("content_refused", "text", False, True) == (
        error.reason,
        error.field,
        error.retryable,
        error.billed,
    )


# -- failed there -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("outcome", "retryable", "billed"),
    [
        (
            Outcome(
                503,
                {"detail": "Runner disconnected", "error_type": "runner_disconnected"},
                {},
                "503",
                "runner_disconnected",
            ),
            True,
            False,
        ),
        (
            Outcome(
                500,
                problem("", "Internal server error", "internal_server_error"),
                {"x-fal-retryable": "true"},
                "500",
            ),
            True,
            False,
        ),
        (
            Outcome(
                504,
                problem("", "Generation timeout", "generation_timeout"),
                {"x-fal-retryable": "false"},
                "504",
            ),
            False,
            False,
        ),
        (Outcome(500, HTML, {}, "Invalid status code: 500"), False, False),
        (Outcome(404, {"detail": "Path /turbo not found"}, {}, "Invalid status code: 404"), False, True),
        (Outcome(200, {"seed": 7}), False, True),
        (Outcome(200, {"video": {"url": "data:video/mp4;base64,%%%"}}), False, True),
    ],
)
async def test_failed_there(
    engine: FalEngine, stub: FalStub, job: RemoteJob, outcome: Outcome, retryable: bool, billed: bool
) -> None:
    stub.outcome = outcome
    error = await refused(engine, job)

    assert ("remote_failed", retryable, billed) == (error.reason, error.retryable, error.billed)


async def test_a_handle_that_cannot_be_read(engine: FalEngine, stub: FalStub, job: RemoteJob) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll("{", job)

    await engine.cancel("{")
    assert ("remote_lost", []) == (caught.value.reason, stub.seen)


# -- polls that say nothing -------------------------------------------------------------------------------------


async def test_a_result_that_is_not_there_yet(engine: FalEngine, stub: FalStub, job: RemoteJob) -> None:
    stub.polls = 0
    handle = await submitted(engine, job)
    stub.fail("GET", RESULT, Fault(400, {"detail": "Request is still in progress"}))

    assert isinstance(await engine.poll(handle, job), Underway)
    assert isinstance(await engine.poll(handle, job), Finished)


# -- later ------------------------------------------------------------------------------------------------------
