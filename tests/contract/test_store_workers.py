"""What every store promises of workers: joining, beating, leaving and being buried."""

import msgspec
import pytest

from rushes.queue.base import Claim, Store
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import Failure, Lease, Request, Source, WorkerRecord
from rushes.worker.reaper import BeatWatch
from support.stores import submitted

W, W2 = WorkerId("w1"), WorkerId("w2")
WHY = Failure("worker_lost", "The worker died.")
URL = Source("url", "https://example.org/a.png", "image")


async def claimed(store: Store, worker: WorkerId = W) -> Lease:
    lease = await store.claim(Claim(worker, ("m",)))
    assert lease is not None
    return lease


async def fetched(store: Store, worker: WorkerId = W) -> Lease:
    (lease,) = await store.claim_inputs(worker, ("m",), 1)
    return lease


async def record(store: Store, id_: RequestId) -> Request:
    got = await store.get(id_)
    assert got is not None
    return got


def worker_record(id_: WorkerId = W, **values: object) -> WorkerRecord:
    return WorkerRecord(id_, "host", 4242, 2, ("m", "n"), "draft", "server-1", **values)  # type: ignore[arg-type]


async def test_workers_join_beat_and_leave(store: Store) -> None:
    await store.join(worker_record(started_at=1000.5, wake_port=77))
    await store.join(worker_record(W2))
    one, two = await store.workers()
    assert worker_record(started_at=1000.5, wake_port=77) == one
    assert two.started_at > 1.6e9
    assert await store.worker_beat(W)
    assert await store.worker_beat(W)
    assert [2, 0] == [w.beat for w in await store.workers()]
    assert 0 == await store.leave(W)
    assert [W2] == [w.id for w in await store.workers()]
    assert not await store.worker_beat(W)


async def test_joining_again_replaces_the_record_and_moves_the_beat_on(store: Store) -> None:
    await store.join(worker_record(started_at=1.0))
    assert await store.worker_beat(W)
    again = WorkerRecord(W, "other", 1, 5, (), "noop", "", 0, 0, 2.0)
    for beat in (2, 3):
        await store.join(again)
        assert [msgspec.structs.replace(again, beat=beat)] == await store.workers()
    assert await store.worker_beat(W)
    assert [4] == [w.beat for w in await store.workers()]
    await store.join(worker_record(W2, beat=7))
    assert [4, 7] == [w.beat for w in await store.workers()]


@pytest.mark.parametrize("order", ["join", "beat, join", "join, beat", "beat, join, join"])
async def test_who_joins_again_and_again_is_never_taken_for_dead(store: Store, order: str) -> None:
    """As a worker does that tells of its remotes; a reaper that looks as often buries none but the one that is."""
    watch: BeatWatch[WorkerId] = BeatWatch(patience=15.0, interval=5.0)
    await store.join(worker_record())
    await store.join(worker_record(W2))
    for now in range(0, 200, 5):
        for step in order.split(", "):
            if step == "join":
                await store.join(worker_record())
            else:
                assert await store.worker_beat(W)
        silent = watch.look({worker.id: worker.beat for worker in await store.workers()}, float(now))
        assert ([W2] if now >= 15 else []) == silent


async def test_a_leaving_worker_gives_its_leases_back_uncounted(store: Store) -> None:
    await store.join(worker_record())
    mine = await submitted(store)
    other = await submitted(store)
    pending = await submitted(store, sources={"a": URL})
    lease = await claimed(store)
    await claimed(store, W2)
    await fetched(store)
    assert 2 == await store.leave(W)
    got = await record(store, mine.id)
    assert ("queued", 0, None) == (got.state, got.attempt, got.worker)
    assert "pending" == (await record(store, pending.id)).inputs
    assert "running" == (await record(store, other.id)).state
    assert not await store.succeed(lease, [], None)
    assert [] == await store.workers()


async def test_a_buried_workers_attempts_count(store: Store) -> None:
    await store.join(worker_record())
    retried = await submitted(store)
    assert "queued" == await store.lose(await claimed(store), WHY, 9)
    once = await submitted(store)
    await claimed(store)
    await claimed(store)
    assert 2 == await store.bury(W, WHY, 2)
    assert ("failed", 2, WHY) == (
        (got := await record(store, retried.id)).state,
        got.attempt,
        got.failure,
    )
    assert ("queued", 1) == ((got := await record(store, once.id)).state, got.attempt)
    assert [] == await store.workers()
    assert 0 == await store.bury(W, WHY, 2)
