"""The engine `runcomfy` against a server of the native wire, and against a Rushes."""

import asyncio
import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rushes.engines.remote import runcomfy
from rushes.engines.remote.base import (
    Finished,
    RemoteInput,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    Underway,
)
from rushes.engines.remote.configured import RemoteConfig, Secret
from rushes.engines.remote.runcomfy import RunComfyEngine
from rushes.media.inspect import check_image, check_video
from rushes.requests.record import Progress
from support.remote_driving import brought, finished, refused, submitted
from support.remote_runcomfy import FLF, T2I, RunComfyStub, model, remote_job
from support.remote_stub import Fault, movie, picture
from support.remote_vendors import RUNCOMFY, fixtures
from support.server import Server

PIXELS = 10_000_000
stub, engine, job = fixtures(RUNCOMFY)


# -- the good way -----------------------------------------------------------------------------------------------
async def test_a_request_goes_over_as_it_is_and_its_video_comes_back(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, tmp_path: Path
) -> None:
    stub.polls = 2
    handle = await submitted(engine, job)
    sent = stub.calls("POST", "/v1/models/")[0].json
    assert job.input.keys() == sent.keys()
    assert {k: v for k, v in job.input.items() if k not in job.files} == {
        k: v for k, v in sent.items() if k not in job.files
    }
    for name, file in job.files.items():
        head, body = sent[name].split(",")
        assert head == "data:image/png;base64"
        assert file.path.read_bytes() == base64.b64decode(body)
    assert Underway(Progress(stage="queued, place 3")) == await engine.poll(handle, job)
    assert Underway(Progress(0.42, "denoising", eta=3.5)) == await engine.poll(handle, job)
    outcome = await finished(engine, handle, job)
    assert outcome.cost_usd == 0.25
    info = check_video(await brought(engine, outcome.files[0], tmp_path / "fetched"), PIXELS)
    assert (64, 48, 5) == (info.width, info.height, info.frames)


async def test_an_image_comes_back_by_the_other_models_name(
    stub: RunComfyStub, engine: RunComfyEngine, tmp_path: Path
) -> None:
    other = model(T2I, runcomfy={"model": "wan-ai/wan-2-5/text-to-image", "input": {"prompt": "prompt + '!'"}})
    job = remote_job(other, tmp_path, prompt="a harbour")
    outcome = await finished(engine, await submitted(engine, job), job)
    assert {"prompt": "a harbour!"} == stub.calls("POST", "/v1/models/")[0].json
    info = check_image(await brought(engine, outcome.files[0], tmp_path / "fetched"), PIXELS)
    assert (64, 48) == (info.width, info.height)


async def test_all_files_of_the_models_kind_come_back_once(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    stub.content = [(movie(), "video/mp4"), (movie(frames=6), "video/mp4")]
    outcome = await finished(engine, await submitted(engine, job), job)
    assert list(stub.files) == [file.url.partition("?")[0].removeprefix(stub.url) for file in outcome.files]  # type: ignore[union-attr]


@pytest.mark.parametrize("given", ["own", "none", "elsewhere"])
async def test_addresses_are_followed_where_they_are_the_servers_own(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, given: str
) -> None:
    stub.urls = given != "none"
    stub.public = "http://192.0.2.1:1" if given == "elsewhere" else None
    handle = await submitted(engine, job)
    assert ("http://192.0.2.1:1" in handle) is False
    assert ("status_url" in handle or f"{stub.url}/v1/requests" in handle) is (given == "own")
    await finished(engine, handle, job)
    assert stub.calls("GET", "/result")


# -- input files ------------------------------------------------------------------------------------------------
async def test_users_addresses_go_over_where_the_table_says_so(
    stub: RunComfyStub, engine: RunComfyEngine, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    files = {"68_image": RemoteInput(path, "image/png", "https://example.com/a.png")}
    job = remote_job(model(FLF, runcomfy={"files": "url"}), tmp_path, files)
    await submitted(engine, job)
    sent = stub.calls("POST", "/v1/models/")[0].json
    assert sent["68_image"] == "https://example.com/a.png"
    assert sent["62_image"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("public", [True, False])
async def test_large_files_go_over_by_their_address_or_as_uploads(
    stub: RunComfyStub, engine: RunComfyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    monkeypatch.setattr(runcomfy, "DATA_BYTES", 1000)
    path = tmp_path / "large.png"
    path.write_bytes(picture(300, 300))
    assert path.stat().st_size > 1000
    files = {"68_image": RemoteInput(path, "image/png", "https://example.com/a.png" if public else None)}
    job = remote_job(model(FLF), tmp_path, files)
    await submitted(engine, job)
    sent = stub.calls("POST", "/v1/models/")[0].json["68_image"]
    if public:
        assert sent == "https://example.com/a.png"
        assert stub.uploads == {}
    else:
        assert {sent: path.read_bytes()} == stub.uploads


async def test_large_files_are_refused_where_there_are_no_uploads(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runcomfy, "DATA_BYTES", 10)
    stub.uploads = None
    with pytest.raises(RemoteRefused, match="public https:// address") as caught:
        await engine.submit(job)
    assert caught.value.reason == "remote_refused"
    assert caught.value.field in job.files
    assert stub.jobs == {}


async def test_an_upload_without_an_answer_leaves_nothing_undecided(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runcomfy, "DATA_BYTES", 10)
    stub.fail("POST", "/v1/files", Fault(lost=True))
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job)
    assert caught.value.trouble == "fault"
    assert stub.jobs == {}


# -- submits that come to nothing ---------------------------------------------------------------------------------


async def test_a_wrong_key_under_status_200_stands_in_no_error(stub: RunComfyStub, job: RemoteJob) -> None:
    stub.errors_under_200 = True
    wrong = RunComfyEngine(RemoteConfig("other", "runcomfy", stub.url, Secret("wrong-key-0123456789")))
    with pytest.raises(RemoteUnavailable) as caught:
        await wrong.submit(job)
    await wrong.close()
    assert caught.value.trouble == "key"
    assert "Send a valid API key" in caught.value.why
    assert "wrong-key" not in caught.value.why


async def test_a_model_that_is_not_there_under_status_200_is_the_operators(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    stub.known, stub.errors_under_200 = (T2I,), True
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job)
    assert caught.value.trouble == "model"


@pytest.mark.parametrize("under_200", [True, False])
async def test_a_refused_input_names_its_field(
    stub: RunComfyStub, engine: RunComfyEngine, tmp_path: Path, under_200: bool
) -> None:
    stub.errors_under_200 = under_200
    job = remote_job(model(FLF), tmp_path, **{"57_steps": 99})
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(job)
    assert ("remote_refused", "57_steps", False) == (
        caught.value.reason,
        caught.value.field,
        caught.value.retryable,
    )
    assert "57_steps is at most 20" in caught.value.message
    assert stub.jobs == {}


# -- jobs that end badly ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expected", "failure"),
    [
        (
            ("remote_refused", "68_image", False),
            {"code": "input_unreadable", "message": "It is cut off.", "field": "68_image"},
        ),
        (("remote_refused", None, False), {"code": "resolution_unusable", "message": "Too large."}),
        (("remote_failed", None, False), {"code": "model_unusable", "message": "Its manifest is wrong."}),
        (("remote_failed", None, False), {"code": "out_of_memory", "message": "Ask for less."}),
        (("remote_failed", None, True), {"code": "worker_lost", "message": "The worker stopped."}),
        (("remote_failed", None, False), "It went wrong."),
        (("remote_failed", None, False), [{"errorCode": 50001, "error": "It went wrong."}]),
        (("remote_failed", None, False), {}),
    ],
)
async def test_a_failed_result_keeps_its_words(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, expected: tuple[Any, ...], failure: Any
) -> None:
    stub.failure = failure
    error = await refused(engine, job)
    assert expected == (error.reason, error.field, error.retryable)
    said = failure.get("message", "no reason") if isinstance(failure, dict) else "It went wrong."
    assert said in error.message
    assert not error.billed, "the server says that it cost nothing"


async def test_a_failed_result_without_a_cost_may_have_cost_something(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    stub.failure, stub.cost = "It went wrong.", None
    assert (await refused(engine, job)).billed


async def test_refused_content_is_told_apart(
    stub: RunComfyStub, engine: RunComfyEngine, tmp_path: Path
) -> None:
    stub.refuses = "forbidden"
    job = remote_job(model(FLF), tmp_path, **{"6_text": "something forbidden"})
    assert (await refused(engine, job)).reason == "content_refused"


async def test_outputs_that_retention_removed_are_lost(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    stub.swept = True
    error = await refused(engine, job)
    assert ("remote_lost", True) == (error.reason, error.billed)


# -- polls ------------------------------------------------------------------------------------------------------


async def test_a_state_that_nobody_knows_decides_nothing(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", "/status", Fault(200, {"status": "strange"}))
    stub.fail("GET", "/result", Fault(200, {"status": "strange"}))
    assert Underway() == await engine.poll(handle, job)
    assert isinstance(await finished(engine, handle, job), Finished)


async def test_the_pause_that_the_server_asks_for_is_passed_on(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", "/status", Fault(200, {"request_id": "x", "status": "in_queue"}, {"Retry-After": "9"}))
    assert Underway(Progress(stage="queued"), 9.0) == await engine.poll(handle, job)


# -- a real Rushes ------------------------------------------------------------------------------------------------
async def test_another_rushes_makes_the_video(tmp_path: Path) -> None:
    server = Server(tmp_path / "other", engine="draft").start()
    try:
        engine = RunComfyEngine(RemoteConfig("other", "runcomfy", server.url, Secret(server.key)))
        smallest = {"71_widthx71_height": "480x480 (1:1)", "67_length": 81, "73_frame_rate": 24, "57_steps": 6}
        job = remote_job(model(FLF), tmp_path, **smallest)
        handle = await submitted(engine, job)
        while isinstance(outcome := await engine.poll(handle, job), Underway):
            await asyncio.sleep(0.05)
        assert outcome.cost_usd == 0.0
        info = check_video(await brought(engine, outcome.files[0], tmp_path / "fetched"), 10 * PIXELS)
        assert (480, 480, 81, 24) == (info.width, info.height, info.frames, info.fps)

        wrong = remote_job(model(FLF), tmp_path, **{"57_steps": 99})
        with pytest.raises(RemoteRefused) as caught:
            await engine.submit(wrong)
        assert ("remote_refused", "57_steps") == (caught.value.reason, caught.value.field)

        unknown = model(FLF, runcomfy={"model": "nobody/knows-this"})
        with pytest.raises(RemoteUnavailable) as trouble:
            await engine.submit(remote_job(unknown, tmp_path))
        assert trouble.value.trouble == "model"

        with pytest.raises(RemoteRefused) as lost:
            await engine.poll('{"id":"0198c0de-0000-7000-8000-000000000001"}', job)
        assert lost.value.reason == "remote_lost"

        stranger = RunComfyEngine(RemoteConfig("other", "runcomfy", server.url, Secret("rsh_wrong_0123456789")))
        with pytest.raises(RemoteUnavailable) as key:
            await stranger.submit(job)
        assert key.value.trouble == "key"
        await stranger.close()
        await engine.close()
    finally:
        server.stop()


async def test_a_handle_that_cannot_be_read(stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll("{", job)

    await engine.cancel("{")
    assert ("remote_lost", []) == (caught.value.reason, stub.seen)


async def test_a_server_whose_models_have_no_price_does_not_say_what_it_cost(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    stub.cost = 0.0
    priced = msgspec.structs.replace(job, model=model(FLF, runcomfy={"price_usd": 0.1}))
    handle = await submitted(engine, job)
    assert 0.0 == (await finished(engine, handle, job)).cost_usd
    assert (await finished(engine, handle, priced)).cost_usd is None
