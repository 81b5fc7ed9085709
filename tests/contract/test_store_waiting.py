"""What every store promises of the look at what waits for remotes: fair to keys, by priority, then arrival."""

from collections import Counter

from rushes.queue.base import Claim, Store
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import RemoteTask
from support.stores import Place, PostgresPlace, SqlitePlace, at_remote, record, submitted, taken

W = WorkerId("w1")
TASK = RemoteTask("fal", "accepted", 1.0, "h")


async def ids_of(store: Store, models: tuple[str, ...], limit: int) -> list[RequestId]:
    return [request.id for request in await store.waiting(models, limit)]


async def fill(place: Place, count: int, key: str, model: str, priority: str = "0") -> None:
    """``key``, ``model`` and ``priority`` are expressions over i, from 1 to ``count``."""
    assert isinstance(place, SqlitePlace | PostgresPlace)
    empty = "x'', x'7b7d'" if isinstance(place, SqlitePlace) else "'', '{}'"
    await place.execute(
        f"WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) "
        "INSERT INTO requests (id, account, key_id, model, priority, inputs, created_at, input, sources) "
        f"SELECT 'r' || i, 'a', {key}, {model}, {priority}, 'ready', 1, {empty} FROM n ORDER BY i"
    )


async def test_what_waits_is_listed_by_priority_then_arrival(store: Store) -> None:
    first = await submitted(store, model="a")
    second = await submitted(store, model="b")
    high = await submitted(store, model="a", priority=1)
    low = await submitted(store, model="b", priority=-1)
    await submitted(store, model="c", priority=9)
    found = await store.waiting(("a", "b", "a", "none"), 10)
    assert [high.id, first.id, second.id, low.id] == [r.id for r in found]
    assert found[0] == await record(store, high.id)
    assert [] == await store.waiting(("a",), 0)
    assert [] == await store.waiting(("a",), -1)
    assert [] == await store.waiting((), 9)


async def test_each_keys_part_of_each_line_is_cut_by_itself(store: Store) -> None:
    """The greedy key's part is cut to its best two in either line; the other key's one comes, however late."""
    greedy = [await submitted(store, key="greedy", model="a") for _ in range(5)]
    best = await submitted(store, key="greedy", model="a", priority=1)
    in_b = [await submitted(store, key="greedy", model="b") for _ in range(3)]
    late = await submitted(store, key="modest", model="a")
    below = await submitted(store, key="another", model="a", priority=-5)
    expected = [best, greedy[0], in_b[0], in_b[1], late, below]
    assert [new.id for new in expected] == await ids_of(store, ("a", "b"), 2)
    assert [best.id, in_b[0].id, late.id, below.id] == await ids_of(store, ("b", "a"), 1)
    assert [best.id, late.id, below.id] == await ids_of(store, ("a",), 1)


async def test_what_cannot_be_taken_leaves_its_place_to_the_next_of_its_key(store: Store) -> None:
    one, two, three, four = [await submitted(store) for _ in range(4)]
    assert await store.claim(Claim(W, ("m",))) is not None
    noted = await taken(store, two.id)
    assert await store.note(noted, TASK)
    assert await store.release(noted)
    assert [three.id, four.id] == await ids_of(store, ("m",), 2)
    await store.cancel(three.id, None)
    assert [four.id] == await ids_of(store, ("m",), 2)
    await store.cancel(four.id, None)
    assert [] == await ids_of(store, ("m",), 2)
    assert one.id not in await ids_of(store, ("m",), 9)
    await at_remote(store, TASK, key="other")
    assert [] == await ids_of(store, ("m",), 2)


async def test_behind_very_many_of_one_key_the_others_are_found(place: Place, store: Store) -> None:
    """Of 20,000 every thousandth is of another key, and the last one alone is of a third."""
    await fill(
        place, 20_000, "CASE WHEN i = 20000 THEN 'last' WHEN i % 1000 = 0 THEN 'other' ELSE 'greedy' END", "'m'"
    )
    found = await store.waiting(("m", "n"), 100)
    assert {"greedy": 100, "other": 19, "last": 1} == Counter(request.key_id for request in found)
    assert [request.seq for request in found] == sorted(request.seq for request in found)
    assert [f"r{i}" for i in range(1, 101)] == [r.id for r in found if r.key_id == "greedy"]


async def test_where_there_are_too_many_all_keys_give_up_their_last(place: Place, store: Store) -> None:
    """60 keys, of which 50 have 60 each and ten, the last to come, one: 2000 in all, and the ten are among them."""
    await fill(place, 3010, "CASE WHEN i <= 3000 THEN 'k' || (i % 50) ELSE 'one' || i END", "'m'", "i % 2")
    found = await store.waiting(("m",), 60)
    counts = Counter(request.key_id for request in found)
    assert 2000 == len(found)
    assert 60 == len(counts)
    assert {1} == {n for key, n in counts.items() if key.startswith("one")}
    assert {39, 40} == {n for key, n in counts.items() if key.startswith("k")}
    order = [(-request.priority, request.seq) for request in found]
    assert sorted(order) == order


async def test_of_more_keys_than_are_listed_the_best_heads_are(place: Place, store: Store) -> None:
    """2500 keys with two each: a place for the first of 2000, by priority, then arrival."""
    await fill(place, 5000, "'k' || (i % 2500)", "'m'", "CASE WHEN i > 4990 THEN 1 ELSE 0 END")
    found = await store.waiting(("m",), 5)
    assert [f"r{i}" for i in [*range(4991, 5001), *range(1, 1991)]] == [request.id for request in found]
