"""What the native wire tells of a request that a remote engine ran."""

from typing import Any

import msgspec
import pytest

from rushes.queue.base import Take
from rushes.requests.ids import RequestId
from rushes.requests.record import Failure, Lease, Output, RemoteTask
from support.app import WORKER, App

TASK = RemoteTask("fal", "accepted", submitted_at=1.0, handle="r-1")


async def at_the_remote(app: App, task: RemoteTask = TASK) -> Lease:
    """A request that a remote has."""
    lease = await app.store.take(Take(RequestId(await app.submit()), WORKER, "fal", reserve_usd=0.1))
    assert isinstance(lease, Lease)
    assert await app.store.note(lease, task)
    return lease


async def ended(app: App, lease: Lease, *, cost: float | None, price: float | None) -> None:
    assert await app.store.note(lease, msgspec.structs.replace(TASK, cost_usd=cost))
    key = f"outputs/{lease.request.id}/1/1.png"
    await app.storage.put_bytes(key, b"0123456789", "image/png")
    assert await app.store.succeed(lease, [Output(key, "image", "image/png", 10, 1440, 810)], price)


async def result(app: App, lease: Lease, **params: str) -> dict[str, Any]:
    answer = await app.http.get(f"/v1/requests/{lease.request.id}/result", params=params)
    assert 200 == answer.status_code
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize(
    ("cost", "price", "told", "charged"),
    [
        (0.1, None, 0.1, 0.1),
        (0.1, 0.25, 0.1, 0.25),
        (0.1, 0.0, 0.1, 0.0),
        (0.0, None, 0.0, 0.0),
        (None, None, None, 0.0),
        (None, 0.25, None, 0.25),
    ],
)
async def test_the_engine_and_its_cost_are_in_the_result(
    app: App, cost: float | None, price: float | None, told: float | None, charged: float
) -> None:
    """The operator's price is what the caller pays; without one it is what the remote took."""
    lease = await at_the_remote(app)
    await ended(app, lease, cost=cost, price=price)
    plain = await result(app, lease)
    assert ("succeeded", "fal") == (plain["status"], plain["engine"])
    assert told == plain.get("engine_cost_usd")
    assert (told is not None) == ("engine_cost_usd" in plain)
    assert "cost" not in plain
    assert charged == (await result(app, lease, include_cost="true"))["cost"]


async def test_nothing_is_told_of_a_cost_before_the_end(app: App) -> None:
    lease = await at_the_remote(app, msgspec.structs.replace(TASK, cost_usd=0.1))
    early = await result(app, lease, include_cost="true")
    assert ("in_progress", "fal", 0.0) == (early["status"], early["engine"], early["cost"])
    assert "engine_cost_usd" not in early


async def test_a_failure_at_a_remote_is_told_with_what_it_took(app: App) -> None:
    lease = await at_the_remote(app, msgspec.structs.replace(TASK, cost_usd=0.1))
    assert await app.store.fail(lease, Failure("content_refused", "fal refuses the prompt."))
    failed = await result(app, lease, include_cost="true")
    assert ("failed", "fal", "content_refused") == (failed["status"], failed["engine"], failed["error"]["code"])
    assert (0.1, 0.1) == (failed["engine_cost_usd"], failed["cost"])


async def test_a_local_engine_has_no_cost_of_its_own(app: App) -> None:
    id_ = await app.submit()
    await app.produce(await app.claim())
    answer = (await app.http.get(f"/v1/requests/{id_}/result", params={"include_cost": "true"})).json()
    assert ("draft", 0.25) == (answer["engine"], answer["cost"])
    assert "engine_cost_usd" not in answer


async def test_nothing_of_the_remote_itself_reaches_the_caller(app: App) -> None:
    """Its own id of the job is the operator's."""
    lease = await at_the_remote(app, msgspec.structs.replace(TASK, handle="its-own-id"))
    for verb in ("status", "result"):
        text = (await app.http.get(f"/v1/requests/{lease.request.id}/{verb}")).text
        assert "its-own-id" not in text


async def test_what_waits_between_two_polls_cannot_be_cancelled(app: App) -> None:
    """Its worker was stopped: the request is in the queue again, and may have been paid for."""
    lease = await at_the_remote(app)
    assert await app.store.release(lease)
    answer = await app.http.post(f"/v1/requests/{lease.request.id}/cancel")
    assert 202 == answer.status_code
    expected = {"request_id": lease.request.id, "status": "in_queue", "outcome": "not_cancellable"}
    assert expected == answer.json()


async def test_the_engine_of_the_server_behind_is_told(app: App) -> None:
    lease = await at_the_remote(app)
    assert await app.store.note(lease, msgspec.structs.replace(TASK, engine="draft"))
    assert "remote_engine" not in await result(app, lease)
    assert await app.store.succeed(lease, [], None)
    found = await result(app, lease)
    assert ("fal", "draft") == (found["engine"], found["remote_engine"])
