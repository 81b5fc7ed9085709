"""What every store promises of submitting, looking, counting and cancelling."""

import asyncio

import msgspec
import pytest

from rushes.errors import QueueFull, StoreUnavailable
from rushes.queue.base import Beat, Claim, Store
from rushes.requests.ids import AccountId, RequestId, WorkerId, new_request_id
from rushes.requests.record import Failure, Progress, Request, Source
from support.stores import Place, new_request, submitted

W = WorkerId("w1")
URL = Source("url", "https://example.org/a.png", "image")
ANY_CLAIM = Claim(W, ("m",))


async def test_a_submitted_request_is_there_queued(store: Store) -> None:
    new = await submitted(store, model="m", priority=3, input=b'{"prompt":"hi"}')
    got = await store.get(new.id)
    assert got is not None
    assert got == Request(
        seq=got.seq,
        id=new.id,
        account=new.account,
        key_id=new.key_id,
        model="m",
        state="queued",
        priority=3,
        attempt=0,
        inputs="ready",
        input=b'{"prompt":"hi"}',
        sources={},
        created_at=got.created_at,
    )
    assert got.created_at > 1.6e9


async def test_how_often_a_request_was_passed_on_is_kept(store: Store) -> None:
    news = [msgspec.structs.replace(new_request(model="m"), hops=hops) for hops in (0, 3)]
    await asyncio.gather(*(store.submit(new) for new in news))
    records = [await store.get(new.id) for new in news]
    assert [0, 3] == [record.hops for record in records if record is not None]


async def test_another_process_sees_what_was_acknowledged(place: Place) -> None:
    one, other = await place.open(), await place.open()
    new = await submitted(one)
    got = await other.get(new.id)
    assert got is not None
    assert new.id == got.id


async def test_a_closed_and_reopened_store_has_everything(place: Place) -> None:
    first = await place.open()
    new = await submitted(first)
    await first.close()
    again = await place.open()
    assert {"queued": 1, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0} == await again.counts()
    assert await again.get(new.id) is not None


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({}, "ready"),
        ({"a": URL}, "pending"),
        ({"a": Source("stored", "inputs/x", "image")}, "pending"),
        ({"a": Source("sample", "girl.png", "image")}, "ready"),
        ({"a": Source("url", "https://e.org/a", "image", key="inputs/a")}, "ready"),
        ({"a": Source("sample", "girl.png", "image"), "b": URL}, "pending"),
    ],
)
async def test_inputs_are_pending_where_something_is_to_be_fetched(
    store: Store, sources: dict[str, Source], expected: str
) -> None:
    new = await submitted(store, sources=sources)
    got = await store.get(new.id)
    assert got is not None
    assert (expected, sources) == (got.inputs, got.sources)


@pytest.mark.parametrize(
    "data",
    [
        '{"prompt":"Grüße, 世界 \U0001f3ac"}'.encode(),
        b'{"prompt":"nul \\u0000 escaped"}',
        b"raw nul \x00 and \xff\xfe bytes",
        b"x" * 5_000_000,
    ],
    ids=["unicode", "escaped-nul", "raw-bytes", "5MB"],
)
async def test_an_input_comes_back_byte_for_byte(store: Store, data: bytes) -> None:
    new = await submitted(store, input=data)
    lease = await store.claim(ANY_CLAIM)
    assert lease is not None
    got = await store.get(new.id)
    assert got is not None
    assert data == got.input == lease.request.input


async def test_nul_and_unicode_round_trip_in_structured_columns(store: Store) -> None:
    await submitted(store, sources={"a\0b": Source("sample", "x\0ü", "image")})
    lease = await store.claim(ANY_CLAIM)
    assert lease is not None
    assert await store.fail(lease, Failure("code", "müde \0 Füße", node="n\0"))
    got = await store.get(lease.request.id)
    assert got is not None
    assert Failure("code", "müde \0 Füße", node="n\0") == got.failure
    assert {"a\0b": Source("sample", "x\0ü", "image")} == got.sources


async def test_existence_is_not_disclosed_to_another_account(store: Store) -> None:
    new = await submitted(store, account="mine")
    other = AccountId("theirs")
    assert await store.status(new.id, other) is None
    assert await store.get(new.id, other) is None
    assert await store.cancel(new.id, other) is None
    assert [] == await store.list_requests(account=other)
    view = await store.status(new.id, AccountId("mine"))
    assert view is not None
    assert view.state == "queued"
    assert view == await store.status(new.id, None)


@pytest.mark.parametrize("text", ["", "nothing", "nul\0", "ü" * 40, "01a1fe66-0c42-72f4-bcd1-91a0b0acd8e8"])
async def test_an_unknown_id_is_none_whatever_it_looks_like(store: Store, text: str) -> None:
    id_ = RequestId(text)
    assert await store.status(id_, None) is None
    assert await store.get(id_) is None
    assert await store.cancel(id_, None) is None


async def test_a_status_shows_state_and_progress(store: Store) -> None:
    new = await submitted(store, priority=2)
    lease = await store.claim(ANY_CLAIM)
    assert lease is not None
    progress = Progress(0.25, "sampling", 5, 20, 12.5)
    assert set() == await store.renew([Beat(new.id, lease.fence, progress)])
    view = await store.status(new.id, None)
    assert view is not None
    assert (lease.request.seq, "m", "running", 2, progress) == (
        view.seq,
        view.model,
        view.state,
        view.priority,
        view.progress,
    )


# -- position ---------------------------------------------------------------------------------------------
async def positions(store: Store, *ids: RequestId, models: tuple[str, ...] | None = None) -> list[int]:
    found = []
    for id_ in ids:
        view = await store.status(id_, None)
        assert view is not None
        found.append(await store.position(view, models))
    return found


async def test_position_is_by_priority_then_arrival(store: Store) -> None:
    low = await submitted(store, priority=-1)
    first = await submitted(store)
    second = await submitted(store)
    high = await submitted(store, priority=5)
    assert [1, 2, 3, 4] == await positions(store, high.id, first.id, second.id, low.id)


async def test_position_counts_only_the_models_asked_for(store: Store) -> None:
    a = await submitted(store, model="a")
    await submitted(store, model="b")
    await submitted(store, model="c", priority=1)
    last = await submitted(store, model="a")
    assert [4] == await positions(store, last.id)
    assert [2] == await positions(store, last.id, models=("a",))
    assert [3] == await positions(store, last.id, models=("a", "c"))
    assert [1] == await positions(store, last.id, models=())
    assert [1, 2] == await positions(store, a.id, last.id, models=("a", "unknown"))


async def test_position_moves_up_as_those_ahead_leave(store: Store) -> None:
    ids = [(await submitted(store)).id for _ in range(5)]
    assert [5] == await positions(store, ids[4])
    lease = await store.claim(ANY_CLAIM)
    assert lease is not None
    assert [4] == await positions(store, ids[4])
    assert await store.cancel(ids[2], None) == "cancelled"
    assert [3] == await positions(store, ids[4])
    assert await store.release(lease)
    assert [4] == await positions(store, ids[4])
    assert [1] == await positions(store, ids[0])


async def test_position_counts_those_whose_inputs_are_still_fetched(store: Store) -> None:
    await submitted(store, sources={"a": URL})
    last = await submitted(store)
    assert [2] == await positions(store, last.id)


async def test_positions_are_exact_over_many_buckets(store: Store) -> None:
    """3,000 requests cross several runs of 512; the expected place is counted one by one."""
    news = [new_request(model="abc"[i % 3], priority=i % 2) for i in range(3000)]
    await asyncio.gather(*(store.submit(n) for n in news))
    for i in range(0, 3000, 7):
        await store.cancel(news[i].id, None)
    for _ in range(40):
        assert await store.claim(Claim(W, ("b",))) is not None
    rows = await store.list_requests(limit=5000)
    queued = [r for r in rows if r.state == "queued"]
    for request in queued[:: max(1, len(queued) // 40)]:
        view = await store.status(request.id, None)
        assert view is not None
        for models in (None, ("a",), ("a", "c")):
            ahead = sum(
                (r.priority > request.priority) or (r.priority == request.priority and r.seq < request.seq)
                for r in queued
                if models is None or r.model in models
            )
            assert 1 + ahead == await store.position(view, models)


# -- cancel -----------------------------------------------------------------------------------------------
async def test_cancel_ends_a_queued_request_once_and_for_all(store: Store) -> None:
    new = await submitted(store)
    assert await store.cancel(new.id, new.account) == "cancelled"
    assert await store.cancel(new.id, new.account) == "cancelled"
    assert await store.claim(ANY_CLAIM) is None
    got = await store.get(new.id)
    assert got is not None
    assert got.state == "cancelled"
    assert got.finished_at is not None
    assert got.started_at is None


async def test_a_running_or_ended_request_is_not_cancellable(store: Store) -> None:
    new = await submitted(store)
    lease = await store.claim(ANY_CLAIM)
    assert lease is not None
    assert await store.cancel(new.id, None) == "not_cancellable"
    assert await store.succeed(lease, [], None)
    assert await store.cancel(new.id, None) == "not_cancellable"
    got = await store.get(new.id)
    assert got is not None
    assert got.state == "succeeded"


async def test_cancel_and_claim_at_once_agree(place: Place) -> None:
    """Whoever comes first has it; never both, never neither."""
    one, other = await place.open(), await place.open()
    for _ in range(30):
        new = await submitted(one)
        outcome, lease = await asyncio.gather(one.cancel(new.id, None), other.claim(ANY_CLAIM))
        got = await one.get(new.id)
        assert got is not None
        if lease is None:
            assert (outcome, got.state) == ("cancelled", "cancelled")
        else:
            assert (outcome, got.state) == ("not_cancellable", "running")
            assert await other.succeed(lease, [], None)


async def test_two_cancels_at_once_both_say_cancelled(place: Place) -> None:
    one, other = await place.open(), await place.open()
    for _ in range(15):
        new = await submitted(one)
        answers = await asyncio.gather(one.cancel(new.id, None), other.cancel(new.id, None))
        assert ["cancelled", "cancelled"] == answers


# -- lists and counts -------------------------------------------------------------------------------------
async def test_list_is_newest_first_filtered_and_paged(store: Store) -> None:
    ids = [(await submitted(store, account="ab"[i % 2], model="mn"[i // 3])).id for i in range(6)]
    await store.cancel(ids[0], None)

    async def listed(**values: object) -> list[RequestId]:
        return [r.id for r in await store.list_requests(**values)]  # type: ignore[arg-type]

    assert ids[::-1] == await listed()
    assert ids[:3:-1] == await listed(limit=2)
    page = await store.list_requests(limit=2)
    assert ids[3:1:-1] == await listed(limit=2, before=page[-1].seq)
    assert [ids[4], ids[2], ids[0]] == await listed(account="a")
    assert [ids[5], ids[4], ids[3]] == await listed(model="n")
    assert [ids[0]] == await listed(state="cancelled")
    assert [ids[2]] == await listed(account="a", state="queued", model="m")
    assert [] == await listed(model="nul\0")


async def test_counts_name_all_five_states(store: Store) -> None:
    assert {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0} == await store.counts()
    for _ in range(6):
        await submitted(store)
    leases = [lease for _ in range(4) if (lease := await store.claim(ANY_CLAIM))]
    await store.succeed(leases[0], [], None)
    await store.fail(leases[1], Failure("c", "m"))
    await store.lose(leases[2], Failure("c", "m"), 3)
    last = (await store.list_requests(limit=1))[0]
    await store.cancel(last.id, None)
    assert {"queued": 2, "running": 1, "succeeded": 1, "failed": 1, "cancelled": 1} == await store.counts()


# -- group commit and limits ------------------------------------------------------------------------------
async def test_64_submits_at_once_are_all_there(place: Place) -> None:
    store, other = await place.open(), await place.open()
    news = [new_request(input=b"%d" % i) for i in range(64)]
    await asyncio.gather(*(store.submit(n) for n in news))
    got = {r.id: r.input for r in await other.list_requests(limit=100)}
    assert {n.id: n.input for n in news} == got


async def test_a_bad_submit_in_a_group_fails_alone(store: Store) -> None:
    news = [new_request() for _ in range(20)]
    taken = new_request(input=b"first")
    await store.submit(taken)
    bad = new_request(input=b"other", account="thief")
    news[7] = type(bad)(taken.id, bad.account, bad.key_id, bad.model, bad.input, {})
    news[11] = type(bad)(new_request_id(), bad.account, bad.key_id, "m", b"{}", {}, priority=2**80)
    answers = await asyncio.gather(*(store.submit(n) for n in news), return_exceptions=True)
    assert not any(isinstance(answer, StoreUnavailable) for answer in answers)
    assert [7, 11] == [i for i, answer in enumerate(answers) if isinstance(answer, Exception)]
    assert 19 == (await store.counts())["queued"]
    got = await store.get(taken.id)
    assert got is not None
    assert b"first" == got.input


async def test_queue_limit_refuses_what_is_above_it(store: Store) -> None:
    for _ in range(3):
        await store.submit(new_request(key="k"), queue_limit=3)
    with pytest.raises(QueueFull) as refused:
        await store.submit(new_request(key="k"), queue_limit=3)
    assert refused.value.retry_after
    await store.submit(new_request(key="other"), queue_limit=3)
    assert await store.claim(ANY_CLAIM) is not None
    await store.submit(new_request(key="k"), queue_limit=3)
    assert 4 == (await store.counts())["queued"]


async def test_queue_limit_holds_for_submits_at_once_from_two_processes(place: Place) -> None:
    stores = [await place.open(), await place.open()]
    answers = await asyncio.gather(
        *(stores[i % 2].submit(new_request(key="k"), queue_limit=10) for i in range(40)),
        return_exceptions=True,
    )
    assert 10 == sum(answer is None for answer in answers)
    assert 30 == sum(isinstance(answer, QueueFull) for answer in answers)
    assert 10 == (await stores[0].counts())["queued"]


async def test_ping(store: Store) -> None:
    await store.ping()
    assert {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0} == await store.counts()
