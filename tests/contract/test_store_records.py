"""What every store promises of keys, files, secrets, retention and wake-ups, and of being opened and closed."""

import asyncio
import os
import sqlite3
import time

import asyncpg
import msgspec
import pytest

from rushes.errors import InvalidInput, SettingsError, StoreUnavailable
from rushes.queue.base import Claim, Store
from rushes.queue.postgres.store import PostgresStore
from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import AccountId, FileId, RequestId, WorkerId
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


async def swept(store: Store, before: float = FAR_AHEAD, limit: int = 10) -> list[str]:
    return [request.id for request in await store.sweep(before, limit)]


async def swept_files(store: Store, before: float = FAR_AHEAD, limit: int = 10) -> list[str]:
    return [one.id for one in await store.sweep_files(before, limit)]


def stored(key: str) -> dict[str, Source]:
    return {"a": Source("stored", key, "image")}


async def test_the_ended_are_swept_once_and_oldest_first(store: Store) -> None:
    ids = [await ended(store, f"out/{i}") for i in range(3)]
    live = await submitted(store)
    assert [] == await swept(store, LONG_AGO)
    first = await store.get(RequestId(ids[0]))
    assert first is not None
    assert first.swept_at is None
    answered = await store.sweep(FAR_AHEAD, 2)
    assert ids[:2] == [r.id for r in answered]
    assert all(r.swept_at is not None for r in answered)
    assert answered[0] == await store.get(RequestId(ids[0]))
    assert ids[2:] == await swept(store)
    assert [] == await swept(store)
    assert await store.cancel(live.id, None) == "cancelled"
    assert [live.id] == await swept(store)


async def test_the_output_of_another_that_a_live_request_names_stays(store: Store) -> None:
    first = await ended(store, "out/first")
    free = await ended(store, "out/free")
    user = await submitted(store, sources=stored("out/first"))
    assert [free] == await swept(store)
    await store.cancel(user.id, None)
    assert [first, user.id] == await swept(store)


@pytest.mark.parametrize("end", ["cancel", "fail", "refuse", "lose"])
async def test_what_a_request_named_is_free_once_it_has_ended(store: Store, end: str) -> None:
    done = await ended(store, "out/done")
    user = await submitted(store, sources=stored("out/done"))
    (inputs,) = await store.claim_inputs(W, ("m",), 1)
    assert [] == await swept(store)
    if end == "cancel":
        await store.cancel(user.id, None)
    elif end == "refuse":
        assert await store.refuse(inputs, WHY)
    else:
        copy = Source("stored", "out/done", "image", key=f"inputs/{user.id}/1.png")
        assert await store.inputs_ready(inputs, {"a": copy})
        lease = await store.claim(Claim(W, ("m",)))
        assert lease is not None
        assert [] == await swept(store)
        assert await (store.fail(lease, WHY) if end == "fail" else store.lose(lease, WHY, 1))
    assert [done, user.id] == await swept(store)


async def test_an_attempt_that_is_lost_keeps_what_the_request_names(store: Store) -> None:
    await ended(store, "out/done")
    user = await submitted(store, sources=stored("out/done"))
    (inputs,) = await store.claim_inputs(W, ("m",), 1)
    copy = Source("stored", "out/done", "image", key=f"inputs/{user.id}/1.png")
    assert await store.inputs_ready(inputs, {"a": copy})
    lease = await store.claim(Claim(W, ("m",)))
    assert lease is not None
    assert "queued" == await store.lose(lease, WHY, 2)
    assert [] == await swept(store)


async def test_the_copies_made_while_fetching_are_kept_for_the_request(store: Store) -> None:
    done = await ended(store, "inputs/copy")
    await submitted(store, sources={"a": Source("url", "https://e.org/x", "image")})
    (lease,) = await store.claim_inputs(W, ("m",), 1)
    copy = Source("url", "https://e.org/x", "image", key="inputs/copy")
    assert await store.inputs_ready(lease, {"a": copy})
    assert [] == await swept(store)
    run = await store.claim(Claim(W, ("m",)))
    assert run is not None
    assert await store.fail(run, WHY)
    assert [done, run.request.id] == await swept(store)


async def test_an_upload_that_everybody_uses_keeps_no_request_from_being_swept(store: Store) -> None:
    await store.add_file(file("popular", created_at=100.0))
    past = [await submitted(store, sources=stored("uploads/popular")) for _ in range(3)]
    for request in past:
        await store.cancel(request.id, None)
    await submitted(store, sources=stored("uploads/popular"))
    assert [request.id for request in past] == await swept(store)
    assert [] == await swept_files(store)


async def test_uploads_go_once_old_and_unused(store: Store) -> None:
    for id_, created_at in (("old", 100.0), ("older", 50.0), ("oldest", 10.0), ("new", time.time())):
        await store.add_file(file(id_, created_at=created_at))
    user = await submitted(store, sources=stored("uploads/older"))
    assert ["oldest"] == await swept_files(store, 200.0, 1)
    assert await store.get_file(FileId("oldest"), None) is None
    assert ["old"] == await swept_files(store, 200.0)
    await store.cancel(user.id, None)
    assert ["older"] == await swept_files(store, 200.0)
    assert [] == await swept_files(store, 200.0)
    assert await store.get_file(FileId("new"), None) is not None


async def test_what_is_needed_does_not_hide_what_is_behind_it(store: Store) -> None:
    """A limit is of what is answered, not of what is looked at: else a sweeper would stand still."""
    await ended(store, "out/used")
    await submitted(store, model="not claimed here", sources=stored("out/used"))
    free = await ended(store, "out/free")
    assert [free] == await swept(store, limit=1)
    await store.add_file(file("used", created_at=50.0))
    await store.add_file(file("free", created_at=100.0))
    await submitted(store, sources=stored("uploads/used"))
    assert ["free"] == await swept_files(store, 200.0, 1)


async def test_a_submit_that_names_what_was_swept_is_refused(store: Store) -> None:
    done = await ended(store, "out/done")
    await store.add_file(file("f", created_at=50.0))
    kept = await ended(store, "out/kept")
    await submitted(store, model="not claimed here", sources=stored("out/kept"))
    assert [done] == await swept(store)
    assert ["f"] == await swept_files(store)
    sources = {
        "good": Source("stored", "out/kept", "image"),
        "gone": Source("stored", "out/done", "image"),
        "sent": Source("stored", "uploads/f", "image"),
        "same name": Source("sample", "out/done", "image"),
    }
    late, other = new_request(sources=sources), new_request(sources=stored("out/kept"))
    answers = await asyncio.gather(store.submit(late), store.submit(other), return_exceptions=True)
    assert isinstance(answers[0], InvalidInput)
    detail = answers[0].detail or []
    assert [(["gone"], "input_gone"), (["sent"], "input_gone")] == [(d["loc"], d["type"]) for d in detail]
    assert "gone: " in answers[0].message
    assert answers[1] is None
    assert await store.get(late.id) is None
    assert await store.get(RequestId(kept)) is not None


async def test_a_refused_submit_takes_no_place_in_the_queue(store: Store) -> None:
    await ended(store, "out/done")
    assert 1 == len(await swept(store))
    late, other = new_request(sources=stored("out/done")), new_request()
    answers = await asyncio.gather(
        store.submit(late, queue_limit=1), store.submit(other, queue_limit=1), return_exceptions=True
    )
    assert isinstance(answers[0], InvalidInput)
    assert answers[1] is None


async def test_a_sweep_and_submits_at_once_agree(place: Place) -> None:
    """Whatever order they come in: what was accepted has its file, and what was swept is refused."""
    one, other = await place.open(), await place.open()
    for turn in range(30):
        done = await ended(one, f"out/{turn}")
        await one.add_file(file(f"f{turn}", created_at=50.0))
        late = [new_request(model="x", sources=stored(f"{k}{turn}")) for k in ("out/", "uploads/f")]
        requests, files, *answers = await asyncio.gather(
            swept(one), swept_files(one), *(other.submit(new) for new in late), return_exceptions=True
        )
        assert [done] * isinstance(answers[0], InvalidInput) == requests
        assert [f"f{turn}"] * isinstance(answers[1], InvalidInput) == files
        for new in late:
            await other.cancel(new.id, None)
        await swept(one)
        await swept_files(one)


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_a_submit_and_a_sweep_wait_for_each_other(place: PostgresPlace) -> None:
    """In PostgreSQL both run at once: whoever is not through yet is waited for, whichever came first."""
    store = await place.open()
    done = await ended(store, "out/done")
    other = await asyncpg.connect(place.url)
    try:
        began = other.transaction()
        await began.start()
        new = new_request(sources=stored("out/done"))
        await other.execute(
            "SELECT * FROM submit_requests($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            *([new.id], ["acme"], ["key"], ["m"], [0], ["pending"], [b"{}"]),
            *([msgspec.json.encode(new.sources)], ['["out/done"]'], [0], [0]),
        )
        sweep = asyncio.create_task(swept(store))
        plain = await submitted(store)  # one that names no stored file waits for nobody
        await waiting(place)
        await began.commit()
        assert [] == await sweep
        await store.cancel(new.id, None)
        await store.cancel(plain.id, None)
        began = other.transaction()
        await began.start()
        assert done == await other.fetchval("SELECT id FROM sweep_requests($1, 1)", FAR_AHEAD)
        late = asyncio.create_task(store.submit(new_request(sources=stored("out/done"))))
        await waiting(place)
        await began.commit()
        with pytest.raises(InvalidInput):
            await late
    finally:
        await other.close()


async def waiting(place: PostgresPlace) -> None:
    """Until somebody waits for a lock."""
    async with asyncio.timeout(20):
        while not await place.execute("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
            await asyncio.sleep(0.01)


async def test_a_store_that_fails_while_it_sweeps_says_so(place: Place) -> None:
    store = await place.open()
    await ended(store, "out/1")
    if isinstance(place, PostgresPlace):
        await store.close()
        with pytest.raises(StoreUnavailable):
            await store.sweep(FAR_AHEAD, 10)
        return
    assert isinstance(place, SqlitePlace)
    connection = sqlite3.connect(place.path)
    connection.execute("ALTER TABLE live_keys RENAME TO lost")
    connection.close()
    with pytest.raises(StoreUnavailable):
        await store.sweep(FAR_AHEAD, 10)


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
        with pytest.raises(SettingsError, match="9000"):
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
