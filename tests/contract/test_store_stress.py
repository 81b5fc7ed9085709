"""Many claimers at once, on several handles: limits hold, nothing is lost, nothing has two outcomes."""

import asyncio
from collections import Counter

import pytest

from rushes.queue.base import Claim, Store
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import Failure
from support.stores import Place, new_request

WHY = Failure("c", "m")


async def fill(store: Store, count: int, accounts: int) -> list[RequestId]:
    news = [new_request(account=f"a{i % accounts}", model="mn"[i % 2], priority=i % 3) for i in range(count)]
    await asyncio.gather(*(store.submit(n) for n in news))
    return [n.id for n in news]


@pytest.mark.parametrize(("limit", "accounts"), [(1, 1), (1, 4), (2, 3)])
async def test_account_limits_hold_under_concurrent_claims(place: Place, limit: int, accounts: int) -> None:
    """16 claimers over 4 handles. The most that ever run are counted from the leases that are held: each is
    counted after its claim answered and until before its outcome is sent, so never more than there are.
    """
    stores = [await place.open() for _ in range(4)]
    ids = await fill(stores[0], 120, accounts)
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    ended: list[RequestId] = []

    async def work(number: int) -> None:
        store = stores[number % 4]
        claim = Claim(WorkerId(f"w{number}"), ("m", "n"), warm=("m",), account_limit=limit)
        while len(ended) < len(ids):
            lease = await store.claim(claim)
            if lease is None:
                await asyncio.sleep(0.001)
                continue
            account = lease.request.account
            running[account] += 1
            most[account] = max(most[account], running[account])
            await asyncio.sleep(0.001)
            running[account] -= 1
            assert await store.succeed(lease, [], None)
            ended.append(lease.request.id)

    await asyncio.gather(*(work(n) for n in range(16)))
    assert sorted(ids) == sorted(ended)
    # That the limit is reached, too, is the next test's: here it depends on who is how fast.
    assert limit >= max(most.values())


async def test_a_burst_of_claims_takes_no_more_than_the_limit(place: Place) -> None:
    stores = [await place.open() for _ in range(4)]
    await fill(stores[0], 60, 2)
    leases = await asyncio.gather(
        *(stores[n % 4].claim(Claim(WorkerId(f"w{n}"), ("m", "n"), account_limit=3)) for n in range(32))
    )
    got = Counter(lease.request.account for lease in leases if lease)
    assert {"a0": 3, "a1": 3} == got


async def test_concurrent_claims_never_share_and_never_miss(place: Place) -> None:
    stores = [await place.open() for _ in range(4)]
    ids = await fill(stores[0], 64, 3)
    leases = await asyncio.gather(
        *(stores[n % 4].claim(Claim(WorkerId(f"w{n}"), ("m", "n"))) for n in range(80))
    )
    assert sorted(ids) == sorted(lease.request.id for lease in leases if lease)
    assert 16 == leases.count(None)


async def test_positions_are_exact_once_a_storm_is_over(place: Place) -> None:
    """Submits, claims, losses, releases, cancels and outcomes at once, then every position against a count."""
    stores = [await place.open() for _ in range(3)]
    ids = await fill(stores[0], 100, 5)

    async def storm(number: int) -> None:
        store = stores[number % 3]
        claim = Claim(WorkerId(f"w{number}"), ("m", "n"), account_limit=2 * (number % 2))
        for step in range(12):
            new = new_request(account=f"a{step % 5}", model="mn"[step % 2], priority=step % 3)
            await store.submit(new)
            ids.append(new.id)
            lease = await store.claim(claim)
            if lease is not None:
                match (number + step) % 4:
                    case 0:
                        assert await store.succeed(lease, [], None)
                    case 1:
                        assert await store.lose(lease, WHY, 3)
                    case 2:
                        assert await store.release(lease)
                    case _:
                        assert await store.fail(lease, WHY)
            await store.cancel(ids[(number * 31 + step * 17) % len(ids)], None)
            if step == 6:
                await store.leases()

    await asyncio.gather(*(storm(n) for n in range(12)))
    rows = await stores[1].list_requests(limit=1000)
    assert sorted(ids) == sorted(r.id for r in rows)
    assert Counter(r.state for r in rows) == Counter(await stores[2].counts())
    queued = [r for r in rows if r.state == "queued"]
    assert queued
    for request in queued:
        view = await stores[0].status(request.id, None)
        assert view is not None
        for models in (None, ("m",)):
            ahead = sum(
                (-r.priority, r.seq) < (-request.priority, request.seq)
                for r in queued
                if models is None or r.model in models
            )
            assert 1 + ahead == await stores[0].position(view, models)


async def test_racing_outcomes_of_one_lease_have_one_winner(place: Place) -> None:
    stores = [await place.open() for _ in range(3)]
    for _ in range(10):
        (id_,) = await fill(stores[0], 1, 1)
        lease = await stores[0].claim(Claim(WorkerId("w"), ("m",)))
        assert lease is not None
        (mark,) = await stores[0].leases()
        answers = await asyncio.gather(
            stores[0].succeed(lease, [], None),
            stores[1].fail(lease, WHY),
            stores[0].fail(lease, WHY),
            stores[2].expire([mark], WHY, 1),
            stores[1].succeed(lease, [], None),
        )
        assert 1 == sum(map(int, answers))
        got = await stores[2].get(id_)
        assert got is not None
        winner = answers.index(True)
        assert ("succeeded" if winner in (0, 4) else "failed") == got.state
