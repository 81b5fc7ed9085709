"""Both stores behind one face, for the behavioural suite. The fixtures are in ``support.store_fixtures``."""

import asyncio
import contextlib
import hashlib
import sqlite3
import time
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import pytest

from rushes.queue.base import Store, Take
from rushes.queue.postgres.store import PostgresStore
from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import AccountId, KeyId, RequestId, WorkerId, new_request_id
from rushes.requests.record import Key, Lease, NewRequest, RemoteTask, Request, Source

KINDS = ("sqlite", "postgres")


class Place(Protocol):
    """One database. Every handle that it opens stands for another process; all are closed at the end."""

    kind: str

    async def open(self) -> Store: ...

    async def age(self, seconds: float) -> None:
        """Make every request that is there older. By whole days: what was spent, too."""

    async def clear(self) -> None:
        """Empty the database, under the handles that are open."""

    async def reserved(self) -> list[tuple[str, str]]:
        """Request and remote of everything that is reserved and not settled."""

    async def close(self) -> None: ...


class SqlitePlace:
    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rushes.db"
        self._stores: list[Store] = []
        self._ahead = 0.0

    def _clock(self) -> float:
        return time.time() + self._ahead

    async def open(self) -> Store:
        store = SqliteStore(self.path, clock=self._clock)
        await store.open()
        self._stores.append(store)
        return store

    async def age(self, seconds: float) -> None:
        self._ahead += seconds

    async def clear(self) -> None:
        connection = sqlite3.connect(self.path)
        for table in ("requests", "queue_depth", "workers", "keys", "files", "secrets", "spending"):
            connection.execute(f"DELETE FROM {table}")
        connection.commit()
        connection.close()

    async def reserved(self) -> list[tuple[str, str]]:
        return await self.execute("SELECT request, remote FROM spending WHERE settled = 0")

    async def execute(self, statement: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            return connection.execute(statement).fetchall()

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        self._stores.clear()


class PostgresPlace:
    kind = "postgres"

    def __init__(self, url: str) -> None:
        self.url = url
        self._stores: list[Store] = []

    async def open(self, **options: Any) -> Store:
        store = PostgresStore(self.url, **options)
        await store.open()
        self._stores.append(store)
        return store

    async def age(self, seconds: float) -> None:
        await self.execute("UPDATE requests SET created_at = created_at - $1", seconds)
        await self.execute("UPDATE spending SET day = day - $1", int(seconds // 86400))

    async def clear(self) -> None:
        tables = await self.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname <> 'migrations' "
            "AND relnamespace = 'public'::regnamespace"
        )
        if tables:
            names = ", ".join(row["relname"] for row in tables)
            await self.execute(f"TRUNCATE {names} RESTART IDENTITY")

    async def reserved(self) -> list[tuple[str, str]]:
        return [
            tuple(row) for row in await self.execute("SELECT request, remote FROM spending WHERE NOT settled")
        ]

    async def execute(self, statement: str, *values: Any) -> list[Any]:
        connection = await asyncpg.connect(self.url)
        try:
            return await connection.fetch(statement, *values)
        finally:
            await connection.close()

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        self._stores.clear()


def make_place(kind: str, folder: Path, request: pytest.FixtureRequest) -> SqlitePlace | PostgresPlace:
    return SqlitePlace(folder) if kind == "sqlite" else PostgresPlace(request.getfixturevalue("suite_url"))


def new_request(
    *,
    account: str = "acme",
    key: str = "key",
    model: str = "m",
    priority: int = 0,
    input: bytes = b"{}",  # noqa: A002 - the field's name
    sources: dict[str, Source] | None = None,
) -> NewRequest:
    return NewRequest(new_request_id(), AccountId(account), KeyId(key), model, input, sources or {}, priority)


def api_key(id_: str, name: str = "ci") -> Key:
    digest = hashlib.sha256(id_.encode()).digest()
    return Key(KeyId(id_), AccountId("acme"), name, digest, "abcd", 1000.0)


async def submitted(store: Store, **values: Any) -> NewRequest:
    new = new_request(**values)
    await store.submit(new)
    return new


async def record(store: Store, id_: RequestId) -> Request:
    got = await store.get(id_)
    assert got is not None
    return got


async def taken(store: Store, id_: RequestId, remote: str = "fal", **values: object) -> Lease:
    """By the worker w1."""
    lease = await store.take(Take(id_, WorkerId("w1"), remote, **values))  # type: ignore[arg-type]
    assert isinstance(lease, Lease), lease
    return lease


async def at_remote(store: Store, task: RemoteTask, **values: object) -> Lease:
    """A new request, taken for the task's remote, that has the task."""
    lease = await taken(store, (await submitted(store, **values)).id, task.remote)
    assert await store.note(lease, task)
    return lease


async def until(event: asyncio.Event, seconds: float = 20.0) -> None:
    await asyncio.wait_for(event.wait(), seconds)
