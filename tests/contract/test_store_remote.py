"""What every store promises of remotes: requests taken for them, their tasks, and what they cost."""

import pytest

from rushes.queue.base import Beat, Claim, Store, Take
from rushes.requests.ids import KeyId, RequestId, WorkerId
from rushes.requests.record import (
    Failure,
    Lease,
    Output,
    Progress,
    RemoteState,
    RemoteTask,
    Request,
    Source,
    WorkerRecord,
)
from support.stores import Place, submitted

W, W2 = WorkerId("w1"), WorkerId("w2")
WHY = Failure("worker_lost", "The worker died.")
URL = Source("url", "https://example.org/a.png", "image")
OUTPUT = Output("out/1.mp4", "video", "video/mp4", 1000, 64, 48)
SENT = RemoteTask("fal", "submitting", 1000.5)
TASK = RemoteTask("fal", "accepted", 1000.5, '{"id": "nul\0 ü \U0001f3ac"}', 0.125)
DAY = 86400.0


async def taken(store: Store, id_: RequestId, remote: str = "fal", **values: object) -> Lease:
    lease = await store.take(Take(id_, W, remote, **values))  # type: ignore[arg-type]
    assert isinstance(lease, Lease), lease
    return lease


async def at_remote(store: Store, task: RemoteTask = TASK, **values: object) -> Lease:
    """A new request that has a task."""
    lease = await taken(store, (await submitted(store, **values)).id, task.remote)
    assert await store.note(lease, task)
    return lease


async def record(store: Store, id_: RequestId) -> Request:
    got = await store.get(id_)
    assert got is not None
    return got


# -- waiting and take -------------------------------------------------------------------------------------
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


async def test_what_waits_is_listed_by_priority_then_arrival(store: Store) -> None:
    first = await submitted(store, model="a")
    second = await submitted(store, model="b")
    high = await submitted(store, model="a", priority=1)
    low = await submitted(store, model="b", priority=-1)
    await submitted(store, model="c", priority=9)
    found = await store.waiting(("a", "b", "a", "none"), 10)
    assert [high.id, first.id, second.id, low.id] == [r.id for r in found]
    assert found[0] == await record(store, high.id)
    assert [high.id, first.id, second.id] == [r.id for r in await store.waiting(("b", "a"), 3)]
    assert [high.id] == [r.id for r in await store.waiting(("b", "a"), 1)]
    assert [] == await store.waiting(("a",), 0)
    assert [] == await store.waiting(("a",), -1)
    assert [] == await store.waiting((), 9)


async def test_what_cannot_be_taken_does_not_wait_and_is_gone(store: Store) -> None:
    running = await submitted(store)
    assert await store.claim(Claim(W2, ("m",))) is not None
    cancelled = await submitted(store)
    await store.cancel(cancelled.id, None)
    pending = await submitted(store, sources={"a": URL})
    fetching = await submitted(store, model="fetch", sources={"a": URL})
    assert 1 == len(await store.claim_inputs(W2, ("fetch",), 1))
    noted = await at_remote(store)
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


# -- budgets ----------------------------------------------------------------------------------------------
async def test_a_budget_takes_what_fits_and_not_a_cent_more(store: Store) -> None:
    ids = [(await submitted(store)).id for _ in range(12)]
    for id_ in ids[:10]:
        await taken(store, id_, reserve_usd=0.1, budget_usd=1.0)
    assert pytest.approx(1.0) == await store.spent(None)
    assert "budget" == await store.take(Take(ids[10], W, "fal", 0.1, budget_usd=1.0))
    assert "budget" == await store.take(Take(ids[10], W, "fal", 0.0, budget_usd=1.0))
    assert "budget" == await store.take(Take(ids[10], W, "fal", 0.06, budget_usd=1.05))
    request = await record(store, ids[10])
    assert ("queued", 0, None, None) == (request.state, request.attempt, request.engine, request.worker)
    await taken(store, ids[10], reserve_usd=0.05, budget_usd=1.05)
    await taken(store, ids[11], reserve_usd=99.0)
    assert pytest.approx(100.05) == await store.spent(None)


async def test_what_costs_nothing_fits_while_something_is_left(store: Store) -> None:
    ids = [(await submitted(store)).id for _ in range(4)]
    await taken(store, ids[0], reserve_usd=0.0, budget_usd=0.5, key_budget_usd=0.5)
    await taken(store, ids[1], reserve_usd=0.4, budget_usd=0.5, key_budget_usd=0.5)
    await taken(store, ids[2], reserve_usd=0.0, budget_usd=0.5, key_budget_usd=0.5)
    assert "budget" == await store.take(Take(ids[3], W, "fal", 0.2, budget_usd=0.5))
    assert "key_budget" == await store.take(Take(ids[3], W, "fal", 0.2, key_budget_usd=0.5))


async def test_a_keys_budget_is_its_own_and_the_budget_is_everybodys(store: Store) -> None:
    one, two = await submitted(store, key="one"), await submitted(store, key="one")
    other, third = await submitted(store, key="other"), await submitted(store, key="third")
    budgets = {"budget_usd": 1.0, "key_budget_usd": 0.6}
    await taken(store, one.id, reserve_usd=0.5, **budgets)
    assert "key_budget" == await store.take(Take(two.id, W, "fal", 0.2, **budgets))
    await taken(store, other.id, reserve_usd=0.4, **budgets)
    assert "budget" == await store.take(Take(third.id, W, "fal", 0.2, **budgets))
    spent = [await store.spent(key and KeyId(key)) for key in ("one", "other", "third", "none", None)]
    assert pytest.approx([0.5, 0.4, 0.0, 0.0, 0.9]) == spent


async def test_what_settles_takes_the_place_of_what_was_reserved(store: Store) -> None:
    one, two = await submitted(store), await submitted(store)
    lease = await taken(store, one.id, reserve_usd=0.5, budget_usd=0.5)
    assert "budget" == await store.take(Take(two.id, W, "fal", 0.3, budget_usd=0.5))
    await store.settle(lease, "fal", 0.2)
    await store.settle(lease, "fal", 0.2)
    assert pytest.approx(0.2) == await store.spent(None)
    await taken(store, two.id, reserve_usd=0.3, budget_usd=0.5)
    await store.settle(lease, "fal", 2.5)
    assert pytest.approx(2.8) == await store.spent(KeyId("key"))
    await store.settle(lease, "fal", 0.0)
    assert pytest.approx(0.3) == await store.spent(None)


@pytest.mark.parametrize("outcome", ["succeed", "fail", "release"])
async def test_a_cost_settles_before_or_after_the_lease_has_ended(store: Store, outcome: str) -> None:
    lease = await taken(store, (await submitted(store)).id, reserve_usd=0.5)
    match outcome:
        case "succeed":
            assert await store.succeed(lease, [], 0.25)
        case "fail":
            assert await store.fail(lease, WHY)
        case _:
            assert await store.release(lease)
    assert 0.5 == await store.spent(None)
    await store.settle(lease, "fal", 0.25)
    assert 0.25 == await store.spent(None)


async def test_a_lost_lease_settles_nothing(store: Store) -> None:
    new = await submitted(store)
    lost = await taken(store, new.id, reserve_usd=0.5)
    assert "queued" == await store.lose(lost, WHY, 3)
    await taken(store, new.id, reserve_usd=0.25)
    await store.settle(lost, "fal", 9.0)
    await store.settle(lost, "other", 9.0)
    assert 0.25 == await store.spent(None)


async def test_what_was_reserved_before_at_this_remote_is_replaced_and_what_was_spent_is_not(
    store: Store,
) -> None:
    new = await submitted(store)
    assert await store.release(await taken(store, new.id, reserve_usd=0.4, budget_usd=0.5))
    assert 0.4 == await store.spent(None)
    # Its own reservation stands in nobody's way, a refused take leaves it as it is.
    assert "budget" == await store.take(Take(new.id, W, "fal", 0.6, budget_usd=0.5))
    assert 0.4 == await store.spent(None)
    second = await taken(store, new.id, reserve_usd=0.3, budget_usd=0.5, key_budget_usd=0.5)
    assert 0.3 == await store.spent(None)
    await store.settle(second, "fal", 0.1)
    assert await store.release(second)
    third = await taken(store, new.id, reserve_usd=0.2)
    assert pytest.approx(0.3) == await store.spent(None)
    assert await store.release(third)
    await taken(store, new.id, "other", reserve_usd=0.2)
    assert pytest.approx(0.5) == await store.spent(None)


async def test_a_day_has_its_own_budget_and_keeps_what_it_reserved(place: Place, store: Store) -> None:
    one, two = await submitted(store), await submitted(store)
    lease = await taken(store, one.id, reserve_usd=0.5, budget_usd=0.5)
    await place.age(DAY)
    assert 0.0 == await store.spent(None)
    await taken(store, two.id, reserve_usd=0.5, budget_usd=0.5)
    await store.settle(lease, "fal", 7.0)
    assert (0.5, 0.5) == (await store.spent(None), await store.spent(KeyId("key")))


async def test_what_was_reserved_yesterday_is_moved_by_a_new_take(place: Place, store: Store) -> None:
    new = await submitted(store)
    assert await store.release(await taken(store, new.id, reserve_usd=0.5))
    await place.age(DAY)
    lease = await taken(store, new.id, reserve_usd=0.4, budget_usd=0.4)
    await store.settle(lease, "fal", 0.3)
    assert 0.3 == await store.spent(None)


async def test_a_cost_that_nobody_reserved_counts_too(store: Store) -> None:
    await submitted(store, key="one")
    lease = await store.claim(Claim(W, ("m",)))
    assert lease is not None
    await store.settle(lease, "fal", 0.0)
    assert 0.0 == await store.spent(None)
    for _ in range(2):
        await store.settle(lease, "fal", 0.5)
    assert (0.5, 0.5) == (await store.spent(None), await store.spent(KeyId("one")))


@pytest.mark.parametrize("usd", [-0.01, float("nan"), float("inf")])
async def test_what_is_no_amount_of_money_is_refused(store: Store, usd: float) -> None:
    new = await submitted(store)
    for wrong in (
        Take(new.id, W, "fal", usd),
        Take(new.id, W, "fal", 0.0, usd),
        Take(new.id, W, "fal", 0, 0, usd),
    ):
        with pytest.raises(ValueError, match="USD"):
            await store.take(wrong)
    lease = await taken(store, new.id)
    with pytest.raises(ValueError, match="USD"):
        await store.settle(lease, "fal", usd)
    assert 0.0 == await store.spent(None)


# -- tasks ------------------------------------------------------------------------------------------------
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
    lease = await at_remote(store)
    assert set() == await store.renew([Beat(lease.request.id, lease.fence, Progress(0.5, "remote"))])
    got = await record(store, lease.request.id)
    assert (Progress(0.5, "remote"), TASK) == (got.progress, got.remote_task)


@pytest.mark.parametrize("way", ["lose", "release", "expire", "bury", "leave"])
async def test_a_task_goes_on_uncounted_whatever_becomes_of_its_worker(store: Store, way: str) -> None:
    lease = await at_remote(store)
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
        again = await store.resume(W, ("fal",))
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
    lease = await at_remote(store, priority=5)
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
    resumed = await store.resume(W, ("fal",))
    assert resumed is not None
    assert await store.note(resumed, None)
    assert await store.release(resumed)
    assert [id_, later.id] == [r.id for r in await store.waiting(("m",), 9)]
    assert "cancelled" == await store.cancel(id_, None)


async def test_behind_the_tasks_of_a_full_account_the_next_is_found(store: Store) -> None:
    """All three ways through a line pass over requests with tasks: plain, with and without a long stretch."""
    for _ in range(3):
        assert await store.release(await at_remote(store, account="a", priority=3))
    for _ in range(140):
        await submitted(store, account="full")
    assert await store.claim(Claim(W, ("m",))) is not None
    small = await submitted(store, account="a")
    lease = await store.claim(Claim(W, ("m",), account_limit=1))
    assert lease is not None
    assert small.id == lease.request.id
    assert await store.claim(Claim(W, ("m",), account_limit=1)) is None


# -- resume -----------------------------------------------------------------------------------------------
async def test_tasks_are_resumed_by_their_remotes_name_in_the_order_of_arrival(store: Store) -> None:
    mine = [await at_remote(store, model=model, priority=p) for p, model in ((0, "m"), (5, "n"))]
    other = await at_remote(store, RemoteTask("box", "submitting", 1.0))
    third = await at_remote(store, RemoteTask("fa", "accepted", 1.0, "fal"))
    for lease in (third, other, mine[1], mine[0]):
        assert await store.release(lease)
    await submitted(store)
    assert await store.resume(W2, ()) is None
    assert await store.resume(W2, ("Fal", "", "box2")) is None
    taken_up = [await store.resume(W2, ("none", "box", "fal")) for _ in range(4)]
    assert [mine[0].request.id, mine[1].request.id, other.request.id, None] == [
        lease and lease.request.id for lease in taken_up
    ]
    first = taken_up[0]
    assert first is not None
    request = first.request
    assert ("run", W2, mine[0].fence + 1) == (first.purpose, first.worker, first.fence)
    assert ("running", 1, W2, "fal", TASK) == (
        request.state,
        request.attempt,
        request.worker,
        request.engine,
        request.remote_task,
    )
    assert request == await record(store, request.id)
    assert not await store.note(mine[0], None)


async def test_a_resumed_lease_settles_what_the_first_one_reserved(place: Place, store: Store) -> None:
    lease = await taken(store, (await submitted(store)).id, reserve_usd=0.5)
    assert await store.note(lease, TASK)
    assert "queued" == await store.lose(lease, WHY, 1)
    assert 0.5 == await store.spent(None)
    resumed = await store.resume(W, ("fal",))
    assert resumed is not None
    assert 0.5 == await store.spent(None)
    await store.settle(lease, "fal", 9.0)
    await store.settle(resumed, "fal", 0.25)
    assert await store.succeed(resumed, [], 0.25)
    assert 0.25 == await store.spent(None)


async def test_a_task_that_ended_is_not_resumed(store: Store) -> None:
    for end in ("succeed", "fail"):
        lease = await at_remote(store)
        assert await (store.succeed(lease, [], None) if end == "succeed" else store.fail(lease, WHY))
    assert await store.resume(W, ("fal",)) is None


# -- workers and pace -------------------------------------------------------------------------------------
async def test_a_worker_tells_of_its_remotes(store: Store) -> None:
    states = (
        RemoteState("fal", "fal", ("m", "n"), 8),
        RemoteState("box", "openai-video", (), 1, "open", 1000.5, "no connection: nul\0 ü"),
    )
    one = WorkerRecord(W, "h", 1, 1, ("m",), "wan", "", 0, 0, 1.0, states)
    await store.join(one)
    assert [one] == await store.workers()
    none = WorkerRecord(W, "h", 1, 1, ("m",), "wan", "", 0, 0, 1.0)
    await store.join(none)
    assert [none] == await store.workers()


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
    remote = await at_remote(store, model="r")
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
