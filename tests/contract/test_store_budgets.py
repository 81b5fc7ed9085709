"""What every store promises of money: budgets, what is reserved, how long it stays so, and what is settled."""

import msgspec
import pytest

from rushes.queue.base import Claim, Store, Take
from rushes.requests.ids import KeyId, WorkerId
from rushes.requests.record import Failure, Lease, RemoteTask
from support.stores import Place, record, submitted, taken

W, W2 = WorkerId("w1"), WorkerId("w2")
WHY = Failure("worker_lost", "The worker died.")
TASK = RemoteTask("fal", "accepted", 1000.5, "h", "https://queue.fal.run")
FAL = (TASK.remote, TASK.place)
DAY = 86400.0
ENDS = ("succeed", "fail", "release", "lose", "lose for good", "expire", "bury", "leave")


async def end(store: Store, lease: Lease, way: str) -> None:
    """In each of all the ways in which a lease can end."""
    match way:
        case "succeed":
            assert await store.succeed(lease, [], 0.25)
        case "fail":
            assert await store.fail(lease, WHY)
        case "release":
            assert await store.release(lease)
        case "lose" | "lose for good":
            state = "failed" if way == "lose for good" and lease.request.remote_task is None else "queued"
            limit = 1 if way == "lose for good" else 9
            assert state == await store.lose(lease, WHY, limit)
        case "expire":
            marks = [mark for mark in await store.leases() if mark.id == lease.request.id]
            assert 1 == await store.expire(marks, WHY, 9)
        case "bury":
            assert 1 == await store.bury(lease.worker, WHY, 9)
        case _:
            assert 1 == await store.leave(lease.worker)


# -- budgets ---------------------------------------------------------------------------------------------
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


async def test_a_day_has_its_own_budget_and_keeps_what_it_reserved(place: Place, store: Store) -> None:
    one, two = await submitted(store), await submitted(store)
    lease = await taken(store, one.id, reserve_usd=0.5, budget_usd=0.5)
    await place.age(DAY)
    assert 0.0 == await store.spent(None)
    await taken(store, two.id, reserve_usd=0.5, budget_usd=0.5)
    await store.settle(lease, "fal", 7.0)
    assert (0.5, 0.5) == (await store.spent(None), await store.spent(KeyId("key")))


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


# -- what is reserved -----------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ENDS)
async def test_what_was_handed_over_to_nobody_costs_nothing_however_the_lease_ends(
    place: Place, store: Store, way: str
) -> None:
    """Also where it was handed over and taken back. What else is reserved and spent stays."""
    other, paid = await submitted(store, key="other"), await submitted(store, key="other")
    before = await taken(store, paid.id)
    await store.settle(before, "fal", 0.25)
    assert await store.release(before)
    kept = await store.take(Take(other.id, W2, "fal", 1.0))
    assert isinstance(kept, Lease)
    for noted in (False, True):
        lease = await taken(store, (await submitted(store)).id, reserve_usd=0.5)
        if noted:
            assert await store.note(lease, TASK)
            assert await store.note(lease, None)
        free = await taken(store, paid.id, "box", reserve_usd=0.0)
        assert await store.release(free)
        assert {(lease.request.id, "fal"), (other.id, "fal")} == set(await place.reserved())
        await end(store, lease, way)
        assert [(other.id, "fal")] == await place.reserved()
        assert (0.0, 1.25) == (await store.spent(KeyId("key")), await store.spent(None))
        assert await record(store, kept.request.id) == kept.request


@pytest.mark.parametrize("way", ENDS)
async def test_what_was_handed_over_stays_reserved_however_the_lease_ends(
    place: Place, store: Store, way: str
) -> None:
    for phase in ("accepted", "submitting"):
        lease = await taken(store, (await submitted(store)).id, reserve_usd=0.5)
        assert await store.note(lease, RemoteTask("fal", phase, 1.0))
        got = await record(store, lease.request.id)
        await end(store, Lease(got, W, lease.fence, "run"), way)
        assert (lease.request.id, "fal") in await place.reserved()
    assert (2, 1.0) == (len(await place.reserved()), await store.spent(None))


async def test_a_request_that_a_slot_runs_in_the_end_reserves_nothing(place: Place, store: Store) -> None:
    """The day's budget is for one: lost before it was sent, run by a slot, it leaves all of it to the next."""
    first = await submitted(store)
    assert "queued" == await store.lose(await taken(store, first.id, reserve_usd=0.4, budget_usd=0.5), WHY, 3)
    lease = await store.claim(Claim(W2, ("m",), engine="wan"))
    assert lease is not None
    assert first.id == lease.request.id
    assert await store.succeed(lease, [], None)
    assert ([], 0.0) == (await place.reserved(), await store.spent(None))
    second = await submitted(store)
    assert await store.release(await taken(store, second.id, reserve_usd=0.4, budget_usd=0.5))
    assert "cancelled" == await store.cancel(second.id, None)
    third = await submitted(store)
    await taken(store, third.id, reserve_usd=0.4, budget_usd=0.5)
    assert 0.4 == await store.spent(None)


async def test_a_lost_or_released_take_frees_its_budget_for_another_remote(place: Place, store: Store) -> None:
    new = await submitted(store)
    budgets = {"budget_usd": 0.5, "key_budget_usd": 0.5}
    assert await store.release(await taken(store, new.id, reserve_usd=0.4, **budgets))
    assert "budget" == await store.take(Take(new.id, W, "fal", 0.6, **budgets))
    assert 0.0 == await store.spent(None)
    again = await taken(store, new.id, "box", reserve_usd=0.5, **budgets)
    assert [(new.id, "box")] == await place.reserved()
    assert "queued" == await store.lose(again, WHY, 9)
    await taken(store, new.id, reserve_usd=0.3, **budgets)
    assert [(new.id, "fal")] == await place.reserved()


async def test_what_one_time_cost_stays_when_the_next_comes_to_nothing(store: Store) -> None:
    new = await submitted(store)
    first = await taken(store, new.id, reserve_usd=0.3)
    await store.settle(first, "fal", 0.125)
    assert await store.release(first)
    assert 0.125 == await store.spent(None)
    second = await taken(store, new.id, reserve_usd=0.25)
    assert 0.375 == await store.spent(None)
    assert await store.release(second)
    assert 0.125 == await store.spent(None)
    await store.settle(second, "fal", 0.25)
    await store.settle(second, "fal", 0.5)
    assert 0.625 == await store.spent(None)
    await store.settle(first, "fal", 9.0)
    assert 0.625 == await store.spent(None)


# -- what is settled -------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("task", [None, TASK])
@pytest.mark.parametrize("way", ENDS)
async def test_a_cost_settles_before_or_after_the_lease_has_ended(
    place: Place, store: Store, way: str, task: RemoteTask | None
) -> None:
    first = await taken(store, (await submitted(store)).id, reserve_usd=0.5)
    lease = Lease(msgspec.structs.replace(first.request, remote_task=task), W, first.fence, "run")
    assert await store.note(lease, task)
    await end(store, lease, way)
    assert (0.0 if task is None else 0.5) == await store.spent(None)
    for _ in range(2):
        await store.settle(lease, "fal", 0.25)
    assert ([], 0.25) == (await place.reserved(), await store.spent(None))


async def test_a_lost_lease_settles_nothing(store: Store) -> None:
    new = await submitted(store)
    lost = await taken(store, new.id, reserve_usd=0.5)
    assert "queued" == await store.lose(lost, WHY, 3)
    await taken(store, new.id, reserve_usd=0.25)
    await store.settle(lost, "fal", 9.0)
    await store.settle(lost, "other", 9.0)
    assert 0.25 == await store.spent(None)


async def test_a_cost_that_nobody_reserved_counts_too(store: Store) -> None:
    await submitted(store, key="one")
    lease = await store.claim(Claim(W, ("m",)))
    assert lease is not None
    await store.settle(lease, "fal", 0.0)
    assert 0.0 == await store.spent(None)
    for _ in range(2):
        await store.settle(lease, "fal", 0.5)
    assert (0.5, 0.5) == (await store.spent(None), await store.spent(KeyId("one")))


async def test_a_resumed_lease_settles_what_the_first_one_reserved(place: Place, store: Store) -> None:
    """On the day on which it was reserved; and again, where the first to settle it did not get to the outcome."""
    lease = await taken(store, (await submitted(store)).id, reserve_usd=0.5)
    assert await store.note(lease, TASK)
    assert "queued" == await store.lose(lease, WHY, 1)
    assert 0.5 == await store.spent(None)
    for cost in (0.25, 0.125):
        resumed = await store.resume(W, [FAL], ("m",))
        assert resumed is not None
        await store.settle(lease, "fal", 9.0)
        await store.settle(resumed, "fal", cost)
        assert cost == await store.spent(None)
        assert await store.release(resumed)
    resumed = await store.resume(W, [FAL], ("m",))
    assert resumed is not None
    await place.age(DAY)
    await store.settle(resumed, "fal", 0.75)
    assert await store.succeed(resumed, [], 0.75)
    assert 0.0 == await store.spent(None)
    await place.age(-DAY)
    assert 0.75 == await store.spent(None)
    assert [] == await place.reserved()
