"""What every store promises of keys, files, secrets, retention and wake-ups, and of being opened and closed."""

import asyncio
import os
import sqlite3
import time

import pytest

from rushes.errors import StoreUnavailable
from rushes.queue.base import Claim, Store
from rushes.queue.postgres.store import PostgresStore
from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import AccountId, FileId, WorkerId
from rushes.requests.record import Failure, File, Output, Source
from support.stores import Place, PostgresPlace, SqlitePlace, api_key, new_request, submitted, until

W = WorkerId("w1")
WHY = Failure("c", "m")
LONG_AGO, FAR_AHEAD = 1.0, 4e9


# -- keys -------------------------------------------------------------------------------------------------
async def test_keys_are_found_by_hash_and_listed(store: Store) -> None:
    one, two = api_key("k1"), api_key("k2", "laptop")
    await store.add_key(one)
    await store.add_key(two)
    assert one == await store.find_key(one.hash)
    assert two == await store.find_key(two.hash)
    assert await store.find_key(b"\0" * 32) is None
    assert [one, two] == await store.list_keys()


async def test_a_revoked_key_is_still_found_and_says_so(store: Store) -> None:
    one = api_key("k1")
    await store.add_key(one)
    assert one == await store.find_key(one.hash)
    revoked = await store.revoke_key("k1")
    assert revoked is not None
    assert revoked.revoked_at is not None
    assert revoked == await store.find_key(one.hash)
    assert revoked == await store.revoke_key("k1")


async def test_a_key_is_revoked_by_name_where_that_fits_one_live_key(store: Store) -> None:
    await store.add_key(api_key("k1", "ci"))
    await store.add_key(api_key("k2", "ci"))
    await store.add_key(api_key("k3", "laptop"))
    with pytest.raises(ValueError, match="2"):
        await store.revoke_key("ci")
    assert (await store.revoke_key("laptop") or api_key("none")).id == "k3"
    await store.revoke_key("k1")
    assert (await store.revoke_key("ci") or api_key("none")).id == "k2"
    assert await store.revoke_key("ci") is None
    assert await store.revoke_key("nobody") is None


async def test_another_process_sees_a_new_key_at_once_and_a_revocation_soon(place: Place) -> None:
    one, other = await place.open(), await place.open()
    made = api_key("k1")
    assert await other.find_key(made.hash) is None
    await one.add_key(made)
    assert made == await other.find_key(made.hash)
    await one.revoke_key("k1")
    async with asyncio.timeout(20):
        while (await other.find_key(made.hash) or made).revoked_at is None:
            await asyncio.sleep(0.05)


# -- files and secrets ------------------------------------------------------------------------------------
def file(id_: str, name: str = "a.png", created_at: float = 1000.0) -> File:
    return File(FileId(id_), AccountId("acme"), name, f"uploads/{id_}", "image/png", 5, created_at)


async def test_files_belong_to_an_account(store: Store) -> None:
    odd = file("f1", "Grüße\0 \U0001f3ac.png")
    await store.add_file(odd)
    assert odd == await store.get_file(FileId("f1"), AccountId("acme"))
    assert odd == await store.get_file(FileId("f1"), None)
    assert await store.get_file(FileId("f1"), AccountId("other")) is None
    assert await store.get_file(FileId("f2\0"), None) is None
    await store.delete_file(FileId("f1"))
    assert await store.get_file(FileId("f1"), None) is None


async def test_a_secret_is_the_same_for_every_process(place: Place) -> None:
    stores = [await place.open() for _ in range(3)]
    made = await asyncio.gather(*(s.secret("links") for s in stores for _ in range(4)))
    assert 1 == len(set(made))
    assert 32 == len(made[0])
    assert made[0] != await stores[0].secret("other")
    assert made[0] == await (await place.open()).secret("links")


# -- retention --------------------------------------------------------------------------------------------
async def ended(store: Store, output: str, **values: object) -> str:
    new = await submitted(store, **values)
    lease = await store.claim(Claim(W, ("m",)))
    assert lease is not None
    assert await store.succeed(lease, [Output(output, "image", "image/png", 1, 2, 3)], None)
    return new.id


async def test_sweepable_are_the_ended_oldest_first_until_marked(store: Store) -> None:
    ids = [await ended(store, f"out/{i}") for i in range(3)]
    await submitted(store)
    assert [] == await store.sweepable(LONG_AGO, 10)
    found = await store.sweepable(FAR_AHEAD, 10)
    assert ids == [r.id for r in found]
    assert ids[:2] == [r.id for r in await store.sweepable(FAR_AHEAD, 2)]
    await store.mark_swept([found[0].id, found[1].id])
    assert ids[2:] == [r.id for r in await store.sweepable(FAR_AHEAD, 10)]
    swept = await store.get(found[0].id)
    assert swept is not None
    assert swept.swept_at is not None
    await store.mark_swept([])


async def test_what_a_live_request_names_is_not_swept(store: Store) -> None:
    """An output that another request has as its input; an input copy that two share."""
    shared = Source("url", "https://e.org/x", "image", key="inputs/shared")
    first = await ended(store, "out/first")
    second = await ended(store, "out/second", sources={"a": shared})
    free = await ended(store, "out/free")
    user = await submitted(store, sources={"a": Source("stored", "out/first", "image", key="inputs/1")})
    assert {second, free} == {r.id for r in await store.sweepable(FAR_AHEAD, 10)}
    other = await submitted(store, sources={"b": shared})
    assert [free] == [r.id for r in await store.sweepable(FAR_AHEAD, 10)]
    await store.cancel(user.id, None)
    lease = await store.claim(Claim(W, ("m",)))
    assert lease is not None
    assert other.id == lease.request.id
    assert {first, user.id, free} == {r.id for r in await store.sweepable(FAR_AHEAD, 10)}
    assert await store.fail(lease, WHY)
    assert {first, second, free, user.id, other.id} == {r.id for r in await store.sweepable(FAR_AHEAD, 10)}


async def test_the_copies_made_while_fetching_are_kept_for_the_request(store: Store) -> None:
    done = await ended(store, "inputs/copy")
    await submitted(store, sources={"a": Source("url", "https://e.org/x", "image")})
    (lease,) = await store.claim_inputs(W, ("m",), 1)
    assert [done] == [r.id for r in await store.sweepable(FAR_AHEAD, 10)]
    copy = Source("url", "https://e.org/x", "image", key="inputs/copy")
    assert await store.inputs_ready(lease, {"a": copy})
    assert [] == await store.sweepable(FAR_AHEAD, 10)


async def test_uploads_are_sweepable_once_old_and_unused(store: Store) -> None:
    await store.add_file(file("old", created_at=100.0))
    await store.add_file(file("older", created_at=50.0))
    await store.add_file(file("new", created_at=time.time()))
    assert ["older", "old"] == [f.id for f in await store.sweepable_files(200.0, 10)]
    assert ["older"] == [f.id for f in await store.sweepable_files(200.0, 1)]
    user = await submitted(store, sources={"a": Source("stored", "uploads/older", "image")})
    assert ["old"] == [f.id for f in await store.sweepable_files(200.0, 10)]
    await store.cancel(user.id, None)
    assert ["older", "old"] == [f.id for f in await store.sweepable_files(200.0, 10)]


async def test_blocked_files_do_not_hide_those_behind_them(store: Store) -> None:
    """A limit is of what is answered, not of what is looked at: else a sweeper would stand still."""
    await ended(store, "out/used")
    used = {"a": Source("stored", "out/used", "image", key="k")}
    await submitted(store, model="not claimed here", sources=used)
    free = await ended(store, "out/free")
    assert [free] == [r.id for r in await store.sweepable(FAR_AHEAD, 1)]
    await store.add_file(file("used", created_at=50.0))
    await store.add_file(file("free", created_at=100.0))
    await submitted(store, sources={"a": Source("stored", "uploads/used", "image", key="k2")})
    assert ["free"] == [f.id for f in await store.sweepable_files(200.0, 1)]


# -- wake-ups ---------------------------------------------------------------------------------------------
async def test_a_submit_wakes_a_sleeper_of_another_process(place: Place) -> None:
    one, other = await place.open(), await place.open()
    woken = asyncio.Event()
    end = other.subscribe(woken.set)
    for _ in range(5):
        woken.clear()
        new = await submitted(one)
        await until(woken)
        async with asyncio.timeout(20):
            while (lease := await other.claim(Claim(W, ("m",)))) is None:
                woken.clear()
                await until(woken)
        assert new.id == lease.request.id
    end()


async def test_inputs_that_are_ready_and_leases_that_end_wake_sleepers(place: Place) -> None:
    one, other = await place.open(), await place.open()
    await submitted(one, sources={"a": Source("url", "https://e.org/x", "image")})
    (inputs,) = await one.claim_inputs(W, ("m",), 1)
    woken = asyncio.Event()
    other.subscribe(woken.set)
    await one.inputs_ready(inputs, {})
    await until(woken)
    lease = await other.claim(Claim(W, ("m",)))
    assert lease is not None
    woken.clear()
    assert await one.release(lease)
    await until(woken)
    assert await other.claim(Claim(W, ("m",))) is not None


async def test_an_ended_subscription_is_silent_and_others_are_not(store: Store) -> None:
    silent, woken = asyncio.Event(), asyncio.Event()
    end = store.subscribe(silent.set)
    store.subscribe(woken.set)
    end()
    end()
    await submitted(store)
    await until(woken)
    assert not silent.is_set()


# -- open and close ---------------------------------------------------------------------------------------
async def test_many_processes_open_a_new_database_at_once(place: Place) -> None:
    stores = await asyncio.gather(*(place.open() for _ in range(5)))
    new = new_request()
    await stores[0].submit(new)
    assert [1] * 5 == [(await s.counts())["queued"] for s in stores]


async def test_a_closed_store_is_unavailable(store: Store) -> None:
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.submit(new_request())
    with pytest.raises(StoreUnavailable):
        await store.counts()
    with pytest.raises(StoreUnavailable):
        await store.claim(Claim(W, ("m",)))
    await store.close()


async def test_a_database_of_a_newer_version_is_refused(place: Place) -> None:
    await (await place.open()).close()
    if isinstance(place, PostgresPlace):
        await place.execute("INSERT INTO migrations (number, name) VALUES (9000, 'future')")
        again: Store = PostgresStore(place.url)
    else:
        assert isinstance(place, SqlitePlace)
        connection = sqlite3.connect(place.path)
        connection.execute("PRAGMA user_version = 9000")
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master")]
        if "migrations" in tables:
            connection.execute("INSERT INTO migrations (number, name, applied_at) VALUES (9000, 'future', 0)")
        connection.commit()
        connection.close()
        again = SqliteStore(place.path)
    try:
        with pytest.raises(StoreUnavailable, match="9000"):
            await again.open()
    finally:
        await again.close()
        if isinstance(place, PostgresPlace):
            await place.execute("DELETE FROM migrations WHERE number = 9000")


async def test_a_database_that_is_not_there_is_unavailable(place: Place) -> None:
    if isinstance(place, PostgresPlace):
        gone: Store = PostgresStore("postgresql://postgres@127.0.0.1:1/none", timeout=2.0)
    else:
        assert isinstance(place, SqlitePlace)
        blocked = place.path.parent / "a file"
        blocked.write_bytes(os.urandom(8))
        gone = SqliteStore(blocked / "rushes.db")
    with pytest.raises(StoreUnavailable):
        await gone.open()
    await gone.close()
