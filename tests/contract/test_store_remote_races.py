"""Many who take at once, on several handles: nothing twice, nothing overspent, no limit passed, no deadlock."""

import asyncio
from collections import Counter

import pytest

from rushes.queue.base import Claim, Store, Take
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import Failure, Lease, RemoteTask
from support.stores import Place, submitted

WHY = Failure("c", "m")
TASK = RemoteTask("fal", "accepted", 1.0, "h")


async def handles(place: Place, count: int = 4) -> list[Store]:
    return [await place.open() for _ in range(count)]


async def fill(store: Store, count: int, **values: object) -> list[RequestId]:
    return [(await submitted(store, **values)).id for _ in range(count)]


async def test_one_request_is_taken_once_however_many_ask(place: Place) -> None:
    stores = await handles(place)
    for id_ in await fill(stores[0], 5):
        answers = await asyncio.gather(
            *(stores[n % 4].take(Take(id_, WorkerId(f"w{n}"), f"r{n}", 0.25)) for n in range(12))
        )
        (lease,) = [answer for answer in answers if isinstance(answer, Lease)]
        assert 11 == answers.count("gone")
        got = await stores[1].get(id_)
        assert got is not None
        assert (1, lease.worker, lease.request.engine) == (got.attempt, got.worker, got.engine)
    assert 1.25 == await stores[2].spent(None)


@pytest.mark.parametrize("budget", ["budget", "key_budget"])
async def test_many_takes_at_once_never_overspend(place: Place, budget: str) -> None:
    """40 requests of 0.1 at two remotes, of two accounts with limits that never bind, and a budget for seven."""
    stores = await handles(place)
    ids = [id_ for n in range(40) for id_ in await fill(stores[0], 1, account=f"a{n % 2}")]
    limit = {f"{budget}_usd": 0.7}
    answers = await asyncio.gather(
        *(
            stores[n % 4].take(
                Take(id_, WorkerId(f"w{n}"), f"r{n % 2}", 0.1, account_limit=30 * (n % 2), **limit)
            )
            for n, id_ in enumerate(ids)
        )
    )
    assert 7 == sum(isinstance(answer, Lease) for answer in answers)
    assert 33 == answers.count(budget)  # type: ignore[arg-type]
    assert pytest.approx(0.7) == await stores[3].spent(None)
    assert {"queued": 33, "running": 7} == {k: v for k, v in (await stores[0].counts()).items() if v}


async def test_an_account_limit_holds_over_takes_and_claims_together(place: Place) -> None:
    stores = await handles(place)
    ids = await fill(stores[0], 30, account="one") + await fill(stores[0], 10, account="two")
    calls = [
        *(stores[n % 4].take(Take(id_, WorkerId(f"t{n}"), "r", account_limit=3)) for n, id_ in enumerate(ids)),
        *(stores[n % 4].claim(Claim(WorkerId(f"c{n}"), ("m",), account_limit=3)) for n in range(20)),
    ]
    # Takes and claims by turns, the takes from the end of the line as well as from its head.
    order = [calls[i] for n in range(20) for i in (n, 59 - n, 39 - n)]
    leases = [answer for answer in await asyncio.gather(*order) if isinstance(answer, Lease)]
    assert {"one": 3, "two": 3} == Counter(lease.request.account for lease in leases)
    assert 6 == len({lease.request.id for lease in leases})
    assert 6 == (await stores[0].counts())["running"]


async def test_takes_against_claims_share_nothing_and_miss_nothing(place: Place) -> None:
    stores = await handles(place)
    ids = await fill(stores[0], 40)
    answers = await asyncio.gather(
        *(
            call
            for n, id_ in enumerate(ids)
            for call in (
                stores[n % 4].take(Take(id_, WorkerId(f"t{n}"), "r", 0.5, budget_usd=100.0)),
                stores[(n + 1) % 4].claim(Claim(WorkerId(f"c{n}"), ("m",), engine="wan")),
            )
        )
    )
    leases = [answer for answer in answers if isinstance(answer, Lease)]
    assert sorted(ids) == sorted(lease.request.id for lease in leases)
    remote = sum(lease.request.engine == "r" for lease in leases)
    assert 0.5 * remote == await stores[0].spent(None)


async def test_a_task_is_resumed_once_however_many_ask(place: Place) -> None:
    stores = await handles(place)
    ids = await fill(stores[0], 10)
    for id_ in ids:
        lease = await stores[0].take(Take(id_, WorkerId("w"), "fal"))
        assert isinstance(lease, Lease)
        assert await stores[0].note(lease, TASK)
    assert 10 == await stores[1].bury(WorkerId("w"), WHY, 1)
    # A look of another may come between the look and the lock, so that some go away with nothing: ask again.
    resumed: list[Lease] = []

    async def work(number: int) -> None:
        while len(resumed) < len(ids):
            lease = await stores[number % 4].resume(WorkerId(f"w{number}"), [("fal", "")], ("m",))
            if lease is None:
                await asyncio.sleep(0.001)  # SQLite answers from a look at once: others have to come to turn
            else:
                resumed.append(lease)

    await asyncio.gather(*(work(n) for n in range(12)))
    assert sorted(ids) == sorted(lease.request.id for lease in resumed)
    assert {1} == {lease.request.attempt for lease in resumed}


async def test_a_claim_never_gets_a_request_that_has_a_task(place: Place) -> None:
    """Few requests, and tasks that come and go as fast as they can while others claim."""
    stores = await handles(place)
    ids = await fill(stores[0], 4)
    claims = 0

    async def remote(number: int) -> None:
        store, worker = stores[number % 4], WorkerId(f"t{number}")
        for step in range(40):
            lease = await store.take(Take(ids[(number + step) % 4], worker, "fal"))
            if isinstance(lease, Lease):
                assert await store.note(lease, TASK)
                assert await store.release(lease)
            resumed = await store.resume(worker, [("fal", "")], ("m",))
            if resumed is not None:
                assert TASK == resumed.request.remote_task
                assert await store.note(resumed, None)
                assert await store.release(resumed)

    async def local(number: int) -> None:
        nonlocal claims
        store = stores[number % 4]
        for step in range(60):
            lease = await store.claim(Claim(WorkerId(f"c{number}"), ("m",), account_limit=9 * (step % 2)))
            if lease is not None:
                claims += 1
                assert (None, "run") == (lease.request.remote_task, lease.purpose)
                assert await store.release(lease)

    await asyncio.gather(*(remote(n) for n in range(6)), *(local(n) for n in range(6)))
    assert claims > 0
    assert {"queued": 4} == {k: v for k, v in (await stores[0].counts()).items() if v}


@pytest.mark.parametrize("other", ["cancel", "claim", "lose", "abandon"])
async def test_of_two_who_move_a_request_one_does(place: Place, other: str) -> None:
    stores = await handles(place, 2)
    for _ in range(10):
        (id_,) = await fill(stores[0], 1)
        match other:
            case "cancel":
                lease, answer = await asyncio.gather(
                    stores[0].take(Take(id_, WorkerId("t"), "r", 1.0)), stores[1].cancel(id_, None)
                )
                assert ("gone" == lease) == (answer == "cancelled")
            case "claim":
                lease, got = await asyncio.gather(
                    stores[0].take(Take(id_, WorkerId("t"), "r", 1.0)),
                    stores[1].claim(Claim(WorkerId("c"), ("m",))),
                )
                assert ("gone" == lease) == (got is not None)
            case "abandon":
                first = await stores[0].take(Take(id_, WorkerId("t"), "fal", 1.0))
                assert isinstance(first, Lease)
                assert await stores[0].note(first, TASK)
                assert await stores[0].release(first)
                resumed, abandoned = await asyncio.gather(
                    stores[0].resume(WorkerId("t"), [("fal", "")], ("m",)), stores[1].abandon(id_, WHY)
                )
                assert abandoned == (resumed is None)
            case _:
                first = await stores[0].take(Take(id_, WorkerId("t"), "r", 1.0))
                assert isinstance(first, Lease)
                noted, state = await asyncio.gather(stores[0].note(first, TASK), stores[1].lose(first, WHY, 1))
                # Either the task came first, and goes on, or the loss did, and there is no task.
                assert ("queued" if noted else "failed") == state
                request = await stores[0].get(id_)
                assert request is not None
                assert (TASK if noted else None) == request.remote_task


async def test_takes_settles_and_losses_at_once_leave_sums_that_are_right(place: Place) -> None:
    """A storm on few requests with every lock in play; then what is spent is what the leases that held say."""
    stores = await handles(place)
    ids = [id_ for n in range(6) for id_ in await fill(stores[0], 1, key=f"k{n % 2}", account=f"a{n % 3}")]
    settled: dict[RequestId, list[float]] = {id_: [] for id_ in ids}
    budgets = {"budget_usd": 1000.0, "key_budget_usd": 900.0, "account_limit": 2}

    async def work(number: int) -> None:
        store = stores[number % 4]
        worker = WorkerId(f"w{number}")
        for step in range(15):
            id_ = ids[(number + step) % 6]
            answer = await store.take(Take(id_, worker, "fal", 5.0, **budgets))  # type: ignore[arg-type]
            lease: Lease | None = answer if isinstance(answer, Lease) else None
            if lease is None:
                lease = await store.resume(worker, [("fal", "")], ("m",))
                if lease is None:
                    continue
            match step % 3:
                case 0:
                    assert await store.note(lease, TASK)
                    assert await store.lose(lease, WHY, 99)
                case 1:
                    assert await store.note(lease, None)
                    await store.settle(lease, "fal", 0.25)
                    settled[lease.request.id].append(0.25)
                    assert await store.release(lease)
                case _:
                    assert await store.note(lease, None)
                    await store.settle(lease, "fal", 0.0)
                    assert await store.release(lease)

    await asyncio.gather(*(work(n) for n in range(12)))
    rows = [r for r in await stores[0].list_requests() if r.state == "queued"]
    assert len(ids) == len(rows)
    under_way = sum(5.0 for r in rows if r.remote_task is not None)
    paid = sum(sum(costs) for costs in settled.values())
    assert paid > 0
    assert pytest.approx(under_way + paid) == await stores[1].spent(None)
