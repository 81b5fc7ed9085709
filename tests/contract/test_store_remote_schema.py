"""Under the promises about remotes: a database of the version before, plans, wake-ups, pace over many requests."""

import asyncio
import contextlib
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from rushes.queue.base import Claim, Store, Take
from rushes.queue.postgres import connection as pg_connection
from rushes.queue.postgres import queries
from rushes.queue.sqlite import database
from rushes.requests.ids import WorkerId
from rushes.requests.record import Failure, Lease, RemoteTask, StatusView, WorkerRecord
from rushes.requests.states import STATES
from support.postgres import PostgresServer
from support.stores import KINDS, Place, PostgresPlace, SqlitePlace, submitted

W = WorkerId("w1")
WHY = Failure("c", "m")
TASK = RemoteTask("fal", "accepted", 1.0, "h")
BEFORE = {"sqlite": 1, "postgres": 4}
"""The newest schema that knows nothing of remotes."""
ENDED = {"finished_at": 1010.0}
RAN = {"attempt": 1, "fence": 1, "started_at": 1001.0, "engine": "wan"}
ROWS: dict[str, dict[str, Any]] = {
    "waits": {},
    "high": {"priority": 5},
    "pending": {"inputs": "pending"},
    "fetching": {"inputs": "fetching", "worker": "w9", "fence": 1},
    "runs": {"state": "running", "worker": "w9", **RAN},
    "succeeded": {"state": "succeeded", "outputs": b"[]", "cost_usd": 0.5, **RAN, **ENDED},
    "failed": {"state": "failed", "failure": b'{"code":"c","message":"m"}', **RAN, **ENDED},
    "cancelled": {"state": "cancelled", **ENDED},
}
WORKER = {
    "id": "w9", "host": "h", "pid": 7, "slots": 2, "engine": "wan", "owner": "o", "wake_port": 0, "beat": 3,
    "started_at": 1000.0,
}  # fmt: skip


def insert(table: str, values: dict[str, Any], mark: Callable[[int], str]) -> str:
    marks = ", ".join(mark(n) for n in range(1, len(values) + 1))
    return f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})"


def old_rows(models: Any) -> list[tuple[str, dict[str, Any]]]:
    """What a version without remotes may have left; its column of models is each store's own."""
    same = {"account": "acme", "key_id": "key", "model": "m", "inputs": "ready", "created_at": 1000.0}
    same |= {"input": b'{"a":1}', "sources": b"{}"}
    rows = [("requests", {**same, "id": name, **values}) for name, values in ROWS.items()]
    return [*rows, ("workers", {**WORKER, "models": models})]


@pytest_asyncio.fixture(params=KINDS)
async def old_place(
    request: pytest.FixtureRequest, tmp_path: Path, postgres: PostgresServer
) -> AsyncIterator[Place]:
    """A database as the version before left it."""
    made: Place
    if request.param == "sqlite":
        made = SqlitePlace(tmp_path)
        connection = database.connect(made.path)
        steps = sorted((Path(database.__file__).parent / "sql" / "migrations").glob("*.sql"))
        for step in steps[: BEFORE["sqlite"]]:
            connection.executescript(step.read_text("utf-8"))
        connection.execute(f"PRAGMA user_version = {BEFORE['sqlite']}")
        for table, values in old_rows('["m"]'):
            connection.execute(insert(table, values, lambda _: "?"), tuple(values.values()))
        connection.close()
    else:
        made = PostgresPlace(postgres.create_database())
        client = await asyncpg.connect(made.url)
        await pg_connection.migrate(client, queries.migrations()[: BEFORE["postgres"]])
        for table, values in old_rows(["m"]):
            await client.execute(insert(table, values, lambda n: f"${n}"), *values.values())
        await client.close()
    yield made
    await made.close()


async def test_a_database_of_the_version_before_goes_on_as_it_was(old_place: Place) -> None:
    stores = await asyncio.gather(*(old_place.open() for _ in range(3)))
    store = stores[1]
    requests = {r.id: r for r in await store.list_requests()}
    states = {name: values.get("state", "queued") for name, values in ROWS.items()}
    assert states == {id_: r.state for id_, r in requests.items()}
    assert {None} == {r.remote_task for r in requests.values()}
    assert (b'{"a":1}', 1, 0.5, "wan", 1010.0) == (
        (r := requests["succeeded"]).input, r.attempt, r.cost_usd, r.engine, r.finished_at,
    )  # fmt: skip
    counted = {state: sum(state == s for s in states.values()) for state in STATES}
    assert counted == await store.counts()
    waits = requests["waits"]
    view = StatusView(waits.seq, waits.model, waits.state, waits.priority, None)
    assert 2 == await store.position(view)
    (worker,) = await store.workers()
    assert WorkerRecord(WorkerId("w9"), "h", 7, 2, ("m",), "wan", "o", 0, 3, 1000.0) == worker
    assert {"m": 9.0} == await store.pace(("m",))

    assert ["high", "waits"] == [r.id for r in await store.waiting(("m",), 9)]
    taken = await store.take(Take(requests["high"].id, W, "fal", 0.5, 0.5))
    assert isinstance(taken, Lease)
    assert 0.5 == await store.spent(None)
    claimed = await store.claim(Claim(W, ("m",), account_limit=9))
    assert claimed is not None
    assert "waits" == claimed.request.id
    assert 2 == await store.bury(WorkerId("w9"), WHY, 1)
    lost, again = await store.get(requests["runs"].id), await store.get(requests["fetching"].id)
    assert lost is not None
    assert again is not None
    assert ("failed", "pending") == (lost.state, again.inputs)


@pytest.mark.parametrize(
    "change",
    [
        "remote_task = JSON",
        "remote = 'fal'",
        "remote = 'fal', remote_task = JSON, inputs = 'pending'",
        "remote = 'fal', remote_task = JSON, state = 'cancelled', finished_at = 1",
    ],
)
async def test_a_task_that_cannot_be_cannot_be_stored(place: Place, store: Store, change: str) -> None:
    await submitted(store)
    if isinstance(place, PostgresPlace):
        with pytest.raises(asyncpg.CheckViolationError):
            await place.execute("UPDATE requests SET " + change.replace("JSON", "'x'"))
        return
    assert isinstance(place, SqlitePlace)
    with contextlib.closing(sqlite3.connect(place.path)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute("UPDATE requests SET " + change.replace("JSON", "x'78'"))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("claim_head", "q USING INDEX requests_ready "),
        ("claim_head_limited", "q USING INDEX requests_ready_by_account "),
        ("waiting", "q USING INDEX requests_ready_by_key "),
        ("resume_head", "requests USING INDEX requests_resumable"),
        ("running", "requests USING INDEX requests_leased"),
        ("spent", "spending USING COVERING INDEX spending_of_day"),
        ("spent_by_key", "spending USING COVERING INDEX spending_of_day"),
    ],
)
def test_sqlite_reads_what_waits_through_the_index_made_for_it(tmp_path: Path, name: str, index: str) -> None:
    path = tmp_path / "rushes.db"
    with contextlib.closing(database.connect(path)) as connection:
        database.migrate(connection, path)
        values = {
            **dict.fromkeys(("models", "warm", "remotes", "workers"), '["m"]'),
            **dict.fromkeys(("old", "account_limit", "limit", "day", "key_id"), 1),
        }
        found = connection.execute("EXPLAIN QUERY PLAN " + database.sql(name), values).fetchall()
    plan = [row[3] for row in found]
    assert any(index in step for step in plan), plan
    assert not any(
        step.startswith(("SCAN q", "SCAN r", "SCAN spending")) for step in plan if index not in step
    ), plan


async def test_postgres_reads_what_waits_through_the_index_made_for_it(suite_url: str) -> None:
    """With sessions as the store's own, after a queue was filled, and with statistics as old as they are then."""
    place = PostgresPlace(suite_url)
    await place.clear()
    await (await place.open()).close()
    client = await asyncpg.connect(place.url)
    await pg_connection._prepare(client)
    await client.execute(
        "INSERT INTO requests (id, account, key_id, model, inputs, input, sources) "
        "SELECT i::text, 'a', 'k', 'm', 'ready', '', '{}' FROM generate_series(1, 3000) AS i"
    )
    for name, types, values, index in (
        ("waiting", "text[], integer", "'{m}', 9", "using requests_ready_by_key"),
        ("running", "text[]", "'{w}'", "on requests_leased|using requests_leased"),
        (
            "resume",
            "text, text[], text[]",
            "'w', '{fal}', '{m}'",
            "on requests_resumable|using requests_resumable",
        ),
        ("pace", "text[]", "'{m}'", "using requests_paced"),
        ("spent", "text", "NULL", "on spending_of_day|using spending_of_day"),
    ):
        await client.execute(f"PREPARE p_{name} ({types}) AS {queries.sql(name)}")
        plan = "\n".join(row[0] for row in await client.fetch(f"EXPLAIN EXECUTE p_{name} ({values})"))
        assert any(part in plan for part in index.split("|")), plan
    await client.close()
    await place.close()


async def test_a_note_and_a_settlement_wake_nobody(place: Place, store: Store) -> None:
    """Counted between two calls that do wake, in the order in which the calls come."""
    lease = await store.take(Take((await submitted(store)).id, W, "fal", 0.5))
    assert isinstance(lease, Lease)
    heard = await (_heard_of_postgres if isinstance(place, PostgresPlace) else _heard_of_sqlite)(
        place, store, lease
    )
    assert ["the release", "the end"] == heard


async def _noted_settled_released(store: Store, lease: Lease) -> None:
    assert await store.note(lease, TASK)
    await store.settle(lease, "fal", 0.25)
    assert await store.note(lease, None)
    assert await store.release(lease)


async def _heard_of_postgres(place: Place, store: Store, lease: Lease) -> list[str]:
    assert isinstance(place, PostgresPlace)
    listener = await asyncpg.connect(place.url)
    heard: list[str] = []
    ended = asyncio.Event()

    def hear(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        heard.append(str(payload) or "the release")
        if payload == "the end":
            ended.set()

    await listener.add_listener("rushes", hear)
    await _noted_settled_released(store, lease)
    await place.execute("SELECT pg_notify('rushes', 'the end')")
    await asyncio.wait_for(ended.wait(), 30)
    await listener.close()
    return heard


async def _heard_of_sqlite(place: Place, store: Store, lease: Lease) -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.bind(("127.0.0.1", 0))
        ear.settimeout(30)
        port = ear.getsockname()[1]
        await store.join(WorkerRecord(WorkerId("ear"), "h", 1, 1, ("m",), "wan", "", port))
        await _noted_settled_released(store, lease)
        # The writer rings before it hands a result out, so this comes last.
        ear.sendto(b"the end", ear.getsockname())
        heard: list[str] = []
        while "the end" not in heard:
            heard.append(ear.recv(16).decode().replace("!", "the release"))
    return heard


async def test_pace_is_of_the_latest_twenty_among_the_latest_thousand(place: Place, store: Store) -> None:
    """``old`` ends before the latest thousand; of ``m`` the latest twenty took 2 s each, those before 50 s."""
    runs = [("old", 1.0, 9.0)]
    runs += [("busy", 100.0 + n, 3.0) for n in range(940)]
    runs += [("m", 5000.0 + 100 * n, 50.0 if n < 40 else 2.0) for n in range(60)]
    statement = (
        "INSERT INTO requests (id, account, key_id, model, state, inputs, engine, created_at, started_at, "
        "finished_at, input, sources, outputs) VALUES (?, 'a', 'k', ?, 'succeeded', 'ready', 'wan', 1, ?, ?, ?, ?, ?)"
    )
    values = [
        (f"{model}-{at}", model, at, at + seconds, b"{}", b"{}", b"[]")
        for model, at, seconds in runs[::2] + runs[1::2]
    ]
    if isinstance(place, PostgresPlace):
        for number in range(1, 8):
            statement = statement.replace("?", f"${number}", 1)
        client = await asyncpg.connect(place.url)
        await client.executemany(statement, values)
        await client.close()
    else:
        assert isinstance(place, SqlitePlace)
        with contextlib.closing(sqlite3.connect(place.path)) as connection:
            connection.executemany(statement, values)
            connection.commit()
    assert {"busy": 3.0, "m": 2.0} == await store.pace(("m", "old", "busy"))
