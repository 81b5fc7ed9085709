"""What a worker with remotes remembers of the line, and how deep it looks."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import AccountId, KeyId, RequestId, new_request_id
from rushes.requests.record import NewRequest, Request
from rushes.worker.line import LEAST_DEPTH, MOST_DEPTH, Depth, Memory, Places

A, B = RequestId("a"), RequestId("b")


def request(seq: int, model: str = "m", key: str = "k") -> Request:
    return Request(
        seq,
        RequestId(f"r{seq}"),
        AccountId("a"),
        KeyId(key),
        model,
        "queued",
        0,
        0,
        "ready",
        b"{}",
        {},
        0.0,
    )


def line(count: int, model: str = "m", key: str = "k", first: int = 0) -> list[Request]:
    return [request(first + n, model, key) for n in range(count)]


# -- how deep -----------------------------------------------------------------------------------------------
def test_it_looks_deeper_where_the_heads_cannot_go() -> None:
    depth = Depth()
    seen = []
    while depth.looked(line(depth.value), (), room=True):
        seen.append(depth.value)
    assert [16, 32, 64, 128, 256, 512] == seen
    assert MOST_DEPTH == depth.value


def test_one_group_that_stands_still_is_enough() -> None:
    depth = Depth()
    waiting = [*line(8), *line(3, key="other", first=100)]
    assert depth.looked(waiting, {waiting[-1].id}, room=True)


@pytest.mark.parametrize(
    ("waiting", "went", "room"),
    [
        ([], (), True),
        (line(LEAST_DEPTH - 1), (), True),  # all of them are seen
        (line(LEAST_DEPTH), (RequestId("r3"),), True),  # its head moves
        (line(LEAST_DEPTH), (), False),  # nobody could go anyway
        ([*line(8), *line(1992, key="other", first=100)], (), True),  # the store answers no more
    ],
)
def test_else_it_does_not(waiting: list[Request], went: tuple[RequestId, ...], room: bool) -> None:
    depth = Depth()
    assert not depth.looked(waiting, went, room=room)
    assert LEAST_DEPTH == depth.value


def test_it_comes_back_to_where_things_move() -> None:
    depth = Depth()
    for _ in range(3):
        depth.looked(line(depth.value), (), room=True)
    assert 64 == depth.value
    depth.looked(line(50), (), room=True)
    assert 64 == depth.value  # nothing moves: those that it sees now, it goes on seeing
    depth.looked(line(64), {RequestId("r20")}, room=True)
    assert 32 == depth.value
    depth.looked(line(32), {RequestId("r0")}, room=True)
    assert LEAST_DEPTH == depth.value


# -- since when ---------------------------------------------------------------------------------------------
def test_waiting_counts_from_the_first_look() -> None:
    memory = Memory()
    assert [0.0, 2.0, 0.0, 900.0] == [
        memory.waited(A, 100.0),
        memory.waited(A, 102.0),
        memory.waited(B, 102.0),
        memory.waited(A, 1000.0),
    ]


def test_idle_counts_while_slots_are_free_at_every_look() -> None:
    memory = Memory()
    looks = [(0.0, True), (1.0, True), (4.0, True), (5.0, False), (6.0, True), (7.0, True), (20.0, True)]
    expected = [0.0, 1.0, 4.0, 0.0, 0.0, 1.0, 0.0]  # at last nobody had looked for too long
    assert expected == [memory.idle("m", now, free=free) for now, free in looks]
    assert 0.0 == memory.idle("other", 20.0, free=True)


def test_what_is_left_to_others_is_not_left_for_ever() -> None:
    memory = Memory()
    looks = [(0.0, True), (3.0, True), (4.0, False), (5.0, True), (6.0, True)]
    assert [0.0, 3.0, 0.0, 0.0, 1.0] == [memory.left(A, now, to_others=left) for now, left in looks]


def test_things_are_said_once_of_each() -> None:
    memory = Memory()
    said = [("stays", A), ("stays", A), ("stays", B), ("other", A), ("stays", A)]
    assert [True, False, True, True, False] == [memory.first(what, id_) for what, id_ in said]


def test_it_forgets_what_was_not_seen_for_longest() -> None:
    memory = Memory()
    memory.waited(A, 0.0)
    for n in range(20_000):
        memory.waited(RequestId(f"r{n}"), 1.0)
        memory.waited(B, 1.0)
    assert (0.0, 9.0) == (memory.waited(A, 10.0), memory.waited(B, 10.0))


# -- which place --------------------------------------------------------------------------------------------
@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "rushes.db")
    await store.open()
    yield store
    await store.close()


async def submit(store: SqliteStore, *models: str) -> None:
    for model in models:
        await store.submit(NewRequest(new_request_id(), AccountId("a"), KeyId("k"), model, b"{}", {}))


async def test_others_between_them_count(store: SqliteStore) -> None:
    await submit(store, "m", "n", "n", "m", "x", "m")
    listed = await store.waiting(["m"], 100)
    places = Places(store, ("m", "n"), listed, waiting=5)
    assert [1, 4, 5] == [await places.of(one) for one in listed]
    assert [1, 4, 6] == [await Places(store, None, listed, waiting=6).of(one) for one in listed]


async def test_who_went_stands_before_nobody(store: SqliteStore) -> None:
    await submit(store, "m", "n", "m", "m", "m")
    listed = await store.waiting(["m"], 100)
    places = Places(store, ("m", "n"), listed, waiting=5)
    assert 3 == await places.of(listed[1])
    places.gone(listed[1].id)
    await store.cancel(listed[1].id, None)
    assert [1, 3, 4] == [await places.of(listed[n]) for n in (0, 2, 3)]


async def test_where_all_are_seen_nobody_is_asked(store: SqliteStore) -> None:
    await submit(store, *["m"] * 5)
    listed = await store.waiting(["m"], 100)
    await store.close()
    places = Places(store, ("m",), listed, waiting=5)
    assert [1, 2, 3, 4, 5] == [await places.of(one) for one in listed]
    places.gone(listed[0].id)
    assert [1, 4] == [await places.of(listed[n]) for n in (1, 4)]
    await store.open()


async def test_in_a_long_line_some_are_asked_for(store: SqliteStore) -> None:
    await submit(store, "n", *["m"] * 100, "n", "n")
    listed = await store.waiting(["m"], 100)
    assert list(range(2, 102)) == [await Places(store, ("m", "n"), listed, 103).of(one) for one in listed]
    places = Places(store, ("m", "n"), listed, waiting=103)
    await places.of(listed[0])
    await store.close()  # those behind it are counted from there
    assert [2, 3, 8] == [await places.of(listed[n]) for n in (0, 1, 6)]
    await store.open()
