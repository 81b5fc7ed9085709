"""The engine `openai-video` against servers that speak OpenAI's wire, each with its own habits, and LightX2V's."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from rushes.engines.remote.base import (
    Finished,
    RemoteJob,
    RemoteRefused,
    SubmitUnknown,
    Underway,
)
from rushes.engines.remote.openai_video import OpenAIVideoEngine
from rushes.engines.remote.outputs import OutputNotFetched, fetch_output
from rushes.media.fetch import FetchPolicy
from rushes.media.inspect import check_image, check_video
from rushes.requests.record import Progress
from support.remote_driving import brought, finished, picture_size, refused, submitted
from support.remote_openai import NAME, OpenAIStub, image_job, video_job
from support.remote_stub import HTML, Fault, picture
from support.remote_vendors import OPENAI, fixtures

PIXELS = 10_000_000
stub, engine, job = fixtures(OPENAI)
MAPPING = {"prompt": "prompt", "input_reference": "start_image"}


# -- videos -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flavour", ["vllm", "sglang"])
async def test_a_form_goes_over_and_the_video_comes_back(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob, tmp_path: Path, flavour: str
) -> None:
    stub.flavour, stub.needs_image, stub.polls = flavour, True, 2
    handle = await submitted(engine, job)
    [sent] = [one.body for one in stub.jobs.values()]
    assert {
        "model": NAME,
        "prompt": "Puppy, playing, happy, barking, joyful",
        "size": "64x48",
        "seconds": "1",
        "num_frames": "9",
        "fps": "16",
        "seed": "7",
        "num_inference_steps": "20",
        "guidance_scale": "4",
        "flow_shift": "8",
        "input_reference": "file",
        "files": {"input_reference": job.files["68_image"].path.read_bytes()},
    } == sent
    assert Underway(Progress(0.37)) == await engine.poll(handle, job)
    outcome = await finished(engine, handle, job)
    assert outcome.cost_usd is None
    info = check_video(await brought(engine, outcome.files[0], tmp_path / "fetched"), PIXELS)
    assert (64, 48, 9, 16) == (info.width, info.height, info.frames, info.fps)


async def test_openai_itself_takes_a_mapping_of_its_own_fields(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    stub.flavour, stub.poll_after = "openai", "2500"
    job = video_job(tmp_path, {"input": MAPPING | {"size": "'64x48'", "seconds": "4"}})
    handle = await submitted(engine, job)
    assert Underway(Progress(0.37), 2.5) == await engine.poll(handle, job)
    outcome = await finished(engine, handle, job)
    [sent] = [one.body for one in stub.jobs.values()]
    assert {"model": NAME, "size": "64x48", "seconds": "4"}.items() <= sent.items()
    assert {"input_reference": job.files["68_image"].path.read_bytes()} == sent["files"]
    info = check_video(await brought(engine, outcome.files[0], tmp_path / "fetched"), PIXELS)
    assert (64, 48) == (info.width, info.height)


async def test_extra_values_and_files_inside_of_values_go_along(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    mapping = {"prompt": "prompt", "image_reference": """'{"image_url": "' + start_image + '"}'"""}
    extra = {
        "boundary_ratio": 0.5,
        "extra_params": {"preencode_mp4": True},
        "enable_frame_interpolation": False,
    }
    job = video_job(tmp_path, {"input": mapping, "extra": extra})
    await submitted(engine, job)
    [sent] = [one.body for one in stub.jobs.values()]
    assert ("0.5", {"preencode_mp4": True}, "false") == (
        sent["boundary_ratio"],
        json.loads(sent["extra_params"]),
        sent["enable_frame_interpolation"],
    )
    uri = json.loads(sent["image_reference"])["image_url"]
    assert job.files["68_image"].path.read_bytes() == base64.b64decode(uri.partition("base64,")[2])
    assert sent["files"] == {}


async def test_a_video_in_a_bucket_is_fetched_there_without_the_key(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob, tmp_path: Path
) -> None:
    stub.flavour, stub.bucket = "sglang", True
    handle = await submitted(engine, job)
    outcome = await finished(engine, handle, job)
    stub.expire()
    with pytest.raises(OutputNotFetched) as caught:
        await brought(engine, outcome.files[0], tmp_path / "fetched")
    assert caught.value.expired
    outcome = await finished(engine, handle, job)
    assert 9 == check_video(await brought(engine, outcome.files[0], tmp_path / "fetched"), PIXELS).frames
    foreign = engine._video("https://bucket.example/1.mp4?X-Amz-Signature=1", "videos/1/content")
    assert not foreign.keyed


async def test_the_content_wants_the_key(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob, tmp_path: Path
) -> None:
    outcome = await finished(engine, await submitted(engine, job), job)
    with pytest.raises(OutputNotFetched):
        await fetch_output(
            outcome.files[0], tmp_path / "out", engine_origin=engine.origin, headers={}, policy=FetchPolicy()
        )
    assert (await brought(engine, outcome.files[0], tmp_path / "fetched")).stat().st_size > 0


# -- LightX2V -----------------------------------------------------------------------------------------------------
async def test_lightx2v_has_tasks_of_its_own(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    stub.flavour, stub.polls = "lightx2v", 2
    job = video_job(tmp_path, {"endpoint": "tasks"}, last=True)
    handle = await submitted(engine, job)
    [sent] = [one.body for one in stub.jobs.values()]
    for name, field in (("image_path", "68_image"), ("last_frame_path", "62_image")):
        content = sent.pop(name).partition("base64,")[2]
        assert job.files[field].path.read_bytes() == base64.b64decode(content)
    assert {
        "prompt": "Puppy, playing, happy, barking, joyful",
        "target_video_length": 9,
        "target_fps": 16,
        "seed": 7,
        "infer_steps": 20,
        "target_shape": [48, 64],
    } == sent
    assert Underway(Progress()) == await engine.poll(handle, job)
    info = check_video(
        await brought(engine, (await finished(engine, handle, job)).files[0], tmp_path / "fetched"), PIXELS
    )
    assert (64, 48, 9) == (info.width, info.height, info.frames)


async def test_lightx2v_fails_with_a_text(stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path) -> None:
    stub.flavour, stub.failure = "lightx2v", "CUDA out of memory"
    error = await refused(engine, video_job(tmp_path, {"endpoint": "tasks"}))
    assert ("remote_failed", "box: CUDA out of memory") == (error.reason, error.message)


async def test_a_task_of_lightx2v_can_be_cancelled(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    stub.flavour = "lightx2v"
    job = video_job(tmp_path, {"endpoint": "tasks"})
    handle = await submitted(engine, job)
    await engine.cancel(handle)
    with pytest.raises(RemoteRefused, match="cancelled"):
        await engine.poll(handle, job)


# -- images -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flavour", ["vllm", "sglang", "lightx2v"])
async def test_an_image_is_in_the_answer(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, flavour: str
) -> None:
    stub.flavour = flavour
    outcome = await engine.submit(image_job(tmp_path))
    assert isinstance(outcome, Finished)
    sent = stub.calls("POST", "/v1/images/generations")[0].json
    assert {
        "model": NAME,
        "prompt": "a harbour",
        "size": "100x50",
        "n": 1,
        "response_format": "b64_json",
    } == {name: value for name, value in sent.items() if name != "seed"}
    assert 0 <= sent["seed"] < 2**31
    [file] = outcome.files
    assert (100, 50) == file.size
    assert file.path is not None
    assert file.path.parent == tmp_path / "answers"
    info = check_image(await brought(engine, file, tmp_path / "as-it-is", conforming=False), PIXELS)
    assert (96, 48) == (info.width, info.height)
    assert (100, 50) == picture_size(await brought(engine, file, tmp_path / "as-asked"))


@pytest.mark.parametrize("form", ["url", "relative"])
async def test_an_image_may_be_an_address(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, form: str
) -> None:
    stub.images_as, stub.keyed_outputs = form, True
    outcome = await engine.submit(image_job(tmp_path, {"input": {"prompt": "prompt", "size": "'64x48'"}}))
    assert isinstance(outcome, Finished)
    assert {"model": NAME, "prompt": "a harbour", "size": "64x48"} == stub.seen[0].json
    path = await brought(engine, outcome.files[0], tmp_path / "fetched", conforming=False)
    assert path.read_bytes() == picture()


async def test_pictures_are_sent_as_files_to_be_edited(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    job = video_job(tmp_path, {"endpoint": "images"}, last=True)
    outcome = await engine.submit(job)
    assert isinstance(outcome, Finished)
    [sent] = [one.body for one in stub.jobs.values()]
    assert [
        ("image", job.files["68_image"].path.read_bytes()),
        ("image", job.files["62_image"].path.read_bytes()),
    ] == sent["files"]
    assert stub.calls("POST", "/v1/images/edits")


async def test_an_image_that_failed_is_not_begun_for_ever(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    stub.failure = "CUDA out of memory"
    with pytest.raises(RemoteRefused, match="out of memory") as caught:
        await engine.submit(image_job(tmp_path))
    assert ("remote_failed", False, True) == (
        caught.value.reason,
        caught.value.retryable,
        caught.value.billed,
    )


@pytest.mark.parametrize("body", [{"data": []}, {"data": None}, {"created": 1}])
async def test_an_answer_without_images_failed(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path, body: Any
) -> None:
    stub.fail("POST", "/images/", Fault(200, body))
    with pytest.raises(RemoteRefused, match="without any image"):
        await engine.submit(image_job(tmp_path))


async def test_an_image_that_broke_off_is_unknown(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    for fault in (Fault(lost=True), Fault(cut=200), Fault(200, HTML)):
        stub.fail("POST", "/images/", fault)
        with pytest.raises(SubmitUnknown):
            await engine.submit(image_job(tmp_path))


async def test_a_refused_prompt_of_an_image_is_told_apart(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    stub.flavour, stub.refuses = "openai", "forbidden"
    mapping = {"prompt": "prompt"}
    with pytest.raises(RemoteRefused, match="safety system") as caught:
        await engine.submit(image_job(tmp_path, {"input": mapping}, prompt="something forbidden"))
    assert ("content_refused", False) == (caught.value.reason, caught.value.retryable)


# -- submits that come to nothing -----------------------------------------------------------------------------------


async def test_a_refused_value_names_its_field(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    with pytest.raises(RemoteRefused, match="less than or equal to 200") as caught:
        await engine.submit(video_job(tmp_path, **{"57_steps": 300}))
    assert ("remote_refused", "57_steps") == (caught.value.reason, caught.value.field)
    stub.fail("POST", "/videos", Fault(400, {"error": {"message": "No such size.", "param": "size"}}))
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(video_job(tmp_path))
    assert caught.value.field == "71_widthx71_height"
    stub.flavour = "openai"
    with pytest.raises(RemoteRefused, match="Unknown parameter: 'flow_shift'") as caught:
        await engine.submit(video_job(tmp_path, {"input": MAPPING | {"flow_shift": "shift"}}))
    assert caught.value.field == "54_shift"
    assert stub.jobs == {}


# -- jobs that end badly ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("retryable", "failure"),
    [
        (False, {"code": 500, "message": "CUDA out of memory"}),
        (False, {"message": "CUDA out of memory"}),
        (True, {"code": "server_error", "message": "CUDA out of memory"}),
    ],
)
async def test_a_failed_job_keeps_its_words(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob, retryable: bool, failure: Any
) -> None:
    stub.failure = failure
    error = await refused(engine, job)
    assert ("remote_failed", "box: CUDA out of memory", retryable, True) == (
        error.reason,
        error.message,
        error.retryable,
        error.billed,
    )


async def test_moderated_content_is_told_apart(
    stub: OpenAIStub, engine: OpenAIVideoEngine, tmp_path: Path
) -> None:
    stub.flavour, stub.refuses = "openai", "forbidden"
    error = await refused(engine, video_job(tmp_path, {"input": MAPPING}, **{"6_text": "something forbidden"}))
    assert ("content_refused", True) == (error.reason, error.billed)
    assert "moderation" in error.message


# -- polls ------------------------------------------------------------------------------------------------------


async def test_a_lost_job_keeps_the_servers_words(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob
) -> None:
    handle = await submitted(engine, job)
    stub.jobs.clear()
    with pytest.raises(RemoteRefused, match="Video not found"):
        await engine.poll(handle, job)


@pytest.mark.parametrize(
    ("reason", "status"),
    [("remote_failed", "deleted"), ("remote_failed", "cancelled"), ("remote_lost", "expired")],
)
async def test_a_job_that_somebody_removed_has_ended(
    stub: OpenAIStub, engine: OpenAIVideoEngine, job: RemoteJob, reason: str, status: str
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", "/v1/videos/", Fault(200, {"id": "video_1", "status": status}))
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll(handle, job)
    assert caught.value.reason == reason
