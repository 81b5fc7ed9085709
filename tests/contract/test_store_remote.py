"""What every store promises of remotes: requests taken for them, and their tasks."""

import pytest

from rushes.queue.base import Beat, Claim, Store, Take
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import (
    Failure,
    Output,
    Progress,
    RemoteState,
    RemoteTask,
    Request,
    Source,
    WorkerRecord,
)
from support.stores import at_remote, record, submitted, taken

W, W2 = WorkerId("w1"), WorkerId("w2")
WHY = Failure("worker_lost", "The worker died.")
URL = Source("url", "https://example.org/a.png", "image")
OUTPUT = Output("out/1.mp4", "video", "video/mp4", 1000, 64, 48)
SENT = RemoteTask("fal", "submitting", 1000.5)
TASK = RemoteTask("fal", "accepted", 1000.5, '{"id": "nul\0 ü \U0001f3ac"}', "https://queue.fal.run", 0.125)
FAL = (TASK.remote, TASK.place)


# -- take ------------------------------------------------------------------------------------------------
async def test_a_take_takes_the_request_and_says_so(store: Store) -> None:
    await submitted(store, priority=5)
    new = await submitted(store, input=b'{"a":1}')
    lease = await taken(store, new.id)
    request = lease.request
    assert (new.id, W, "run", 1, b'{"a":1}') == (
        request.id,
        lease.worker,
        lease.purpose,
        lease.fence,
        request.input,
    )
    assert ("running", 1, W, "fal") == (request.state, request.attempt, request.worker, request.engine)
    assert request.started_at is not None
    assert request == await record(store, new.id)
    assert [(new.id, 1, W)] == [(mark.id, mark.fence, mark.worker) for mark in await store.leases()]
    assert await store.succeed(lease, [OUTPUT], 0.25)
    assert ("succeeded", 0.25) == ((got := await record(store, new.id)).state, got.cost_usd)


async def test_what_cannot_be_taken_does_not_wait_and_is_gone(store: Store) -> None:
    running = await submitted(store)
    assert await store.claim(Claim(W2, ("m",))) is not None
    cancelled = await submitted(store)
    await store.cancel(cancelled.id, None)
    pending = await submitted(store, sources={"a": URL})
    fetching = await submitted(store, model="fetch", sources={"a": URL})
    assert 1 == len(await store.claim_inputs(W2, ("fetch",), 1))
    noted = await at_remote(store, TASK)
    assert await store.release(noted)
    ids = [running.id, cancelled.id, pending.id, fetching.id, noted.request.id]
    ids += [RequestId("nothing"), RequestId("nul\0")]
    before = [await store.get(id_) for id_ in ids[:5]]
    assert ["gone"] * len(ids) == [await store.take(Take(id_, W, "fal", 0.5)) for id_ in ids]
    assert [] == await store.waiting(("m", "fetch"), 9)
    assert before == [await store.get(id_) for id_ in ids[:5]]
    assert 0.0 == await store.spent(None)


async def test_inputs_that_have_come_wait_for_a_remote_too(store: Store) -> None:
    new = await submitted(store, sources={"a": URL})
    (inputs,) = await store.claim_inputs(W, ("m",), 1)
    there = {"a": Source("url", URL.value, "image", key="k")}
    assert await store.inputs_ready(inputs, there)
    assert [new.id] == [r.id for r in await store.waiting(("m",), 9)]
    lease = await taken(store, new.id)
    assert (there, 2) == (lease.request.sources, lease.fence)


async def test_an_accounts_limit_counts_claims_and_takes_alike(store: Store) -> None:
    one, two, three = [await submitted(store) for _ in range(3)]
    other = await submitted(store, account="other")
    claimed = await store.claim(Claim(W, ("m",), account_limit=2))
    assert claimed is not None
    assert one.id == claimed.request.id
    assert "account" == await store.take(Take(two.id, W, "fal", 0.5, account_limit=1))
    assert ("queued", 0, None) == ((r := await record(store, two.id)).state, r.attempt, r.engine)
    assert 0.0 == await store.spent(None)
    await taken(store, two.id, account_limit=2)
    assert "account" == await store.take(Take(three.id, W, "fal", account_limit=2))
    await taken(store, other.id, account_limit=2)
    assert await store.claim(Claim(W, ("m",), account_limit=2)) is None
    assert await store.succeed(claimed, [], None)
    await taken(store, three.id, account_limit=2)


async def test_a_released_take_is_back_in_its_place_for_everybody(store: Store) -> None:
    first, second = await submitted(store), await submitted(store)
    lease = await taken(store, first.id)
    assert [second.id] == [r.id for r in await store.waiting(("m",), 9)]
    assert await store.release(lease)
    assert [first.id, second.id] == [r.id for r in await store.waiting(("m",), 9)]
    again = await store.claim(Claim(W2, ("m",), engine="wan"))
    assert again is not None
    assert (first.id, 1, "wan") == (again.request.id, again.request.attempt, again.request.engine)
    assert again.fence > lease.fence
    assert not await store.note(lease, TASK)


# -- tasks -----------------------------------------------------------------------------------------------
async def test_a_task_is_noted_changed_and_taken_off(store: Store) -> None:
    lease = await taken(store, (await submitted(store)).id)
    assert lease.request.remote_task is None
    for task in (SENT, TASK, TASK, None, None, TASK):
        assert await store.note(lease, task)
        got = await record(store, lease.request.id)
        assert (task, "running", 1, "fal") == (got.remote_task, got.state, got.attempt, got.engine)
    assert await store.succeed(lease, [OUTPUT], 0.5)
    assert TASK == (await record(store, lease.request.id)).remote_task
    assert [TASK] == [r.remote_task for r in await store.list_requests()]


async def test_only_the_holder_notes_and_only_while_it_runs(store: Store) -> None:
    new = await submitted(store)
    lost = await taken(store, new.id)
    assert await store.lose(lost, WHY, 3) == "queued"
    assert not await store.note(lost, TASK)
    lease = await taken(store, new.id)
    assert not await store.note(lost, TASK)
    assert (await record(store, new.id)).remote_task is None
    assert await store.fail(lease, WHY)
    assert not await store.note(lease, TASK)
    assert (await record(store, new.id)).remote_task is None
    fetching = await submitted(store, sources={"a": URL})
    (inputs,) = await store.claim_inputs(W, ("m",), 1)
    assert not await store.note(inputs, TASK)
    assert (await record(store, fetching.id)).remote_task is None


async def test_a_running_task_renews_its_lease_as_any_other(store: Store) -> None:
    lease = await at_remote(store, TASK)
    assert set() == await store.renew([Beat(lease.request.id, lease.fence, Progress(0.5, "remote"))])
    got = await record(store, lease.request.id)
    assert (Progress(0.5, "remote"), TASK) == (got.progress, got.remote_task)


@pytest.mark.parametrize("way", ["lose", "release", "expire", "bury", "leave"])
async def test_a_task_goes_on_uncounted_whatever_becomes_of_its_worker(store: Store, way: str) -> None:
    lease = await at_remote(store, TASK)
    request = lease.request
    await store.join(WorkerRecord(W, "h", 1, 1, ("m",), "wan", ""))
    for _ in range(3):
        match way:
            case "lose":
                assert "queued" == await store.lose(lease, WHY, 1)
            case "release":
                assert await store.release(lease)
            case "expire":
                assert 1 == await store.expire(await store.leases(), WHY, 1)
            case "bury":
                assert 1 == await store.bury(W, WHY, 1)
            case _:
                assert 1 == await store.leave(W)
        got = await record(store, request.id)
        assert ("queued", 0, TASK, None, None) == (
            got.state,
            got.attempt,
            got.remote_task,
            got.worker,
            got.failure,
        )
        again = await store.resume(W, [FAL], ("m",))
        assert again is not None
        assert (request.id, 1, TASK) == (again.request.id, again.request.attempt, again.request.remote_task)
        assert not await store.succeed(lease, [], None)
        lease = again
    assert await store.note(lease, None)
    assert "failed" == await store.lose(lease, WHY, 1)


async def test_without_a_task_a_lost_attempt_at_a_remote_counts(store: Store) -> None:
    new = await submitted(store)
    assert "queued" == await store.lose(await taken(store, new.id), WHY, 2)
    assert "failed" == await store.lose(await taken(store, new.id), WHY, 2)


async def test_a_task_is_in_no_line_and_cannot_be_cancelled(store: Store) -> None:
    lease = await at_remote(store, TASK, priority=5)
    id_ = lease.request.id
    assert "not_cancellable" == await store.cancel(id_, None)
    assert await store.release(lease)
    assert await store.claim(Claim(W, ("m",))) is None
    assert await store.claim(Claim(W, ("m",), account_limit=2)) is None
    assert [] == await store.claim_inputs(W, ("m",), 9)
    assert [] == await store.waiting(("m",), 9)
    assert "not_cancellable" == await store.cancel(id_, None)
    assert await store.cancel(id_, lease.request.account) == "not_cancellable"
    assert "queued" == (await record(store, id_)).state
    later = await submitted(store)
    for limit in (0, 2):
        claimed = await store.claim(Claim(W, ("m",), account_limit=limit))
        assert claimed is not None
        assert later.id == claimed.request.id
        assert await store.release(claimed)
    resumed = await store.resume(W, [FAL], ("m",))
    assert resumed is not None
    assert await store.note(resumed, None)
    assert await store.release(resumed)
    assert [id_, later.id] == [r.id for r in await store.waiting(("m",), 9)]
    assert "cancelled" == await store.cancel(id_, None)


async def test_behind_the_tasks_of_a_full_account_the_next_is_found(store: Store) -> None:
    """All three ways through a line pass over requests with tasks: plain, with and without a long stretch."""
    for _ in range(3):
        assert await store.release(await at_remote(store, TASK, account="a", priority=3))
    for _ in range(140):
        await submitted(store, account="full")
    assert await store.claim(Claim(W, ("m",))) is not None
    small = await submitted(store, account="a")
    lease = await store.claim(Claim(W, ("m",), account_limit=1))
    assert lease is not None
    assert small.id == lease.request.id
    assert await store.claim(Claim(W, ("m",), account_limit=1)) is None


# -- workers and pace ------------------------------------------------------------------------------------
async def test_a_worker_tells_of_its_remotes(store: Store) -> None:
    states = (
        RemoteState("fal", "fal", ("m", "n"), 8),
        RemoteState("box", "openai-video", (), 1, "open", 1000.5, "no connection: nul\0 ü"),
    )
    one = WorkerRecord(W, "h", 1, 1, ("m",), "wan", "", 0, 0, 1.0, states)
    await store.join(one)
    assert [one] == await store.workers()
    await store.join(WorkerRecord(W, "h", 1, 1, ("m",), "wan", "", 0, 0, 1.0))
    assert [WorkerRecord(W, "h", 1, 1, ("m",), "wan", "", 0, 1, 1.0)] == await store.workers()


async def test_pace_is_of_succeeded_runs_on_local_engines(store: Store) -> None:
    async def run(model: str, engine: str) -> Request:
        new = await submitted(store, model=model)
        lease = await store.claim(Claim(W, (model,), engine=engine))
        assert lease is not None
        assert await store.succeed(lease, [], None)
        return await record(store, new.id)

    assert {} == await store.pace(("m",))
    runs = [await run("m", "wan"), await run("m", "comfyui")]
    await run("n", "draft")
    await run("o", "wan")
    remote = await at_remote(store, TASK, model="r")
    assert await store.succeed(remote, [], None)
    await submitted(store, model="f")
    failed = await store.claim(Claim(W, ("f",), engine="wan"))
    assert failed is not None
    assert await store.fail(failed, WHY)
    durations = [(r.finished_at or 0.0) - (r.started_at or 0.0) for r in runs]
    found = await store.pace(("m", "n", "r", "f", "none"))
    assert {"m": pytest.approx(sum(durations) / 2, abs=1e-6)} == found
    assert {"m", "o"} == set(await store.pace(("o", "m")))
    assert {} == await store.pace(())
