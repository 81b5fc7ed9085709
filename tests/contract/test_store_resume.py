"""What every store promises of tasks that nobody polls: who takes them up, when they are given up; what slots run."""

import pytest

from rushes.queue.base import Beat, Claim, Store
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import Failure, Lease, Progress, RemoteTask, Running, Source
from support.stores import Place, at_remote, record, submitted, taken

W, W2 = WorkerId("w1"), WorkerId("w2")
WHY = Failure("remote_gone", "No worker has this remote any more: nul\0 \U0001f3ac")
URL = Source("url", "https://example.org/a.png", "image")
HERE, THERE = "http://10.0.0.5:8000", "http://127.0.0.1:8000 on gpu-7"
TASK = RemoteTask("fal", "accepted", 1000.5, "h", "https://queue.fal.run")
FAL = (TASK.remote, TASK.place)


async def waits(store: Store, task: RemoteTask, **values: object) -> RequestId:
    """A new request that waits with a task."""
    lease = await at_remote(store, task, **values)
    assert await store.release(lease)
    return lease.request.id


async def resumed(
    store: Store, *remotes: tuple[str, str], models: tuple[str, ...] = ("m",)
) -> RequestId | None:
    lease = await store.resume(W2, remotes, models)
    return None if lease is None else lease.request.id


async def test_tasks_are_resumed_in_the_order_of_arrival(store: Store) -> None:
    mine = [await at_remote(store, TASK, model=model, priority=p) for p, model in ((0, "m"), (5, "n"))]
    other = await at_remote(store, RemoteTask("box", "accepted", 1.0, "h", HERE))
    for lease in (other, mine[1], mine[0]):
        assert await store.release(lease)
    await submitted(store)
    both = [("none", ""), ("box", HERE), FAL]
    taken_up = [await store.resume(W2, both, ("n", "m")) for _ in range(4)]
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


async def test_a_task_is_taken_up_only_by_its_remote_at_its_place(store: Store) -> None:
    """One name is one place here and another there, as a server on each machine's own loopback is."""
    here = await waits(store, RemoteTask("box", "accepted", 1.0, "h", HERE))
    there = await waits(store, RemoteTask("box", "accepted", 1.0, "h", THERE))
    nowhere = await waits(store, RemoteTask("box", "accepted", 1.0, "h"))
    assert await resumed(store) is None
    assert await resumed(store, ("Box", HERE), ("", HERE), ("bo", "x" + HERE), ("box", HERE[:-1]), FAL) is None
    assert await resumed(store, ("nul", "\0"), ("box", "x\0")) is None
    assert there == await resumed(store, ("box", THERE))
    assert await resumed(store, ("box", THERE)) is None
    assert nowhere == await resumed(store, ("box", ""))
    assert here == await resumed(store, FAL, ("box", HERE))
    lease = await taken(store, (await submitted(store)).id, "box")
    assert await store.note(lease, RemoteTask("box", "accepted", 1.0, "h", HERE))
    assert await store.note(lease, RemoteTask("box", "accepted", 1.0, "h", THERE))
    assert await store.release(lease)
    assert await resumed(store, ("box", HERE)) is None
    assert lease.request.id == await resumed(store, ("box", THERE))


async def test_only_tasks_of_the_workers_models_are_taken_up(store: Store) -> None:
    gone = await waits(store, TASK, model="gone")
    sent = await waits(store, RemoteTask("fal", "submitting", 1.0), model="gone")
    here = await waits(store, TASK, model="n")
    assert await resumed(store, FAL, models=()) is None
    assert here == await resumed(store, FAL, models=("m", "n", "nul\0"))
    assert await resumed(store, FAL, models=("m", "n")) is None
    assert gone == await resumed(store, FAL, models=("gone",))
    assert sent == await resumed(store, models=("gone",))


async def test_what_was_being_handed_over_is_anybodys_and_keeps_its_engine(store: Store) -> None:
    """Nobody can poll it: whoever comes first says that it is not known. Once accepted, it is its remote's alone."""
    lease = await taken(store, (await submitted(store)).id, "my box")
    task = RemoteTask("my box", "submitting", 1.0, place=HERE)
    assert await store.note(lease, task)
    assert "queued" == await store.lose(lease, WHY, 1)
    for remotes in ([], [FAL]):
        found = await store.resume(W2, remotes, ("m",))
        assert found is not None
        assert ("my box", task, 1) == (found.request.engine, found.request.remote_task, found.request.attempt)
        assert await store.release(found)
    found = await store.resume(W2, [FAL], ("m",))
    assert found is not None
    accepted = RemoteTask("my box", "accepted", 1.0, "h", HERE)
    assert await store.note(found, accepted)
    assert await store.release(found)
    assert await resumed(store, FAL) is None
    found = await store.resume(W2, [("my box", HERE)], ("m",))
    assert found is not None
    assert ("my box", accepted) == (found.request.engine, found.request.remote_task)


async def test_a_task_that_ended_is_not_resumed(store: Store) -> None:
    for how in ("succeed", "fail", "abandon"):
        lease = await at_remote(store, TASK)
        match how:
            case "succeed":
                assert await store.succeed(lease, [], None)
            case "fail":
                assert await store.fail(lease, WHY)
            case _:
                assert await store.release(lease)
                assert await store.abandon(lease.request.id, WHY)
    assert await resumed(store, FAL) is None


# -- abandon ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", ["accepted", "submitting"])
async def test_a_task_that_nobody_can_poll_is_abandoned_with_a_reason(
    place: Place, store: Store, phase: str
) -> None:
    """What was reserved stays: it may have been paid for."""
    task = RemoteTask("old", phase, 1.0, "h", HERE)  # type: ignore[arg-type]
    lease = await taken(store, (await submitted(store)).id, "old", reserve_usd=0.5)
    assert await store.note(lease, task)
    assert not await store.abandon(lease.request.id, WHY), "it runs"
    assert await store.release(lease)
    assert await store.abandon(lease.request.id, WHY)
    got = await record(store, lease.request.id)
    assert ("failed", WHY, task, "old", None, 0) == (
        got.state,
        got.failure,
        got.remote_task,
        got.engine,
        got.worker,
        got.attempt,
    )
    assert got.finished_at is not None
    assert not await store.abandon(lease.request.id, Failure("other", "m"))
    assert await store.get(lease.request.id) == got
    assert {"failed": 1} == {state: n for state, n in (await store.counts()).items() if n}
    assert ([(lease.request.id, "old")], 0.5) == (await place.reserved(), await store.spent(None))
    assert not await store.note(lease, None)
    assert not await store.succeed(lease, [], None)


async def test_what_has_no_task_and_what_is_not_there_is_not_abandoned(store: Store) -> None:
    queued = await submitted(store)
    pending = await submitted(store, model="n", sources={"a": URL})
    ended = await submitted(store)
    assert await store.fail(await taken(store, ended.id), Failure("c", "m"))
    before = [await record(store, new.id) for new in (queued, pending, ended)]
    for id_ in (queued.id, pending.id, ended.id, RequestId("nothing"), RequestId("nul\0")):
        assert not await store.abandon(id_, WHY)
    assert before == [await record(store, new.id) for new in (queued, pending, ended)]


# -- running ----------------------------------------------------------------------------------------------
async def test_what_slots_have_in_hand_is_listed_without_what_is_at_remotes(store: Store) -> None:
    async def claim(worker: WorkerId, model: str) -> Lease:
        await submitted(store, model=model)
        lease = await store.claim(Claim(worker, (model,), engine="wan"))
        assert lease is not None
        return lease

    assert [] == await store.running((W, W2))
    one, two, other = await claim(W, "a"), await claim(W2, "b"), await claim(WorkerId("w3"), "c")
    progress = Progress(0.5, "sampling", 1, 2, 3.5)
    assert set() == await store.renew([Beat(two.request.id, two.fence, progress)])
    await at_remote(store, TASK)
    await submitted(store, sources={"a": URL})
    assert 1 == len(await store.claim_inputs(W, ("m",), 1))
    assert await store.succeed(await claim(W, "ended"), [], None)
    started = [lease.request.started_at or 0.0 for lease in (one, two)]
    expected = [Running("a", started[0], None), Running("b", started[1], progress)]
    assert expected == await store.running((W, W2, W, WorkerId("none"), WorkerId("nul\0")))
    assert expected[1:] == await store.running((W2,))
    assert [] == await store.running(())
    assert await store.release(two)
    assert ["c"] == [r.model for r in await store.running((W2, other.worker))]
