"""The group-commit writer: what one operation or the database does to the others of its group."""

import asyncio
import sqlite3
import stat
from pathlib import Path

import pytest

from rushes.errors import QueueFull, StoreUnavailable
from rushes.queue.sqlite import database
from rushes.queue.sqlite.store import SqliteStore
from support.stores import new_request


@pytest.fixture
async def store(tmp_path: Path):
    store = SqliteStore(tmp_path / "data" / "rushes.db")
    await store.open()
    yield store
    await store.close()


async def test_a_locked_database_fails_a_group_once_not_one_by_one(store: SqliteStore, monkeypatch) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.3)
    other = sqlite3.connect(store._path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    tries = 0
    begin = database.begin

    def counted(connection: sqlite3.Connection) -> None:
        nonlocal tries
        tries += 1
        begin(connection)

    monkeypatch.setattr(database, "begin", counted)
    outcomes = await asyncio.gather(*(store.submit(new_request()) for _ in range(50)), return_exceptions=True)
    assert {StoreUnavailable} == {type(outcome) for outcome in outcomes}
    assert tries <= 3
    other.execute("ROLLBACK")
    other.close()
    await store.submit(new_request())
    assert 1 == (await store.counts())["queued"]


async def test_a_refusal_leaves_its_neighbours_in_their_group(store: SqliteStore) -> None:
    commits = 0
    connection = store._writer._connection

    def count(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    connection.set_trace_callback(count)
    first = new_request()
    await store.submit(first)
    before = commits
    outcomes = await asyncio.gather(
        *(store.submit(new_request(), queue_limit=1 if n % 10 == 0 else 0) for n in range(100)),
        return_exceptions=True,
    )
    connection.set_trace_callback(None)
    assert 10 == sum(isinstance(outcome, QueueFull) for outcome in outcomes)
    assert 91 == (await store.counts())["queued"]
    assert commits - before < 20


async def test_the_database_is_nobody_elses_to_read(store: SqliteStore) -> None:
    assert 0o600 == stat.S_IMODE(store._path.stat().st_mode)
    await store.submit(new_request())
    for path in store._path.parent.iterdir():
        assert 0 == stat.S_IMODE(path.stat().st_mode) & 0o077, path
