"""What is PostgreSQL's alone: lost answers, a server that dies or freezes, migrations, the folded tally."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
import pytest_asyncio

from rushes.errors import StoreUnavailable
from rushes.queue.base import Beat, Claim, Take
from rushes.queue.postgres.connection import migrate
from rushes.queue.postgres.queries import migrations
from rushes.queue.postgres.store import PostgresStore
from rushes.requests.ids import WorkerId
from rushes.requests.record import Failure, Lease, Output, RemoteTask, Source
from support.postgres import PostgresServer, postgres_server
from support.proxy import Proxy
from support.stores import PostgresPlace, api_key, new_request, submitted, until

W = WorkerId("w1")
WHY = Failure("c", "m")
CLAIM = Claim(W, ("m",))
OUTPUT = Output("out/1.png", "image", "image/png", 1, 2, 3)


@pytest_asyncio.fixture
async def pg(suite_url: str) -> AsyncIterator[PostgresPlace]:
    place = PostgresPlace(suite_url)
    await place.clear()
    yield place
    await place.close()


@pytest_asyncio.fixture
async def proxy(pg: PostgresPlace) -> AsyncIterator[tuple[Proxy, PostgresStore]]:
    """A store with one connection to the server through a proxy, all its statements prepared."""
    parts = urlsplit(pg.url)
    target = Path(parse_qs(parts.query)["host"][0]) / ".s.PGSQL.5432"
    folder = Path(tempfile.mkdtemp(prefix="rushes-px-"))
    proxy = Proxy(folder, target)
    await proxy.start()
    url = f"postgresql://postgres@/{parts.path.strip('/')}?host={folder}"
    store = PostgresStore(url, connections=1, timeout=2.0)
    try:
        await (await pg.open()).close()
        await store.open()
        # The proxy looks for a value among the bytes of the message that executes a prepared statement.
        await submitted(store, sources={"a": Source("url", "https://e.org/warm", "image")})
        (inputs,) = await store.claim_inputs(W, ("m",), 1)
        await store.inputs_ready(inputs, {})
        lease = await store.claim(CLAIM)
        assert lease is not None
        assert await store.succeed(lease, [], None)
        yield proxy, store
    finally:
        proxy.thawed.set()
        await store.close()
        await proxy.stop()
        shutil.rmtree(folder)


# -- lost answers -----------------------------------------------------------------------------------------
async def test_a_submit_whose_answer_is_lost_is_stored_once(
    pg: PostgresPlace, proxy: tuple[Proxy, PostgresStore]
) -> None:
    network, store = proxy
    new = new_request(input=b"only once")
    network.lose_answer_to = b"only once"
    await store.submit(new)
    assert 1 == network.lost
    assert 1 == (await store.counts())["queued"]
    rows = await pg.execute("SELECT id FROM requests WHERE input = $1", b"only once")
    assert [new.id] == [row["id"] for row in rows]


async def test_a_lost_answer_does_not_make_a_full_queue_of_what_was_stored(
    proxy: tuple[Proxy, PostgresStore],
) -> None:
    network, store = proxy
    new = new_request(input=b"the last place")
    network.lose_answer_to = b"the last place"
    await store.submit(new, queue_limit=1)
    assert 1 == network.lost
    assert await store.get(new.id) is not None


@pytest.mark.parametrize("outcome", ["succeed", "fail"])
async def test_an_outcome_whose_answer_is_lost_is_known_to_be_ours(
    proxy: tuple[Proxy, PostgresStore], outcome: str
) -> None:
    network, store = proxy
    await submitted(store)
    lease = await store.claim(CLAIM)
    assert lease is not None
    network.lose_answer_to = lease.request.id.encode()
    if outcome == "succeed":
        assert await store.succeed(lease, [OUTPUT], 0.5)
    else:
        assert await store.fail(lease, WHY)
    assert 1 == network.lost
    assert not await store.succeed(lease, [OUTPUT], 0.5)
    assert not await store.fail(lease, WHY)


async def test_ready_inputs_whose_answer_is_lost_are_known_to_be_ours(
    proxy: tuple[Proxy, PostgresStore],
) -> None:
    network, store = proxy
    await submitted(store, sources={"a": Source("url", "https://e.org/x", "image")})
    (lease,) = await store.claim_inputs(W, ("m",), 1)
    network.lose_answer_to = lease.request.id.encode()
    assert await store.inputs_ready(lease, {"a": Source("url", "https://e.org/x", "image", key="k")})
    assert 1 == network.lost


async def test_a_claim_whose_answer_is_lost_is_given_to_the_next_by_the_reaper(
    proxy: tuple[Proxy, PostgresStore],
) -> None:
    network, store = proxy
    await submitted(store, model="lost model")
    claim = Claim(W, ("lost model",))
    network.lose_answer_to = b"lost model"
    with pytest.raises(StoreUnavailable):
        await store.claim(claim)
    assert 1 == network.lost
    assert await store.claim(claim) is None
    assert 1 == await store.expire(await store.leases(), WHY, 3)
    again = await store.claim(claim)
    assert again is not None
    assert 2 == again.request.attempt


async def test_a_take_whose_answer_is_lost_goes_to_the_next_and_is_reserved_once(
    proxy: tuple[Proxy, PostgresStore],
) -> None:
    network, store = proxy
    new = await submitted(store)
    wanted = Take(new.id, W, "fal", 0.5, budget_usd=0.75)
    network.lose_answer_to = new.id.encode()
    with pytest.raises(StoreUnavailable):
        await store.take(wanted)
    assert 1 == network.lost
    assert "gone" == await store.take(wanted)
    assert 1 == await store.expire(await store.leases(), WHY, 3)
    again = await store.take(wanted)
    assert isinstance(again, Lease)
    assert (2, 0.5) == (again.request.attempt, await store.spent(None))


async def test_a_resumption_whose_answer_is_lost_is_resumed_by_the_next(
    proxy: tuple[Proxy, PostgresStore],
) -> None:
    network, store = proxy
    lease = await store.take(Take((await submitted(store)).id, W, "lost remote"))
    assert isinstance(lease, Lease)
    task = RemoteTask("lost remote", "accepted", 1.0, "h")
    assert await store.note(lease, task)
    assert await store.release(lease)
    network.lose_answer_to = b"lost remote"
    with pytest.raises(StoreUnavailable):
        await store.resume(W, [("lost remote", "")], ("m",))
    assert 1 == network.lost
    assert await store.resume(W, [("lost remote", "")], ("m",)) is None
    assert 1 == await store.expire(await store.leases(), WHY, 1)
    again = await store.resume(W, [("lost remote", "")], ("m",))
    assert again is not None
    assert (1, task) == (again.request.attempt, again.request.remote_task)


async def test_a_note_and_a_settlement_whose_answers_are_lost_are_made_again(
    proxy: tuple[Proxy, PostgresStore],
) -> None:
    network, store = proxy
    lease = await store.take(Take((await submitted(store)).id, W, "fal", 0.5))
    assert isinstance(lease, Lease)
    task = RemoteTask("fal", "accepted", 1.0, "the lost handle")
    network.lose_answer_to = b"the lost handle"
    assert await store.note(lease, task)
    assert 1 == network.lost
    got = await store.get(lease.request.id)
    assert got is not None
    assert task == got.remote_task
    network.lose_answer_to = lease.request.id.encode()
    await store.settle(lease, "fal", 0.25)
    assert 2 == network.lost
    assert 0.25 == await store.spent(None)
    network.lose_answer_to = lease.request.id.encode()
    await store.settle(lease, "unreserved", 0.25)
    assert 3 == network.lost
    assert 0.5 == await store.spent(None)


async def test_a_frozen_server_is_unavailable_and_nothing_hangs(proxy: tuple[Proxy, PostgresStore]) -> None:
    network, store = proxy
    network.thawed.clear()
    async with asyncio.timeout(30):
        answers = await asyncio.gather(
            store.submit(new_request()), store.counts(), store.claim(CLAIM), return_exceptions=True
        )
    assert [StoreUnavailable] * 3 == [type(answer) for answer in answers]
    network.thawed.set()
    network.cut()
    await recovered(store)


async def recovered(store: PostgresStore) -> None:
    """Wait until the store works by itself."""
    async with asyncio.timeout(30):
        while True:
            try:
                await store.submit(new_request())
            except StoreUnavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def test_wake_ups_come_again_after_the_connection_was_cut(
    pg: PostgresPlace, proxy: tuple[Proxy, PostgresStore]
) -> None:
    network, store = proxy
    woken = asyncio.Event()
    store.subscribe(woken.set)
    network.cut()
    other = await pg.open()
    for _ in range(3):
        woken.clear()
        await submitted(other)
        await until(woken)
    async with asyncio.timeout(30):
        while not await pg.execute(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
            " AND pid <> pg_backend_pid()"
        ):
            await asyncio.sleep(0.05)


# -- a server that dies -----------------------------------------------------------------------------------
async def test_what_was_acknowledged_survives_a_kill_of_the_server() -> None:
    """kill -9 of PostgreSQL under eight submitters: all that was acknowledged is there, once."""
    with postgres_server() as server:
        place = PostgresPlace(server.create_database())
        store = await place.open(timeout=5.0)
        acknowledged: list[str] = []
        stop = asyncio.Event()
        refused = 0

        async def submit() -> None:
            nonlocal refused
            while not stop.is_set():
                new = new_request()
                try:
                    await store.submit(new)
                except StoreUnavailable:
                    refused += 1
                    await asyncio.sleep(0.02)
                else:
                    acknowledged.append(new.id)

        tasks = [asyncio.create_task(submit()) for _ in range(8)]
        for _ in range(2):
            before = len(acknowledged)
            async with asyncio.timeout(60):
                while len(acknowledged) < before + 300:
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(server.kill9)
            await asyncio.to_thread(server.start)
        async with asyncio.timeout(60):
            before = len(acknowledged)
            while len(acknowledged) < before + 50:
                await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*tasks)
        assert refused > 0
        stored = await place.execute("SELECT id FROM requests")
        assert len(set(acknowledged)) == len(acknowledged)
        assert set(acknowledged) <= {row["id"] for row in stored}
        assert len(stored) == (await store.counts())["queued"]
        await place.close()


async def test_a_stopped_server_is_unavailable_and_is_used_again(tmp_path: Path) -> None:
    with postgres_server() as server:
        place = PostgresPlace(server.create_database())
        store = await place.open()
        new = await submitted(store)
        server.stop()
        for attempt in (store.ping(), store.submit(new_request()), store.get(new.id), store.claim(CLAIM)):
            with pytest.raises(StoreUnavailable):
                await attempt
        with pytest.raises(StoreUnavailable):
            await PostgresStore(place.url, timeout=2.0).open()
        server.start()
        await recovered(store)
        await store.ping()
        lease = await store.claim(CLAIM)
        assert lease is not None
        assert new.id == lease.request.id
        await place.close()


# -- schema -----------------------------------------------------------------------------------------------
async def test_migrations_are_applied_once_by_many_at_once(postgres: PostgresServer) -> None:
    place = PostgresPlace(postgres.create_database())
    stores = await asyncio.gather(*(place.open() for _ in range(6)))
    rows = await place.execute("SELECT number FROM migrations ORDER BY number")
    assert [number for number, _, _ in migrations()] == [row["number"] for row in rows]
    await stores[0].ping()
    await place.close()


async def test_a_migration_that_fails_leaves_nothing_behind(postgres: PostgresServer) -> None:
    place = PostgresPlace(postgres.create_database())
    connection = await asyncpg.connect(place.url)
    broken = [*migrations(), (9999, "9999_broken", "CREATE TABLE half (x int); SELECT broken")]
    with pytest.raises(asyncpg.UndefinedColumnError):
        await migrate(connection, broken)
    assert not await connection.fetchval("SELECT to_regclass('requests') IS NOT NULL")
    await connection.close()
    store = await place.open()
    await store.ping()
    await place.close()


@pytest.mark.parametrize(
    "change",
    [
        "state = 'running'",
        "state = 'succeeded'",
        "state = 'failed', finished_at = 1",
        "state = 'odd'",
        "inputs = 'fetching'",
        "worker = 'w'",
        "finished_at = 1",
        "outputs = ''",
        "failure = ''",
        "swept_at = 1",
        "attempt = -1",
    ],
)
async def test_a_state_that_cannot_be_cannot_be_stored(pg: PostgresPlace, change: str) -> None:
    store = await pg.open()
    await submitted(store)
    with pytest.raises(asyncpg.CheckViolationError):
        await pg.execute(f"UPDATE requests SET {change}")


async def test_an_outcome_cannot_be_changed_by_any_statement(pg: PostgresPlace) -> None:
    store = await pg.open()
    new = await submitted(store)
    await store.cancel(new.id, None)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await pg.execute("UPDATE requests SET state = 'queued', finished_at = NULL")


async def test_acknowledged_means_on_the_disk_whatever_the_servers_default(
    pg: PostgresPlace, postgres: PostgresServer
) -> None:
    name = urlsplit(pg.url).path.strip("/")
    await pg.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    try:
        store = await pg.open()
        assert isinstance(store, PostgresStore)
        setting = await store._database.use(lambda c: c.fetchval("SHOW synchronous_commit"))
        assert "on" == setting
    finally:
        await pg.execute(f"ALTER DATABASE {name} RESET synchronous_commit")


# -- the tally --------------------------------------------------------------------------------------------
async def test_positions_do_not_depend_on_when_the_tally_is_folded(pg: PostgresPlace) -> None:
    store = await pg.open()
    ids = [(await submitted(store, priority=i % 2)).id for i in range(30)]
    await store.cancel(ids[3], None)

    async def places() -> list[int]:
        views = [await store.status(id_, None) for id_ in ids]
        return [await store.position(view) for view in views if view]

    before, counts = await places(), await store.counts()
    assert await pg.execute("SELECT FROM tally_change")
    await store.leases()
    assert not await pg.execute("SELECT FROM tally_change")
    assert (before, counts) == (await places(), await store.counts())


async def test_the_tally_folds_itself_and_forgets_what_is_empty(pg: PostgresPlace) -> None:
    store = await pg.open()
    for _ in range(150):
        await submitted(store)
        lease = await store.claim(CLAIM)
        assert lease is not None
        assert await store.succeed(lease, [], None)
    changes = await pg.execute("SELECT FROM tally_change")
    assert len(changes) < 300  # of 750
    await store.leases()
    rows = await pg.execute("SELECT state, n FROM tally")
    assert [("succeeded", 150)] == [tuple(row) for row in rows]
    assert not await pg.execute("SELECT FROM tally_bucket")


async def test_a_revoked_key_is_remembered_for_as_long_as_was_asked(pg: PostgresPlace) -> None:
    now = [0.0]
    one = await pg.open(key_cache_seconds=5.0, clock=lambda: now[0])
    other = await pg.open()
    made = api_key("k1")
    await one.add_key(made)
    assert made == await one.find_key(made.hash)
    revoked = await other.revoke_key("k1")
    now[0] = 4.9
    assert made == await one.find_key(made.hash)
    now[0] = 5.0
    assert revoked == await one.find_key(made.hash)


async def test_beats_of_two_processes_in_any_order_do_not_deadlock(pg: PostgresPlace) -> None:
    one, other = await pg.open(), await pg.open()
    leases = []
    for _ in range(40):
        await submitted(one)
        lease = await one.claim(CLAIM)
        assert lease is not None
        leases.append(lease)
    beats = [Beat(x.request.id, x.fence) for x in leases]
    lost = await asyncio.gather(
        *(store.renew(order) for _ in range(10) for store, order in ((one, beats), (other, beats[::-1])))
    )
    assert [set()] * 20 == lost
    assert {20} == {mark.beat for mark in await one.leases()}
