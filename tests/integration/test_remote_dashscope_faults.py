"""What goes wrong with the engine ``dashscope``, and whether it is told right, without the key."""

import json
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rushes.engines.remote.base import (
    Finished,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
    Underway,
)
from rushes.engines.remote.configured import RemoteConfig, Secret
from rushes.engines.remote.dashscope import (
    DashScopeEngine,
)
from rushes.engines.remote.outputs import OutputNotFetched
from rushes.media.inspect import check_image
from support.dashscope_jobs import SMALL, WAN_2_5, engine_for, fetched, finished, job_for, refusal, submitted
from support.remote_dashscope import DashScopeStub
from support.remote_stub import HTML, KEY, Fault, picture, running


@pytest.fixture
def stub() -> Iterator[DashScopeStub]:
    with running(DashScopeStub()) as started:
        yield started


@pytest.fixture
async def engine(stub: DashScopeStub) -> AsyncIterator[DashScopeEngine]:
    made = engine_for(stub)
    yield made
    await made.close()


# -- what goes wrong at the submit ----------------------------------------------------------------------------
def said(code: str, message: str = "these are its words") -> dict[str, str]:
    return {"request_id": "7574ee8f", "code": code, "message": message}


@pytest.mark.parametrize(
    ("status", "body", "headers", "trouble"),
    [
        (429, said("Throttling.RateQuota"), {"Retry-After": "7"}, "throttled"),
        (429, said("Throttling"), {}, "throttled"),
        (400, said("Throttling.AllocationQuota"), {}, "throttled"),
        (429, HTML, {"Retry-After": "7"}, "throttled"),
        (401, said("InvalidApiKey"), {}, "key"),
        (403, said("AccessDenied"), {}, "key"),
        (403, said("AccessDenied.Unpurchased"), {}, "model"),
        (404, said("ModelNotFound"), {}, "model"),
        (400, said("InvalidParameter", "Model not exist."), {}, "model"),
        (400, said("Arrearage"), {}, "funds"),
        (403, said("AllocationQuota.FreeTierOnly"), {}, "funds"),
        (500, said("InternalError"), {}, "fault"),
        (503, said("ModelServingError"), {}, "fault"),
        (503, HTML, {"Retry-After": "7"}, "fault"),
        (307, "", {"Location": "https://elsewhere.example/"}, "fault"),
    ],
)
async def test_nothing_was_taken(
    engine: DashScopeEngine,
    stub: DashScopeStub,
    tmp_path: Path,
    status: int,
    body: Any,
    headers: dict[str, str],
    trouble: str,
) -> None:
    stub.fail("POST", "synthesis", Fault(status, body, headers))

    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job_for(tmp_path))

    assert trouble == caught.value.trouble
    assert (7.0 if headers.get("Retry-After") else None) == caught.value.retry_after
    assert {} == stub.jobs
    await submitted(engine, job_for(tmp_path))  # and it goes on afterwards


@pytest.mark.parametrize(
    "fault",
    [
        Fault(lost=True),
        Fault(drop=True),
        Fault(502, HTML),
        Fault(504, HTML),
        Fault(500, HTML),
        Fault(500, said("InternalError.Timeout")),
        Fault(200, HTML),
        Fault(200, {"request_id": "7574ee8f"}),
        Fault(200, {"output": {"task_status": "PENDING"}}),
        Fault(200, {"output": {"task_id": "a b"}}),
        Fault(200, {"output": {"task_id": ".."}}),
        Fault(200, {"output": {"task_id": "x" * 201}}),
        Fault(200, {"output": {"task_id": 7}}),
        Fault(200, {"output": {"task_id": ""}} | said("Throttling")),
        Fault(200, said("SomethingNew")),
        Fault(200, said("InternalError.Timeout")),
        Fault(503, HTML),
        Fault(504, said("Throttling")),
        Fault(502, said("DataInspectionFailed")),
        Fault(cut=20),
    ],
    ids=str,
)
async def test_nobody_knows_whether_it_was_taken(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, fault: Fault
) -> None:
    stub.fail("POST", "synthesis", fault)

    with pytest.raises(SubmitUnknown):
        await engine.submit(job_for(tmp_path))

    assert len(stub.calls("POST", "synthesis")) == 1


def gateway(status: int) -> list[Any]:
    """What stands in front of an API says with this status: a page, an object with words alone, Cloudflare's."""
    return [
        HTML,
        {"message": "Service Unavailable"},
        {"type": f"https://developers.cloudflare.com/error-{status}/", "title": "Error", "error_code": status}
        | {"status": status, "cloudflare_error": True, "retryable": True, "retry_after": 120},
    ]


@pytest.mark.parametrize(
    ("status", "body"),
    [(status, body) for status in (500, 502, 503, 504, 520, 524) for body in gateway(status)],
)
async def test_a_task_that_was_taken_behind_a_gateways_error_is_not_sent_again(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, status: int, body: Any
) -> None:
    headers = {} if isinstance(body, str) else {"Retry-After": "120"}
    stub.fail("POST", "synthesis", Fault(status, body, headers, after=True))

    with pytest.raises(SubmitUnknown):
        await engine.submit(job_for(tmp_path))

    assert len(stub.jobs) == 1


@pytest.mark.parametrize("status", [502, 504, 520, 524])
async def test_a_gateways_status_outweighs_any_code(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, status: int
) -> None:
    stub.fail("POST", "synthesis", Fault(status, said("InternalError"), after=True))

    with pytest.raises(SubmitUnknown):
        await engine.submit(job_for(tmp_path))

    assert len(stub.jobs) == 1


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("Throttling.RateQuota", "throttled"),
        ("Arrearage", "funds"),
        ("InvalidApiKey", "key"),
        ("ModelNotFound", "model"),
        ("InternalError", "fault"),
        ("InvalidParameter", "remote_refused"),
        ("DataInspectionFailed", "content_refused"),
    ],
)
async def test_a_code_counts_though_the_status_says_that_all_is_well(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, code: str, outcome: str
) -> None:
    stub.fail("POST", "synthesis", Fault(200, said(code)))

    with pytest.raises((RemoteUnavailable, RemoteRefused)) as caught:
        await engine.submit(job_for(tmp_path))

    error = caught.value
    assert outcome == (error.trouble if isinstance(error, RemoteUnavailable) else error.reason)
    assert "these are its words" in str(error)


async def test_no_connection_is_nothing_taken(tmp_path: Path) -> None:
    with running(DashScopeStub()) as gone:
        config = RemoteConfig("studio", "dashscope", gone.url, Secret(KEY))
    engine = DashScopeEngine(config, seconds=5)

    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job_for(tmp_path))

    assert caught.value.trouble == "unreachable"


async def test_moderation_refuses_the_prompt(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(job_for(tmp_path, prompt="a forbidden thing"))

    assert ("content_refused", False, False) == (
        caught.value.reason,
        caught.value.retryable,
        caught.value.billed,
    )
    assert "Input data may contain inappropriate content." in caught.value.message


@pytest.mark.parametrize("code", ["InvalidParameter", "InvalidParameter.DataInspection", "InvalidURL"])
async def test_its_own_words_say_what_is_wrong_with_the_input(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, code: str
) -> None:
    stub.fail("POST", "synthesis", Fault(400, said(code, "The prompt is odd.\n See https://x.example/?key=1.")))

    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(job_for(tmp_path))

    assert caught.value.reason == "remote_refused"
    assert f"The prompt is odd. See https://x.example/ ({code})" in caught.value.message


async def test_a_model_without_a_table_is_not_served(engine: DashScopeEngine, tmp_path: Path) -> None:
    bare = msgspec.structs.replace(WAN_2_5, options={})

    assert not engine.serves(bare)
    with pytest.raises(RemoteUnavailable):
        await engine.submit(job_for(tmp_path, bare, prompt="x", aspect_ratio=SMALL))


# -- what goes wrong later ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "reason", "retryable"),
    [
        ("DataInspectionFailed", "content_refused", False),
        ("IPInfringementSuspect", "content_refused", False),
        ("InvalidParameter", "remote_refused", False),
        ("InvalidParameter.DataInspection", "remote_refused", False),
        ("InternalError.Algo", "remote_failed", True),
        ("InternalError.Timeout", "remote_failed", True),
        ("Throttling.User", "remote_failed", True),
        ("Arrearage", "remote_failed", True),
        ("SomethingNew", "remote_failed", False),
    ],
)
async def test_a_task_that_failed(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, code: str, reason: str, *, retryable: bool
) -> None:
    stub.failure = (code, "these are its words")

    error = await refusal(engine, job_for(tmp_path))

    assert (reason, retryable, False) == (error.reason, error.retryable, error.billed)
    assert f"these are its words ({code})" in error.message


async def test_moderation_refuses_what_was_made(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    error = await refusal(engine, job_for(tmp_path, prompt="a disgusting thing"))

    assert (error.reason, error.billed) == ("content_refused", False)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ({"results": [{"code": "DataInspectionFailed", "message": "no"}]}, "content_refused"),
        ({"results": [{"code": "InternalError.Timeout", "message": "no"}]}, "remote_failed"),
        ({"results": []}, "remote_failed"),
        ({"results": [{"url": None}, "odd"]}, "remote_failed"),
        ({}, "remote_failed"),
    ],
)
async def test_a_success_without_a_picture_is_none(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, output: dict[str, Any], reason: str
) -> None:
    stub.odd_output = output

    error = await refusal(engine, job_for(tmp_path))

    assert (reason, True) == (error.reason, error.billed)  # it may have been charged for


async def test_of_a_partial_success_the_pictures_are_taken(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    url = stub.output_url(picture(1280, 1280), "image/png")
    stub.odd_output = {"results": [{"code": "InternalError.Timeout", "message": "no"}, {"url": url}]}
    job = job_for(tmp_path)

    outcome = await finished(engine, await submitted(engine, job), job)

    assert [url] == [file.url for file in outcome.files]


async def test_of_very_many_addresses_a_few_are_taken(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    stub.odd_output = {"results": [{"url": f"{stub.url}/outputs/{number}.png"} for number in range(1000)]}
    job = job_for(tmp_path)

    outcome = await finished(engine, await submitted(engine, job), job)

    assert [f"{stub.url}/outputs/{number}.png" for number in range(16)] == [file.url for file in outcome.files]


@pytest.mark.parametrize("status", [200, 404])
async def test_a_task_that_is_not_known_yet_is_known_later(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, status: int
) -> None:
    stub.late = [status, status]
    job = job_for(tmp_path)
    handle = await submitted(engine, job)

    for _ in range(2):
        with pytest.raises(RemoteRefused) as caught:
            await engine.poll(handle, job)
        assert (caught.value.reason, caught.value.billed) == ("remote_lost", True)

    assert isinstance(await finished(engine, handle, job), Finished)


async def test_a_task_that_is_forgotten_is_lost(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll("0385dc79-5ff8-4d82-bcb6-4e6c3e3f9a2b", job_for(tmp_path))

    assert (caught.value.reason, caught.value.retryable, caught.value.billed) == ("remote_lost", False, True)


@pytest.mark.parametrize(
    ("fault", "trouble"),
    [
        (Fault(429, said("Throttling.RateQuota"), {"Retry-After": "3"}), "throttled"),
        (Fault(500, said("InternalError")), "fault"),
        (Fault(502, HTML), "fault"),
        (Fault(404, HTML), "fault"),
        (Fault(200, HTML), "fault"),
        (Fault(200, {"output": None}), "fault"),
        (Fault(401, said("InvalidApiKey")), "key"),
        (Fault(400, said("Arrearage")), "funds"),
    ],
    ids=str,
)
async def test_an_unanswered_poll_decides_nothing(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, fault: Fault, trouble: str
) -> None:
    job = job_for(tmp_path)
    handle = await submitted(engine, job)
    stub.fail("GET", "tasks", fault)

    with pytest.raises(RemoteUnavailable) as caught:
        await engine.poll(handle, job)

    assert trouble == caught.value.trouble
    assert isinstance(await finished(engine, handle, job), Finished)


async def test_a_broken_poll_is_asked_again_at_once(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    job = job_for(tmp_path)
    handle = await submitted(engine, job)
    stub.fail("GET", "tasks", Fault(drop=True))

    assert isinstance(await engine.poll(handle, job), Underway)


async def test_an_expired_address_is_asked_for_anew(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    stub.expired_outputs = 1
    job = job_for(tmp_path)
    handle = await submitted(engine, job)

    with pytest.raises(OutputNotFetched) as caught:
        await fetched(engine, await finished(engine, handle, job), tmp_path)
    path = await fetched(engine, await finished(engine, handle, job), tmp_path)

    assert caught.value.expired
    assert check_image(path, 10_000_000).width == 1024


async def test_another_engine_goes_on_with_a_task(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    job = job_for(tmp_path)
    handle = await submitted(engine, job)
    second = DashScopeEngine(RemoteConfig("studio", "dashscope", f"{stub.url}/api/v1", Secret(KEY)))

    assert isinstance(await finished(second, handle, job), Finished)
    await second.close()


async def test_a_waiting_task_is_cancelled_and_a_running_one_goes_on(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    stub.polls = 3
    waiting, running_ = job_for(tmp_path, prompt="one"), job_for(tmp_path, prompt="two")
    first, second = await submitted(engine, waiting), await submitted(engine, running_)
    await engine.poll(second, running_)
    await engine.poll(second, running_)

    await engine.cancel(first)
    await engine.cancel(second)
    stub.fail("POST", "cancel", Fault(drop=True))
    await engine.cancel(first)

    with pytest.raises(RemoteRefused, match="cancelled"):
        await engine.poll(first, waiting)
    assert isinstance(await finished(engine, second, running_), Finished)


# -- the key --------------------------------------------------------------------------------------------------
ECHO = f"Invalid API-key provided: {KEY}. header was 'Authorization: Bearer {KEY}'"


@pytest.mark.parametrize("body", [said("InvalidApiKey", ECHO), said(ECHO, ECHO), ECHO, [ECHO]], ids=range(4))
async def test_no_error_tells_the_key(
    engine: DashScopeEngine,
    stub: DashScopeStub,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    body: Any,
) -> None:
    config = RemoteConfig("studio", "dashscope", stub.url, Secret(KEY))
    told = [repr(engine), repr([vars(engine), vars(engine.__dict__["_http"])]), repr(config), str(config)]
    statuses = (200, 302, 400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 502, 503)
    for status in statuses:
        stub.fail("POST", "synthesis", Fault(status, body))
        stub.fail("GET", "tasks", Fault(status, body))
        for call in (engine.submit(job_for(tmp_path)), engine.poll("task", job_for(tmp_path))):
            with pytest.raises((RemoteRefused, RemoteUnavailable, SubmitUnknown)) as caught:
                await call
            told += ["".join(traceback.format_exception(caught.value)), repr(caught.value)]

    told += capfd.readouterr()
    assert len(told) == 4 * len(statuses) + 6
    assert [] == [text for text in told if KEY in text]


async def test_failed_tasks_do_not_tell_the_key(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    stub.failure = (KEY, ECHO)

    error = await refusal(engine, job_for(tmp_path))

    assert KEY not in json.dumps([error.message, repr(error)])


async def test_a_wrong_key_is_the_operators_to_mend(stub: DashScopeStub, tmp_path: Path) -> None:
    engine = DashScopeEngine(RemoteConfig("studio", "dashscope", stub.url, Secret("sk-another-key-1234")))

    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job_for(tmp_path))

    assert caught.value.trouble == "key"
    assert "sk-another-key-1234" not in caught.value.why
