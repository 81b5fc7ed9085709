"""What every store promises of claims, leases, fences and workers."""

import pytest

from rushes.queue.base import Beat, Claim, Store
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import (
    Failure,
    Lease,
    LeaseMark,
    Output,
    Progress,
    Request,
    Source,
)
from support.stores import Place, submitted

W, W2 = WorkerId("w1"), WorkerId("w2")
WHY = Failure("worker_lost", "The worker died.")
URL = Source("url", "https://example.org/a.png", "image")
OUTPUT = Output("out/1.mp4", "video", "video/mp4", 1000, 64, 48, 81, 16.0, 5.0625)


async def claimed(store: Store, worker: WorkerId = W, **values: object) -> Lease:
    values.setdefault("models", ("m",))
    lease = await store.claim(Claim(worker, **values))  # type: ignore[arg-type]
    assert lease is not None
    return lease


async def fetched(store: Store, worker: WorkerId = W) -> Lease:
    (lease,) = await store.claim_inputs(worker, ("m",), 1)
    return lease


async def record(store: Store, id_: RequestId) -> Request:
    got = await store.get(id_)
    assert got is not None
    return got


# -- claim ------------------------------------------------------------------------------------------------
async def test_a_claim_takes_the_request_and_says_so(store: Store) -> None:
    new = await submitted(store, input=b'{"a":1}')
    lease = await claimed(store, engine="draft")
    request = lease.request
    assert (new.id, W, "run", b'{"a":1}') == (request.id, lease.worker, lease.purpose, request.input)
    assert ("running", 1, W, "draft") == (request.state, request.attempt, request.worker, request.engine)
    assert request.started_at is not None
    assert request == await record(store, new.id)
    assert await store.claim(Claim(W2, ("m",))) is None


async def test_first_come_first_served_within_a_priority(store: Store) -> None:
    first = await submitted(store)
    second = await submitted(store)
    high = await submitted(store, priority=1)
    low = await submitted(store, priority=-1)
    taken = [(await claimed(store)).request.id for _ in range(4)]
    assert [high.id, first.id, second.id, low.id] == taken


async def test_only_the_models_asked_for_are_claimed(store: Store) -> None:
    await submitted(store, model="a")
    b = await submitted(store, model="b")
    assert await store.claim(Claim(W, ())) is None
    assert await store.claim(Claim(W, ("c",))) is None
    assert b.id == (await claimed(store, models=("b", "c"))).request.id


async def test_the_warm_model_comes_first_whatever_the_priority_of_others(store: Store) -> None:
    await submitted(store, model="cold", priority=9)
    await submitted(store, model="cold")
    warm = await submitted(store, model="warm", priority=-3)
    lease = await claimed(store, models=("cold", "warm"), warm=("warm",), warm_age_bound=30.0)
    assert warm.id == lease.request.id


async def test_all_warm_models_are_alike_and_none_else_is(store: Store) -> None:
    cold = await submitted(store, model="cold", priority=9)
    first = await submitted(store, model="warm too")
    second = await submitted(store, model="warm")
    high = await submitted(store, model="warm too", priority=1)
    for limit in (0, 9):
        claim = Claim(W, ("cold", "warm", "warm too"), warm=("warm", "absent", "warm too"), account_limit=limit)
        leases = [lease for _ in range(4) if (lease := await store.claim(claim))]
        assert [high.id, first.id, second.id, cold.id] == [lease.request.id for lease in leases]
        for lease in leases:
            assert await store.release(lease)


async def test_beyond_the_age_bound_the_warm_model_has_no_preference(place: Place, store: Store) -> None:
    cold = await submitted(store, model="cold")
    await place.age(60)
    warm = await submitted(store, model="warm", priority=5)
    claim = Claim(W, ("cold", "warm"), warm=("warm",), warm_age_bound=30.0)
    first, second = await store.claim(claim), await store.claim(claim)
    assert first is not None
    assert second is not None
    assert [cold.id, warm.id] == [first.request.id, second.request.id]


async def test_among_the_aged_priority_and_arrival_decide(place: Place, store: Store) -> None:
    a = await submitted(store, model="a")
    b = await submitted(store, model="b", priority=1)
    warm = await submitted(store, model="warm")
    await place.age(60)
    taken = [
        (await claimed(store, models=("warm", "a", "b"), warm=("warm",), warm_age_bound=30.0)).request.id
        for _ in range(3)
    ]
    assert [b.id, a.id, warm.id] == taken


async def test_without_a_warm_model_age_does_not_overrule_priority(place: Place, store: Store) -> None:
    old = await submitted(store, model="a")
    await place.age(60)
    high = await submitted(store, model="b", priority=1)
    taken = [(await claimed(store, models=("a", "b"))).request.id for _ in range(2)]
    assert [high.id, old.id] == taken


async def test_a_full_account_is_passed_over_until_one_of_its_requests_ends(store: Store) -> None:
    ones = [await submitted(store, account="one") for _ in range(3)]
    two = await submitted(store, account="two")
    first = await claimed(store, account_limit=1)
    second = await claimed(store, account_limit=1)
    assert [ones[0].id, two.id] == [first.request.id, second.request.id]
    assert await store.claim(Claim(W, ("m",), account_limit=1)) is None
    assert await store.succeed(first, [], None)
    assert ones[1].id == (await claimed(store, account_limit=1)).request.id
    assert ones[2].id == (await claimed(store)).request.id


async def test_the_account_limit_counts_running_requests_of_all_models_and_workers(store: Store) -> None:
    await submitted(store, account="one", model="a")
    await submitted(store, account="one", model="b")
    await claimed(store, W, models=("a",), account_limit=1)
    assert await store.claim(Claim(W2, ("b",), account_limit=1)) is None
    assert await store.claim(Claim(W2, ("b",), account_limit=2)) is not None


async def test_behind_a_long_line_of_a_full_account_the_next_is_found(store: Store) -> None:
    for _ in range(300):
        await submitted(store, account="big")
    small = await submitted(store, account="small")
    small_high = await submitted(store, account="tiny", priority=-1)
    await claimed(store, account_limit=1)
    taken = [(await claimed(store, account_limit=1)).request.id for _ in range(2)]
    assert [small.id, small_high.id] == taken
    assert await store.claim(Claim(W, ("m",), account_limit=1)) is None


async def test_account_limits_keep_the_order_of_the_warm_and_the_aged(place: Place, store: Store) -> None:
    await submitted(store, account="full", model="cold")
    await claimed(store, models=("cold",))
    await submitted(store, account="full", model="cold")
    cold = await submitted(store, account="free", model="cold")
    await place.age(60)
    warm = await submitted(store, account="free", model="warm")
    claim = Claim(W, ("cold", "warm"), warm=("warm",), account_limit=1)
    first = await store.claim(claim)
    assert first is not None
    assert cold.id == first.request.id
    assert await store.claim(claim) is None
    assert await store.succeed(first, [], None)
    second = await store.claim(claim)
    assert second is not None
    assert warm.id == second.request.id


async def test_age_lifts_a_model_over_the_warm_one_and_no_account_over_another(
    place: Place, store: Store
) -> None:
    """Within a model priority decides, also among accounts with a limit."""
    old = await submitted(store, account="old", model="cold")
    await place.age(60)
    high = await submitted(store, account="young", model="cold", priority=5)
    warm = await submitted(store, account="young", model="warm")
    for limit in (0, 9):
        claim = Claim(W, ("cold", "warm"), warm=("warm",), warm_age_bound=30.0, account_limit=limit)
        leases = [lease for _ in range(3) if (lease := await store.claim(claim))]
        assert [warm.id, high.id, old.id] == [lease.request.id for lease in leases]
        for lease in leases:
            assert await store.release(lease)


# -- outcomes and fences ----------------------------------------------------------------------------------
async def test_succeed_stores_the_outcome(store: Store) -> None:
    new = await submitted(store)
    lease = await claimed(store, engine="draft")
    assert await store.succeed(lease, [OUTPUT], 0.25)
    got = await record(store, new.id)
    assert ("succeeded", (OUTPUT,), 0.25, 1, "draft", None) == (
        got.state,
        got.outputs,
        got.cost_usd,
        got.attempt,
        got.engine,
        got.failure,
    )
    assert got.started_at is not None
    assert got.finished_at is not None
    assert got.finished_at >= got.started_at
    assert [] == await store.leases()


async def test_fail_stores_the_failure(store: Store) -> None:
    new = await submitted(store)
    lease = await claimed(store)
    failure = Failure("engine_failed", "Bad luck.", node="7", field="prompt")
    assert await store.fail(lease, failure)
    got = await record(store, new.id)
    assert ("failed", failure, (), None) == (got.state, got.failure, got.outputs, got.cost_usd)
    assert got.finished_at is not None


async def test_a_second_outcome_is_refused_and_changes_nothing(store: Store) -> None:
    new = await submitted(store)
    lease = await claimed(store)
    assert await store.succeed(lease, [OUTPUT], None)
    before = await record(store, new.id)
    assert not await store.succeed(lease, [], 1.0)
    assert not await store.fail(lease, WHY)
    assert await store.lose(lease, WHY, 3) is None
    assert not await store.release(lease)
    assert {new.id} == await store.renew([Beat(new.id, lease.fence)])
    assert before == await record(store, new.id)


async def test_a_zombies_outcome_is_refused_after_expire(store: Store) -> None:
    """The zombie's lease was expired and the request is with somebody else, then ended by them."""
    new = await submitted(store)
    zombie = await claimed(store)
    assert 1 == await store.expire(await store.leases(), WHY, 3)
    assert not await store.succeed(zombie, [OUTPUT], None)
    assert "queued" == (await record(store, new.id)).state
    heir = await claimed(store, W2)
    assert heir.fence > zombie.fence
    before = await record(store, new.id)
    assert not await store.succeed(zombie, [OUTPUT], None)
    assert not await store.fail(zombie, WHY)
    assert await store.lose(zombie, WHY, 1) is None
    assert not await store.release(zombie)
    assert not await store.inputs_ready(zombie, {})
    assert not await store.refuse(zombie, WHY)
    assert {new.id} == await store.renew([Beat(new.id, zombie.fence, Progress(0.9))])
    assert before == await record(store, new.id)
    assert await store.succeed(heir, [], None)
    assert not await store.fail(zombie, WHY)
    assert "succeeded" == (await record(store, new.id)).state


async def test_the_fence_grows_with_every_lease_also_where_the_attempt_does_not(store: Store) -> None:
    await submitted(store, sources={"a": URL})
    fences = []
    inputs = await fetched(store)
    fences.append(inputs.fence)
    assert await store.release(inputs)
    inputs = await fetched(store)
    fences.append(inputs.fence)
    assert await store.inputs_ready(inputs, {"a": URL})
    for _ in range(3):
        lease = await claimed(store)
        assert 1 == lease.request.attempt
        fences.append(lease.fence)
        assert await store.release(lease)
    assert sorted(set(fences)) == fences


# -- renew ------------------------------------------------------------------------------------------------
async def test_renew_moves_the_beat_and_keeps_the_last_progress(store: Store) -> None:
    new = await submitted(store)
    lease = await claimed(store)
    (before,) = await store.leases()
    assert LeaseMark(new.id, lease.fence, before.beat, W) == before
    assert set() == await store.renew([Beat(new.id, lease.fence, Progress(0.5, "sampling"))])
    assert set() == await store.renew([Beat(new.id, lease.fence)])
    (after,) = await store.leases()
    assert before.beat + 2 == after.beat
    assert Progress(0.5, "sampling") == (await record(store, new.id)).progress


async def test_renew_names_only_the_lost_leases(store: Store) -> None:
    ids = [(await submitted(store)).id for _ in range(3)]
    leases = [await claimed(store) for _ in range(3)]
    assert await store.release(leases[1])
    unknown = RequestId("no such request")
    beats = [Beat(x.request.id, x.fence) for x in leases] + [Beat(unknown, 1)]
    assert {ids[1], unknown} == await store.renew(beats)
    assert set() == await store.renew([])


async def test_a_new_attempt_starts_without_the_progress_of_the_old(store: Store) -> None:
    new = await submitted(store)
    lease = await claimed(store)
    await store.renew([Beat(new.id, lease.fence, Progress(0.5))])
    assert "queued" == await store.lose(lease, WHY, 3)
    assert (await record(store, new.id)).progress is None
    assert (await claimed(store)).request.progress is None


# -- lose, release, expire --------------------------------------------------------------------------------
async def test_a_lost_attempt_counts_and_fails_at_the_limit(store: Store) -> None:
    new = await submitted(store)
    for attempt in (1, 2):
        lease = await claimed(store)
        assert attempt == lease.request.attempt
        assert "queued" == await store.lose(lease, WHY, 3)
        got = await record(store, new.id)
        assert ("queued", attempt, None, None) == (got.state, got.attempt, got.worker, got.failure)
    assert "failed" == await store.lose(await claimed(store), WHY, 3)
    got = await record(store, new.id)
    assert ("failed", 3, WHY) == (got.state, got.attempt, got.failure)
    assert got.finished_at is not None


async def test_a_lost_request_keeps_its_place_in_the_queue(store: Store) -> None:
    first = await submitted(store)
    await submitted(store)
    assert "queued" == await store.lose(await claimed(store), WHY, 3)
    assert first.id == (await claimed(store)).request.id


async def test_a_released_attempt_does_not_count(store: Store) -> None:
    new = await submitted(store)
    for _ in range(5):
        assert await store.release(await claimed(store))
    got = await record(store, new.id)
    assert ("queued", 0, None) == (got.state, got.attempt, got.worker)
    assert 1 == (await claimed(store)).request.attempt


async def test_expire_spares_a_lease_whose_beat_moved_on(store: Store) -> None:
    alive, dead = await submitted(store), await submitted(store)
    leases = {(x := await claimed(store)).request.id: x for _ in range(2)}
    marks = await store.leases()
    assert set() == await store.renew([Beat(alive.id, leases[alive.id].fence)])
    assert 1 == await store.expire(marks, WHY, 3)
    assert "running" == (await record(store, alive.id)).state
    assert "queued" == (await record(store, dead.id)).state
    assert 0 == await store.expire(marks, WHY, 3)
    assert 0 == await store.expire([], WHY, 3)


async def test_expire_spares_a_lease_of_a_later_fence(store: Store) -> None:
    new = await submitted(store)
    first = await claimed(store)
    marks = await store.leases()
    assert await store.release(first)
    await claimed(store, W2)
    assert 0 == await store.expire(marks, WHY, 3)
    assert "running" == (await record(store, new.id)).state


async def test_expire_fails_at_the_attempt_limit(store: Store) -> None:
    new = await submitted(store)
    await claimed(store)
    assert 1 == await store.expire(await store.leases(), WHY, 1)
    got = await record(store, new.id)
    assert ("failed", WHY, 1) == (got.state, got.failure, got.attempt)


# -- inputs -----------------------------------------------------------------------------------------------
async def test_inputs_are_taken_oldest_first_and_only_once(store: Store) -> None:
    await submitted(store)
    await submitted(store, model="other", sources={"a": URL})
    ids = [(await submitted(store, sources={"a": URL}, priority=i)).id for i in range(3)]
    leases = await store.claim_inputs(W, ("m",), 2)
    assert ids[:2] == [x.request.id for x in leases]
    assert {("inputs", "fetching", "queued", W)} == {
        (x.purpose, x.request.inputs, x.request.state, x.request.worker) for x in leases
    }
    assert ids[2:] == [x.request.id for x in await store.claim_inputs(W2, ("m",), 9)]
    assert [] == await store.claim_inputs(W2, ("m",), 9)
    assert [] == await store.claim_inputs(W2, ("other",), 0)


async def test_a_request_is_claimed_only_when_its_inputs_are_ready(store: Store) -> None:
    new = await submitted(store, sources={"a": URL})
    assert await store.claim(Claim(W, ("m",))) is None
    lease = await fetched(store)
    assert await store.claim(Claim(W, ("m",))) is None
    done = {"a": Source("url", URL.value, "image", key="inputs/x", content_type="image/png")}
    assert await store.inputs_ready(lease, done)
    got = await record(store, new.id)
    assert ("queued", "ready", done, None, 0) == (
        got.state,
        got.inputs,
        got.sources,
        got.worker,
        got.attempt,
    )
    assert [] == await store.leases()
    run = await claimed(store)
    assert (new.id, done) == (run.request.id, run.request.sources)
    assert not await store.inputs_ready(lease, {})
    assert done == (await record(store, new.id)).sources


async def test_a_request_can_be_cancelled_while_its_inputs_are_fetched(store: Store) -> None:
    new = await submitted(store, sources={"a": URL})
    lease = await fetched(store)
    assert "cancelled" == await store.cancel(new.id, None)
    before = await record(store, new.id)
    assert {new.id} == await store.renew([Beat(new.id, lease.fence)])
    assert not await store.inputs_ready(lease, {"a": URL})
    assert not await store.refuse(lease, WHY)
    assert await store.lose(lease, WHY, 3) is None
    assert not await store.release(lease)
    assert [] == await store.leases()
    assert before == await record(store, new.id)


async def test_bad_inputs_end_the_request_before_any_attempt(store: Store) -> None:
    new = await submitted(store, sources={"a": URL})
    lease = await fetched(store)
    bad = Failure("input_not_media", "That is a login page.", field="a")
    assert await store.refuse(lease, bad)
    got = await record(store, new.id)
    assert ("failed", bad, 0, None) == (got.state, got.failure, got.attempt, got.started_at)
    assert got.finished_at is not None
    assert not await store.refuse(lease, bad)


@pytest.mark.parametrize("how", ["lose", "release", "expire", "leave", "bury"])
async def test_ended_inputs_leases_are_fetched_again_whatever_the_limit(store: Store, how: str) -> None:
    new = await submitted(store, sources={"a": URL})
    lease = await fetched(store)
    if how == "lose":
        assert "queued" == await store.lose(lease, WHY, 0)
    elif how == "release":
        assert await store.release(lease)
    elif how == "expire":
        assert 1 == await store.expire(await store.leases(), WHY, 0)
    elif how == "leave":
        assert 1 == await store.leave(W)
    else:
        assert 1 == await store.bury(W, WHY, 0)
    got = await record(store, new.id)
    assert ("queued", "pending", 0, None) == (got.state, got.inputs, got.attempt, got.worker)
    assert not await store.inputs_ready(lease, {})
    assert (await fetched(store, W2)).fence > lease.fence


async def test_inputs_leases_are_renewed_like_any_other(store: Store) -> None:
    new = await submitted(store, sources={"a": URL})
    lease = await fetched(store)
    marks = await store.leases()
    assert [(new.id, lease.fence, W)] == [(m.id, m.fence, m.worker) for m in marks]
    assert set() == await store.renew([Beat(new.id, lease.fence)])
    assert 0 == await store.expire(marks, WHY, 3)


async def test_a_fetcher_that_lost_its_lease_changes_nothing_for_the_next(store: Store) -> None:
    new = await submitted(store, sources={"a": URL})
    zombie = await fetched(store)
    assert 1 == await store.expire(await store.leases(), WHY, 3)
    heir = await fetched(store, W2)
    assert not await store.inputs_ready(zombie, {})
    assert not await store.refuse(zombie, WHY)
    assert not await store.release(zombie)
    assert await store.lose(zombie, WHY, 3) is None
    assert {new.id} == await store.renew([Beat(new.id, zombie.fence)])
    assert heir.request == await record(store, new.id)
    assert await store.inputs_ready(heir, {"a": URL})


async def test_an_outcome_needs_a_lease_of_its_purpose(store: Store) -> None:
    await submitted(store, sources={"a": URL})
    inputs = await fetched(store)
    assert not await store.succeed(inputs, [], None)
    assert not await store.fail(inputs, WHY)
    assert await store.inputs_ready(inputs, {"a": URL})
    run = await claimed(store)
    assert not await store.refuse(run, WHY)
    assert not await store.inputs_ready(run, {})
    assert await store.succeed(run, [], None)
