"""What goes wrong with the engine ``dashscope``, and whether it is told right, without the key."""

from pathlib import Path
from typing import Any

import pytest

from rushes.engines.remote.base import (
    Finished,
    RemoteRefused,
    RemoteUnavailable,
)
from rushes.engines.remote.configured import RemoteConfig, Secret
from rushes.engines.remote.dashscope import (
    DashScopeEngine,
)
from support.dashscope_jobs import job_for
from support.remote_dashscope import DashScopeStub
from support.remote_driving import finished, refused, submitted
from support.remote_stub import KEY, Fault, picture
from support.remote_vendors import DASHSCOPE, fixtures, said

stub, engine, _ = fixtures(DASHSCOPE)


# -- what goes wrong at the submit ----------------------------------------------------------------------------


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

    error = await refused(engine, job_for(tmp_path))

    assert (reason, retryable, False) == (error.reason, error.retryable, error.billed)
    assert f"these are its words ({code})" in error.message


async def test_moderation_refuses_what_was_made(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    error = await refused(engine, job_for(tmp_path, prompt="a disgusting thing"))

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

    error = await refused(engine, job_for(tmp_path))

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


async def test_another_engine_at_the_address_of_its_own_clients_goes_on_with_a_task(
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
