"""What every remote engine must do, in front of servers that answer as each vendor does."""

import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rushes.engines.remote.base import (
    Finished,
    RemoteEngine,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
    Underway,
)
from rushes.engines.remote.configured import RemoteConfig, Secret
from rushes.engines.remote.outputs import OutputNotFetched
from support.remote_driving import (
    CLOUDFLARE,
    brought,
    movie_shape,
    not_taken,
    refused,
    submitted,
    to_end,
)
from support.remote_stub import HTML, KEY, Fault, RemoteStub, running
from support.remote_vendors import GATEWAYS, VENDORS, Row, Vendor

every_vendor = pytest.mark.parametrize("vendor", VENDORS, ids=lambda vendor: vendor.kind)


def each(name: str, cases: Callable[[Vendor], Iterable[Any]]) -> pytest.MarkDecorator:
    """Each vendor with each of its cases, as the arguments ``vendor`` and ``name``."""
    pairs = [
        pytest.param(vendor, case, id=f"{vendor.kind}-{number}")
        for vendor in VENDORS
        for number, case in enumerate(cases(vendor))
    ]
    return pytest.mark.parametrize(("vendor", name), pairs)


def polled(cases: Callable[[Vendor], Iterable[Any]]) -> Callable[[Vendor], Iterable[Any]]:
    """Each case at each of the calls of a vendor's poll."""
    return lambda vendor: [(path, case) for path in vendor.polls for case in cases(vendor)]


@pytest.fixture
def stub(vendor: Vendor) -> Iterator[RemoteStub]:
    with running(vendor.made()) as started:
        yield started


@pytest.fixture
async def engine(vendor: Vendor, stub: RemoteStub) -> AsyncIterator[RemoteEngine]:
    made: RemoteEngine = vendor.connected(stub)
    yield made
    await made.close()


@pytest.fixture
def job(vendor: Vendor, tmp_path: Path) -> RemoteJob:
    return vendor.job(tmp_path)


# -- the good way -----------------------------------------------------------------------------------------------
@every_vendor
async def test_another_engine_goes_on_from_the_handle(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, tmp_path: Path
) -> None:
    handle = await submitted(engine, job)
    later = vendor.connected(stub)
    _, outcome = await to_end(later, handle, job)
    path = await brought(later, outcome.files[0], tmp_path / "out.mp4")
    await later.close()

    assert vendor.shape == movie_shape(path)
    assert (1, 1) == (len(outcome.files), len(stub.jobs))


@every_vendor
async def test_an_expired_output_has_a_fresh_address(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, tmp_path: Path
) -> None:
    for name, value in vendor.signing.items():
        setattr(stub, name, value)
    handle = await submitted(engine, job)
    _, outcome = await to_end(engine, handle, job)
    stub.expire()
    with pytest.raises(OutputNotFetched) as caught:
        await brought(engine, outcome.files[0], tmp_path / "out.mp4")
    assert caught.value.expired

    _, again = await to_end(engine, handle, job)
    assert vendor.shape == movie_shape(await brought(engine, again.files[0], tmp_path / "out.mp4"))


@every_vendor
async def test_it_serves_what_manifests_say(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob
) -> None:
    bare = msgspec.structs.replace(job.model, options={})

    assert engine.serves(job.model)
    assert vendor.needs_table is not engine.serves(bare)
    assert (vendor.name, vendor.kind, stub.url) == (engine.name, engine.kind, engine.origin)
    assert {"Authorization": stub.authorization.format(key=KEY)} == engine.headers()
    if vendor.needs_table:
        assert "model" == (await not_taken(engine, msgspec.structs.replace(job, model=bare))).trouble
        assert [] == stub.seen


@every_vendor
async def test_without_a_key_no_authorization_is_sent(vendor: Vendor, job: RemoteJob, tmp_path: Path) -> None:
    with running(vendor.made(key=None)) as stub:
        engine = vendor.connected(stub, None)
        _, outcome = await to_end(engine, await submitted(engine, job), job)
        assert vendor.shape == movie_shape(await brought(engine, outcome.files[0], tmp_path / "out.mp4"))
        await engine.close()

    assert [] == [call for call in stub.seen if "authorization" in call.headers]


# -- not taken --------------------------------------------------------------------------------------------------
PROXIES = (
    Row("throttled", Fault(429, HTML, {"Retry-After": "7"}), 7),
    Row("fault", Fault(503, HTML, {"Retry-After": "5"}), 5),
)


@each("row", lambda vendor: (*vendor.not_taken, *PROXIES))
async def test_what_is_not_taken_may_be_sent_again(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, row: Row
) -> None:
    stub.fail("POST", vendor.submit, row.fault)
    trouble = await not_taken(engine, job)

    assert (row.trouble, row.pause, {}) == (trouble.trouble, trouble.retry_after, stub.jobs)
    await submitted(engine, job)


@every_vendor
async def test_a_wrong_key_is_the_operators_and_stands_in_no_error(
    vendor: Vendor, stub: RemoteStub, job: RemoteJob
) -> None:
    wrong = "wrong-key-id:0123456789abcdef"
    stub.fail("POST", vendor.submit, vendor.refused_key(f"The key {wrong} is nobody's."))
    engine = vendor.connected(stub, wrong)
    told = [await not_taken(engine, job), await not_taken(engine, job)]
    await engine.close()

    assert ["key", "key"] == [one.trouble for one in told]
    assert "is nobody's" in told[0].why
    assert [] == [text for one in told for text in (one.why, repr(one)) if wrong in text]


@every_vendor
async def test_a_model_that_is_not_there_is_the_operators(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, tmp_path: Path
) -> None:
    trouble = await not_taken(engine, vendor.job(tmp_path, model=vendor.unknown))

    assert ("model", {}) == (trouble.trouble, stub.jobs)


@every_vendor
async def test_nobody_there(vendor: Vendor, stub: RemoteStub, job: RemoteJob, unused_tcp_port: int) -> None:
    engine = vendor.connected(stub, url=f"http://127.0.0.1:{unused_tcp_port}")

    assert "unreachable" == (await not_taken(engine, job)).trouble
    await engine.close()


@every_vendor
async def test_a_file_without_a_place_is_refused_and_not_sent(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, tmp_path: Path
) -> None:
    job = vendor.job(tmp_path, input={"prompt": "prompt"})
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(job)

    assert ("remote_refused", False, False) == (
        caught.value.reason,
        caught.value.retryable,
        caught.value.billed,
    )
    assert caught.value.field in job.files
    assert [] == stub.seen


# -- taken or not -----------------------------------------------------------------------------------------------
LOST = (Fault(lost=True), Fault(cut=20), Fault(drop=True), Fault(200, HTML))


@each("fault", lambda vendor: (*LOST, *vendor.unreadable))
async def test_a_lost_answer_is_never_sent_again(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, fault: Fault
) -> None:
    stub.fail("POST", vendor.submit, fault)
    with pytest.raises(SubmitUnknown, match=vendor.name) as caught:
        await engine.submit(job)

    assert KEY not in caught.value.why
    really = fault.lost or fault.after or fault.cut is not None
    assert (int(really), 1) == (sum(stub.submits.values()), len(stub.calls("POST", vendor.submit)))


SAID = {
    "page": HTML,
    "problem": CLOUDFLARE,
    "message": {"message": "Endpoint request timed out"},
    "detail": {"detail": "Bad gateway"},
}


@pytest.mark.parametrize("status", GATEWAYS)
@pytest.mark.parametrize("body", SAID.values(), ids=SAID)
@every_vendor
async def test_a_job_that_was_taken_is_unknown_whatever_a_gateway_says(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, status: int, body: Any
) -> None:
    if body is CLOUDFLARE:
        body = CLOUDFLARE | {"status": status, "error_code": status}
    stub.fail("POST", vendor.submit, Fault(status, body, after=True))
    with pytest.raises(SubmitUnknown, match=vendor.name) as caught:
        await engine.submit(job)

    assert KEY not in caught.value.why
    assert (1, 1) == (sum(stub.submits.values()), len(stub.calls("POST", vendor.submit)))


@pytest.mark.parametrize(
    "id_",
    ["", "..", "a b", "é", "a\x9b31m", "\u202ea", "a" * 201, "x" * 100_000, 7, None],
    ids=lambda id_: f"{id_!r:.12}",
)
@every_vendor
async def test_ids_that_are_none(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, id_: Any
) -> None:
    stub.fail("POST", vendor.submit, vendor.taken(id_))
    with pytest.raises(SubmitUnknown):
        await engine.submit(job)


# -- polls ------------------------------------------------------------------------------------------------------
UNSAID = (
    *(Row("fault", Fault(status, HTML)) for status in (200, 404, 405, 410, 502)),
    Row("fault", Fault(404, {"message": "no Route matched with those values"})),
    Row("fault", Fault(404, {"detail": "Not Found"})),
    Row("fault", Fault(404, CLOUDFLARE | {"status": 404, "detail": "The requested page was not found."})),
)


@each("at", polled(lambda vendor: (*vendor.unanswered, *UNSAID)))
async def test_a_poll_without_an_answer_decides_nothing(
    stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, at: tuple[str, Row]
) -> None:
    path, row = at
    stub.polls = 0
    handle = await submitted(engine, job)
    stub.fail("GET", path, row.fault)
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.poll(handle, job)

    assert (row.trouble, row.pause) == (caught.value.trouble, caught.value.retry_after)
    assert KEY not in caught.value.why
    assert isinstance(await engine.poll(handle, job), Finished)


@each("path", lambda vendor: vendor.polls)
async def test_a_broken_connection_at_a_poll_is_asked_again(
    stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, path: str
) -> None:
    stub.polls = 0
    handle = await submitted(engine, job)
    stub.fail("GET", path, Fault(drop=True), times=3)
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.poll(handle, job)

    assert "unreachable" == caught.value.trouble
    assert KEY not in caught.value.why
    assert 1 == len(stub.faults), "one of the three is left"
    assert isinstance(await engine.poll(handle, job), Finished), "at once"


@each("at", polled(lambda vendor: vendor.gone))
async def test_the_vendors_own_word_loses_a_job(
    stub: RemoteStub, engine: RemoteEngine, job: RemoteJob, at: tuple[str, Fault]
) -> None:
    stub.polls = 0
    handle = await submitted(engine, job)
    stub.fail("GET", *at)
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll(handle, job)

    assert ("remote_lost", False, True) == (caught.value.reason, caught.value.retryable, caught.value.billed)


@every_vendor
async def test_a_job_that_it_does_not_know_any_more_is_lost(
    stub: RemoteStub, engine: RemoteEngine, job: RemoteJob
) -> None:
    handle = await submitted(engine, job)
    stub.jobs.clear()
    with pytest.raises(RemoteRefused) as caught:
        await engine.poll(handle, job)

    assert ("remote_lost", False, True) == (caught.value.reason, caught.value.retryable, caught.value.billed)


# -- cancelling -------------------------------------------------------------------------------------------------
@every_vendor
async def test_a_cancelled_job_ends(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob
) -> None:
    stub.gate.clear()
    handle = await submitted(engine, job)
    await engine.cancel(handle)
    with pytest.raises(RemoteRefused) as caught:
        await to_end(engine, handle, job)

    assert (*vendor.cancelled, False) == (caught.value.reason, caught.value.billed, caught.value.retryable)
    assert 1 == len(stub.calls(*vendor.cancel))


@every_vendor
async def test_a_cancel_never_raises(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob
) -> None:
    handle = await submitted(engine, job)
    for fault in (Fault(500, HTML), Fault(drop=True), Fault(drop=True), Fault(404, HTML)):
        stub.fail(vendor.cancel[0], vendor.cancel[1], fault)
    for _ in range(4):
        await engine.cancel(handle)

    assert [] == stub.faults
    assert stub.jobs


# -- the key ----------------------------------------------------------------------------------------------------
ECHO = f"Invalid API-key provided: {KEY}. header was 'Authorization: Bearer {KEY}'"
ECHOES = dict.fromkeys(("code", "message", "error_code", "error_message", "error", "detail"), ECHO)
STATUSES = (200, 302, 400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 502, 503)


@each("body", lambda vendor: (vendor.refused_key(ECHO).body, ECHOES | vendor.taken(ECHO).body, ECHO, [ECHO]))
async def test_no_error_tells_the_key(
    vendor: Vendor,
    stub: RemoteStub,
    engine: RemoteEngine,
    job: RemoteJob,
    capfd: pytest.CaptureFixture[str],
    body: Any,
) -> None:
    config = RemoteConfig(vendor.name, vendor.kind, stub.url, Secret(KEY))
    told = [repr(engine), repr([vars(engine), vars(vars(engine)["_http"])]), repr(config), str(config)]
    handle = await submitted(engine, job)
    for status in STATUSES:
        stub.fail("POST", vendor.submit, Fault(status, body))
        stub.fail("GET", vendor.polls[0], Fault(status, body))
        with pytest.raises((RemoteRefused, RemoteUnavailable, SubmitUnknown)) as caught:
            await engine.submit(job)
        told += ["".join(traceback.format_exception(caught.value)), repr(caught.value)]
        try:
            answer = await engine.poll(handle, job)
        except (RemoteRefused, RemoteUnavailable) as error:
            told += ["".join(traceback.format_exception(error)), repr(error)]
        else:
            assert (200, Underway) == (status, type(answer))
            told += [repr(answer), str(answer)]
    assert [] == stub.faults

    told += capfd.readouterr()
    assert 4 * len(STATUSES) + 6 == len(told)
    assert [] == [text for text in told if KEY in text]


@every_vendor
async def test_a_failed_job_tells_its_words_without_the_key(
    vendor: Vendor, stub: RemoteStub, engine: RemoteEngine, job: RemoteJob
) -> None:
    vendor.fails(stub, ECHO)
    error = await refused(engine, job)

    assert "Invalid API-key provided" in error.message
    assert [] == [text for text in (error.message, str(error), repr(error)) if KEY in text]
