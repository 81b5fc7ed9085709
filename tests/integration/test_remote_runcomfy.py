"""The engine `runcomfy` against a server of the native wire, and against a Rushes."""

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rushes.engines.remote import runcomfy
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
from rushes.engines.remote.configured import RemoteConfig, Secret
from rushes.engines.remote.outputs import OutputNotFetched, fetch_output
from rushes.engines.remote.runcomfy import RunComfyEngine
from rushes.media.fetch import FetchPolicy
from rushes.media.inspect import check_image, check_video
from rushes.requests.record import Progress
from support.remote_runcomfy import FLF, T2I, RunComfyStub, model, remote_job
from support.remote_stub import HTML, KEY, Fault, movie, picture, running
from support.server import Server

PIXELS = 10_000_000


@pytest.fixture
def stub() -> Iterator[RunComfyStub]:
    with running(RunComfyStub()) as started:
        yield started


@pytest.fixture
async def engine(stub: RunComfyStub) -> AsyncIterator[RunComfyEngine]:
    made = RunComfyEngine(RemoteConfig("other", "runcomfy", stub.url, Secret(KEY)), seconds=10)
    yield made
    await made.close()


@pytest.fixture
def job(tmp_path: Path) -> RemoteJob:
    return remote_job(model(FLF), tmp_path)


async def handed_over(engine: RunComfyEngine, job: RemoteJob) -> str:
    accepted = await engine.submit(job)
    assert isinstance(accepted, Accepted)
    return accepted.handle


async def finished(engine: RunComfyEngine, handle: str, job: RemoteJob) -> Finished:
    for _ in range(1000):
        answer = await engine.poll(handle, job)
        if isinstance(answer, Finished):
            return answer
        await asyncio.sleep(0.01)
    raise AssertionError("it does not end")


async def refused(engine: RunComfyEngine, job: RemoteJob) -> RemoteRefused:
    """The error with which a job ends that was accepted."""
    with pytest.raises(RemoteRefused) as caught:
        await finished(engine, await handed_over(engine, job), job)
    return caught.value


async def fetched(engine: RunComfyEngine, outcome: Finished, folder: Path) -> Path:
    """The first file, by the guarded fetcher."""
    dest = folder / "fetched"
    await fetch_output(
        outcome.files[0], dest, engine_origin=engine.origin, headers=engine.headers(), policy=FetchPolicy()
    )
    return dest


# -- the good way -----------------------------------------------------------------------------------------------
async def test_a_request_goes_over_as_it_is_and_its_video_comes_back(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, tmp_path: Path
) -> None:
    stub.polls = 2
    handle = await handed_over(engine, job)
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
    info = check_video(await fetched(engine, outcome, tmp_path), PIXELS)
    assert (64, 48, 5) == (info.width, info.height, info.frames)


async def test_an_image_comes_back_by_the_other_models_name(
    stub: RunComfyStub, engine: RunComfyEngine, tmp_path: Path
) -> None:
    other = model(T2I, runcomfy={"model": "wan-ai/wan-2-5/text-to-image", "input": {"prompt": "prompt + '!'"}})
    job = remote_job(other, tmp_path, prompt="a harbour")
    outcome = await finished(engine, await handed_over(engine, job), job)
    assert {"prompt": "a harbour!"} == stub.calls("POST", "/v1/models/")[0].json
    info = check_image(await fetched(engine, outcome, tmp_path), PIXELS)
    assert (64, 48) == (info.width, info.height)


async def test_all_files_of_the_models_kind_come_back_once(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    stub.content = [(movie(), "video/mp4"), (movie(frames=6), "video/mp4")]
    outcome = await finished(engine, await handed_over(engine, job), job)
    assert list(stub.files) == [file.url.partition("?")[0].removeprefix(stub.url) for file in outcome.files]  # type: ignore[union-attr]


@pytest.mark.parametrize("given", ["own", "none", "elsewhere"])
async def test_addresses_are_followed_where_they_are_the_servers_own(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, given: str
) -> None:
    stub.urls = given != "none"
    stub.public = "http://192.0.2.1:1" if given == "elsewhere" else None
    handle = await handed_over(engine, job)
    assert ("http://192.0.2.1:1" in handle) is False
    assert ("status_url" in handle or f"{stub.url}/v1/requests" in handle) is (given == "own")
    await finished(engine, handle, job)
    assert stub.calls("GET", "/result")


async def test_it_serves_every_model_and_shows_no_key(engine: RunComfyEngine, stub: RunComfyStub) -> None:
    assert engine.serves(model(FLF))
    assert engine.serves(model(T2I))
    assert engine.origin == stub.url
    assert {"Authorization": f"Bearer {KEY}"} == engine.headers()
    assert KEY not in repr(engine.__dict__)


async def test_without_a_key_no_authorization_is_sent(job: RemoteJob) -> None:
    with running(RunComfyStub(None)) as open_stub:
        engine = RunComfyEngine(RemoteConfig("open", "runcomfy", open_stub.url, None))
        await finished(engine, await handed_over(engine, job), job)
        await engine.close()
        assert all("authorization" not in call.headers for call in open_stub.seen)


# -- input files ------------------------------------------------------------------------------------------------
async def test_users_addresses_go_over_where_the_table_says_so(
    stub: RunComfyStub, engine: RunComfyEngine, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    files = {"68_image": RemoteInput(path, "image/png", "https://example.com/a.png")}
    job = remote_job(model(FLF, runcomfy={"files": "url"}), tmp_path, files)
    await handed_over(engine, job)
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
    await handed_over(engine, job)
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
FUNDS = {"error_code": 400002, "error_message": "Not enough balance."}
BUSY = {"error_code": 429002, "error_message": "This key has as many waiting requests as it may have."}
DOWN = {"error_code": 503001, "error_message": "The store cannot be reached."}
BROKEN = {"error_code": 500001, "error_message": "The server made a mistake."}


@pytest.mark.parametrize(
    ("trouble", "pause", "fault"),
    [
        ("throttled", 7, Fault(429, BUSY, {"Retry-After": "7"})),
        ("throttled", None, Fault(429, HTML)),
        ("funds", None, Fault(402, FUNDS)),
        ("funds", None, Fault(200, FUNDS)),
        ("fault", 2, Fault(503, DOWN, {"Retry-After": "2"})),
        ("fault", None, Fault(500, BROKEN)),
        ("fault", None, Fault(200, BROKEN)),
        ("fault", 5, Fault(503, HTML, {"Retry-After": "5"})),
        ("key", None, Fault(403, {"error_code": 403001, "error_message": "Not yours."})),
    ],
)
async def test_what_the_server_does_not_take_is_not_taken(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, trouble: str, pause: float | None, fault: Fault
) -> None:
    stub.fail("POST", "/v1/models/", fault)
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job)
    assert (trouble, pause) == (caught.value.trouble, caught.value.retry_after)
    assert stub.jobs == {}


@pytest.mark.parametrize(
    "fault",
    [Fault(lost=True), Fault(502, HTML), Fault(500, HTML), Fault(200, HTML), Fault(200, {}), Fault(cut=20)],
)
async def test_what_may_have_been_taken_is_said_to_be_unknown(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, fault: Fault
) -> None:
    stub.fail("POST", "/v1/models/", fault)
    with pytest.raises(SubmitUnknown, match="other"):
        await engine.submit(job)


async def test_a_server_that_is_not_there_has_taken_nothing(job: RemoteJob, unused_tcp_port: int) -> None:
    engine = RunComfyEngine(RemoteConfig("other", "runcomfy", f"http://127.0.0.1:{unused_tcp_port}", None))
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job)
    assert caught.value.trouble == "unreachable"


@pytest.mark.parametrize("under_200", [True, False])
async def test_a_wrong_key_is_the_operators_and_stands_in_no_error(
    stub: RunComfyStub, job: RemoteJob, under_200: bool
) -> None:
    stub.errors_under_200 = under_200
    wrong = RunComfyEngine(RemoteConfig("other", "runcomfy", stub.url, Secret("wrong-key-0123456789")))
    with pytest.raises(RemoteUnavailable) as caught:
        await wrong.submit(job)
    await wrong.close()
    assert caught.value.trouble == "key"
    assert "Send a valid API key" in caught.value.why
    assert "wrong-key" not in caught.value.why


@pytest.mark.parametrize("under_200", [True, False])
async def test_a_model_that_is_not_there_is_the_operators(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, under_200: bool
) -> None:
    stub.known, stub.errors_under_200 = (T2I,), under_200
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


async def test_a_job_that_waits_there_can_be_cancelled(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    handle = await handed_over(engine, job)
    await engine.cancel(handle)
    with pytest.raises(RemoteRefused, match="cancelled"):
        await engine.poll(handle, job)


async def test_a_cancel_never_raises(stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob) -> None:
    handle = await handed_over(engine, job)
    stub.fail("POST", "/cancel", Fault(500, HTML))
    await engine.cancel(handle)
    stub.fail("POST", "/cancel", Fault(drop=True), times=2)
    await engine.cancel(handle)
    assert len(stub.calls("POST", "/cancel")) >= 2


# -- polls ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("under_200", [True, False])
async def test_a_job_that_it_does_not_know_any_more_is_lost(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, under_200: bool
) -> None:
    handle = await handed_over(engine, job)
    stub.jobs.clear()
    stub.errors_under_200 = under_200
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll(handle, job)
    assert caught.value.reason == "remote_lost"


@pytest.mark.parametrize(
    ("trouble", "pause", "fault"),
    [
        ("throttled", 3, Fault(429, BUSY, {"Retry-After": "3"})),
        ("fault", None, Fault(502, HTML)),
        ("fault", None, Fault(500, BROKEN)),
        ("fault", None, Fault(404, HTML)),  # the page of a proxy whose server restarts
        ("fault", None, Fault(200, HTML)),
        ("key", None, Fault(401, {"error_code": 400004, "error_message": "Who are you?"})),
    ],
)
@pytest.mark.parametrize("verb", ["status", "result"])
async def test_a_poll_without_an_answer_decides_nothing(
    stub: RunComfyStub,
    engine: RunComfyEngine,
    job: RemoteJob,
    trouble: str,
    pause: float | None,
    fault: Fault,
    verb: str,
) -> None:
    stub.polls = stub.queued = 0
    handle = await handed_over(engine, job)
    stub.fail("GET", f"/{verb}", fault)
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.poll(handle, job)
    assert (trouble, pause) == (caught.value.trouble, caught.value.retry_after)
    assert isinstance(await engine.poll(handle, job), Finished)


async def test_a_state_that_nobody_knows_decides_nothing(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    handle = await handed_over(engine, job)
    stub.fail("GET", "/status", Fault(200, {"status": "strange"}))
    stub.fail("GET", "/result", Fault(200, {"status": "strange"}))
    assert Underway() == await engine.poll(handle, job)
    assert isinstance(await finished(engine, handle, job), Finished)


async def test_a_broken_connection_at_a_poll_is_asked_again(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    handle = await handed_over(engine, job)
    stub.fail("GET", "/status", Fault(drop=True), times=2)
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.poll(handle, job)
    assert caught.value.trouble == "unreachable"
    assert isinstance(await finished(engine, handle, job), Finished)


async def test_expired_addresses_are_fresh_after_another_poll(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, tmp_path: Path
) -> None:
    handle = await handed_over(engine, job)
    outcome = await finished(engine, handle, job)
    stub.expire()
    with pytest.raises(OutputNotFetched) as caught:
        await fetched(engine, outcome, tmp_path)
    assert caught.value.expired
    again = await engine.poll(handle, job)
    assert isinstance(again, Finished)
    assert (await fetched(engine, again, tmp_path)).read_bytes() == movie()


async def test_the_pause_that_the_server_asks_for_is_passed_on(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    handle = await handed_over(engine, job)
    stub.fail("GET", "/status", Fault(200, {"request_id": "x", "status": "in_queue"}, {"Retry-After": "9"}))
    assert Underway(Progress(stage="queued"), 9.0) == await engine.poll(handle, job)


# -- a real Rushes ------------------------------------------------------------------------------------------------
async def test_another_rushes_makes_the_video(tmp_path: Path) -> None:
    server = Server(tmp_path / "other", engine="draft").start()
    try:
        engine = RunComfyEngine(RemoteConfig("other", "runcomfy", server.url, Secret(server.key)))
        smallest = {"71_widthx71_height": "480x480 (1:1)", "67_length": 81, "73_frame_rate": 24, "57_steps": 6}
        job = remote_job(model(FLF), tmp_path, **smallest)
        handle = await handed_over(engine, job)
        outcome = await finished(engine, handle, job)
        assert outcome.cost_usd == 0.0
        info = check_video(await fetched(engine, outcome, tmp_path), 10 * PIXELS)
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
