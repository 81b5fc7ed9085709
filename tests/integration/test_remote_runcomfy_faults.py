"""The engine `runcomfy` before servers, and gateways in front of them, that answer what they should not."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from rushes.engines.remote import runcomfy
from rushes.engines.remote.base import (
    Accepted,
    Finished,
    RemoteInput,
    RemoteJob,
    RemoteRefused,
    Underway,
)
from rushes.engines.remote.configured import RemoteConfig, Secret, configured
from rushes.engines.remote.runcomfy import RunComfyEngine, at_runcomfy
from rushes.requests.record import Progress
from rushes.settings import Settings
from support.remote_driving import submitted
from support.remote_runcomfy import FLF, T2I, RunComfyStub, model, remote_job
from support.remote_stub import KEY, Fault, picture
from support.remote_vendors import GONE, RUNCOMFY, fixtures

stub, engine, job = fixtures(RUNCOMFY)
HOSTILE = ("https://[x", "https://\uff41\u2100/x.mp4")


async def ended(stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, result: Any) -> Finished | Underway:
    """What the engine makes of this result of a job that has ended."""
    stub.polls = stub.queued = 0
    handle = await submitted(engine, job)
    stub.fail("GET", "/result", Fault(200, result))
    return await engine.poll(handle, job)


# -- submits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["NO_SUCH_CODE", 7, 100001, True, "9" * 40])
async def test_an_error_that_nobody_knows_is_not_sent_again(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, code: Any
) -> None:
    stub.fail("POST", "/v1/models/", Fault(200, {"error_code": code, "error_message": "It cannot be."}))
    with pytest.raises(RemoteRefused, match="It cannot be") as caught:
        await engine.submit(job)
    assert caught.value.reason == "remote_refused"


@pytest.mark.parametrize("code", [0, None, ""])
async def test_a_code_for_no_error_is_none(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, code: Any
) -> None:
    stub.fail("POST", "/v1/models/", Fault(200, {"request_id": "r-1", "error_code": code}))
    assert isinstance(await engine.submit(job), Accepted)


@pytest.mark.parametrize("end", ["?token=SIGNED", "/" + "x" * 3000, "\nSIGNED", "/\u202e", "/\x9b31m"])
async def test_addresses_that_sign_or_are_no_plain_ones_are_not_kept(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, end: str
) -> None:
    urls = {f"{verb}_url": f"{stub.url}/v1/requests/r-1/{verb}{end}" for verb in ("status", "result", "cancel")}
    stub.fail("POST", "/v1/models/", Fault(200, {"request_id": "r-1", **urls}))
    assert '{"id":"r-1"}' == await submitted(engine, job)


# -- polls ------------------------------------------------------------------------------------------------------


async def test_a_failed_result_with_a_code_beside_it_has_failed(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    failed = {"request_id": "r-1", "status": "failed", "error_code": 500001, "error_message": "boom"}
    stub.fail("GET", "/status", Fault(200, failed))
    with pytest.raises(RemoteRefused, match=r"other: boom \(500001\)") as caught:
        await ended(stub, engine, job, failed)
    assert ("remote_failed", False, True) == (
        caught.value.reason,
        caught.value.retryable,
        caught.value.billed,
    )


@pytest.mark.parametrize("status", ["in_queue", "in_progress"])
async def test_a_state_counts_for_more_than_a_code(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, status: str
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", "/status", Fault(200, GONE | {"status": status}))
    assert isinstance(await engine.poll(handle, job), Underway)


async def test_a_state_that_nobody_knows_has_not_ended(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    assert Underway() == await ended(stub, engine, job, {"request_id": "r-1", "status": "archiving"})


@pytest.mark.parametrize("eta", [10**200, -1, "soon"])
async def test_what_is_told_of_a_job_is_bounded_and_cleaned(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, eta: Any
) -> None:
    handle = await submitted(engine, job)
    told = {"status": "in_progress", "progress": 10**300, "eta": eta}
    told["stage"] = f"at {KEY}\x1b[31m https://u:p@host.example/x?Signature=s1g " + "x" * 500
    stub.fail("GET", "/status", Fault(200, told))
    answer = await engine.poll(handle, job)
    assert isinstance(answer, Underway)
    progress = answer.progress
    assert (1.0, None, 60) == (progress.fraction, progress.eta, len(progress.stage))
    assert progress.stage.startswith("at *** [31m https://host.example/x xxx")
    stub.fail("GET", "/status", Fault(200, {"status": "in_queue", "queue_position": 10**300}))
    assert Underway(Progress(stage="queued")) == await engine.poll(handle, job)


# -- results ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("url", HOSTILE)
async def test_an_address_that_cannot_be_read_fails_the_request(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, url: str
) -> None:
    with pytest.raises(RemoteRefused, match="cannot be read") as caught:
        await ended(stub, engine, job, {"status": "succeeded", "output": {"videos": [url]}})
    assert ("remote_failed", True) == (caught.value.reason, caught.value.billed)


async def test_no_more_than_sixteen_outputs_come_here(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    urls = [f"https://cdn.example/{number}.mp4" for number in range(5000)]
    outcome = await ended(stub, engine, job, {"status": "succeeded", "output": {"videos": urls}})
    assert isinstance(outcome, Finished)
    assert urls[:16] == [file.url for file in outcome.files]


@pytest.mark.parametrize(
    ("believed", "cost"),
    [(0.0, 0), (10_000.0, 10_000), (None, 10_001), (None, 1e300), (None, 10**300), (None, -1), (None, "2.85")],
)
async def test_a_cost_that_cannot_be_is_not_believed(
    stub: RunComfyStub,
    engine: RunComfyEngine,
    job: RemoteJob,
    believed: float | None,
    cost: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = {"status": "succeeded", "output": {"video": "https://cdn.example/1.mp4"}, "cost": cost}
    outcome = await ended(stub, engine, job, result)
    assert isinstance(outcome, Finished)
    assert believed == outcome.cost_usd
    assert ("remote cost not believed" in capfd.readouterr().err) is (believed is None)


@pytest.mark.parametrize(("billed", "cost"), [(False, {"cost": 0.0}), (True, {"cost": 0.1}), (True, {})])
async def test_a_cancelled_request_may_have_cost_something(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob, billed: bool, cost: dict[str, float]
) -> None:
    with pytest.raises(RemoteRefused, match="cancelled") as caught:
        await ended(stub, engine, job, {"status": "cancelled", **cost})
    assert billed is caught.value.billed


# -- input files ------------------------------------------------------------------------------------------------
def test_runcomfy_itself_is_told_apart_from_others_of_its_wire() -> None:
    [own] = configured(Settings(remotes=("runcomfy",)), {"RUNCOMFY_TOKEN": "token-0123456789"})
    assert at_runcomfy(own.base_url)
    for other in ("https://rushes.example", "https://notruncomfy.net", "http://127.0.0.1:8000"):
        assert not at_runcomfy(other)


@pytest.mark.parametrize("files", ["data", None])
async def test_runcomfy_itself_gets_addresses_where_there_are_some(
    stub: RunComfyStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str | None
) -> None:
    monkeypatch.setattr(runcomfy, "VENDOR_DOMAIN", "0.0.1")
    engine = RunComfyEngine(RemoteConfig("runcomfy", "runcomfy", stub.url, Secret(KEY)))
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    given = {"68_image": RemoteInput(path, "image/png", "https://example.com/a.png")}
    job = remote_job(model(FLF, runcomfy={"files": files} if files else {}), tmp_path, given)
    await submitted(engine, job)
    await engine.close()
    sent = stub.calls("POST", "/v1/models/")[0].json
    assert sent["68_image"].startswith("data:" if files else "https://example.com/a.png")
    assert sent["62_image"].startswith("data:image/png;base64,")


async def test_a_file_that_a_mapping_leaves_out_is_refused_before_it_is_sent(
    stub: RunComfyStub, engine: RunComfyEngine, tmp_path: Path
) -> None:
    table = {"model": T2I, "input": {"prompt": "prompt", "image": "start_image"}}
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(remote_job(model(FLF, runcomfy=table), tmp_path))
    assert ("remote_refused", "62_image") == (caught.value.reason, caught.value.field)
    assert stub.seen == []


async def test_an_id_alone_is_enough_to_poll(
    stub: RunComfyStub, engine: RunComfyEngine, job: RemoteJob
) -> None:
    stub.polls = stub.queued = 0
    handle = await submitted(engine, job)
    only_id = msgspec.json.encode({"id": msgspec.json.decode(handle)["id"]}).decode()
    assert isinstance(await engine.poll(only_id, job), Finished)
