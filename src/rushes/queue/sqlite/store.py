"""The SQLite store: the default. One file in the data directory, shared by every process on the machine.

Reads run on the event loop, on a connection of their own: in WAL mode they wait for nobody and take
microseconds. Writes go through the group-commit writer.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from rushes.errors import QueueFull, RushesError, StoreUnavailable
from rushes.queue.base import Beat, Claim, Take
from rushes.queue.matching import address_of, addresses
from rushes.queue.retention import gone, stored_values
from rushes.queue.spending import check_take, check_usd, utc_day
from rushes.queue.sqlite import database, leases, rows, spending, sweep
from rushes.queue.sqlite.database import sql
from rushes.queue.sqlite.leases import Loss
from rushes.queue.sqlite.wake import Doorbell
from rushes.queue.sqlite.writer import Writer
from rushes.requests.ids import AccountId, FileId, KeyId, RequestId, WorkerId
from rushes.requests.record import (
    Failure,
    File,
    Key,
    Lease,
    LeaseMark,
    NewRequest,
    Output,
    RemoteTask,
    Request,
    Running,
    Source,
    StatusView,
    WorkerRecord,
)
from rushes.requests.states import STATES, State

T = TypeVar("T")


class SqliteStore:
    """See :class:`rushes.queue.base.Store` for what each method promises.

    ``clock`` gives the time since the epoch in seconds; it dates records and decides nothing but the age
    bound of a claim.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._writer_or_none: Writer | None = None
        self._reader_or_none: sqlite3.Connection | None = None
        self._doorbell_or_none: Doorbell | None = None
        self._found = False
        """Whether the last claim took something."""

    async def open(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # It holds the hashes of keys and the secret of links: nobody else's to read.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreUnavailable(f"{self._path.parent} cannot be used: {error.strerror}") from error
        try:
            self._reader_or_none = database.connect(self._path)
            self._doorbell_or_none = Doorbell(self._reader)
            self._writer_or_none = Writer(self._path, self._doorbell.ring)
        except (sqlite3.Error, RushesError) as error:
            await self.close()
            if isinstance(error, RushesError):
                raise
            raise StoreUnavailable(f"{self._path} cannot be used: {error}") from error

    async def close(self) -> None:
        if self._writer_or_none is not None:
            self._writer_or_none.close()
            self._writer_or_none = None
        if self._doorbell_or_none is not None:
            self._doorbell_or_none.close()
            self._doorbell_or_none = None
        if self._reader_or_none is not None:
            self._reader_or_none.close()
            self._reader_or_none = None

    async def ping(self) -> None:
        self._one("secret", ("",))
        await self._writer.run(lambda connection: connection.execute(sql("worker_beat"), ("",)).rowcount)

    # -- the request's way ------------------------------------------------------------------------------
    async def submit(self, new: NewRequest, *, queue_limit: int = 0) -> None:
        fetch = any(source.kind != "sample" and not source.key for source in new.sources.values())
        values = {
            "id": new.id,
            "account": new.account,
            "key_id": new.key_id,
            "model": new.model,
            "priority": new.priority,
            "inputs": "pending" if fetch else "ready",
            "now": self._clock(),
            "input": new.input,
            "sources": rows.encode(new.sources),
            "hops": new.hops,
        }
        statement = sql("submit")

        stored = stored_values(new.sources)

        def insert(connection: sqlite3.Connection) -> RushesError | None:
            # A refusal is a value, not an error: an error would undo the whole group.
            if stored and (swept := sweep.were_swept(connection, stored)):
                return gone(new.sources, swept)
            if queue_limit:
                (queued,) = connection.execute(
                    sql("queued_of_key"), {"key_id": new.key_id, "limit": queue_limit}
                ).fetchone()
                if queued >= queue_limit:
                    return QueueFull(retry_after=1.0)
            connection.execute(statement, values)
            return None

        refused = await self._writer.run(insert, wakes=True)
        if refused is not None:
            raise refused

    async def status(self, id_: RequestId, account: AccountId | None) -> StatusView | None:
        row = self._one("status", (id_,))
        if row is None or (account is not None and row[0] != account):
            return None
        return StatusView(row[1], row[2], row[3], row[4], rows.progress_of(row[5]) if row[5] else None)

    async def get(self, id_: RequestId, account: AccountId | None = None) -> Request | None:
        row = self._one("get", (id_,))
        if row is None:
            return None
        found = rows.request(row)
        return found if account is None or found.account == account else None

    async def position(self, view: StatusView, models: Sequence[str] | None = None) -> int:
        values: dict[str, Any] = {"seq": view.seq, "priority": view.priority}
        if models is None:
            row = self._one("position", values)
        else:
            row = self._one("position_among", values | {"models": _json(models)})
        assert row is not None
        return int(row[0])

    async def cancel(
        self, id_: RequestId, account: AccountId | None
    ) -> Literal["cancelled", "not_cancellable"] | None:
        view = await self.status(id_, account)
        if view is None:
            return None
        if view.state == "queued" and await self._change("cancel", {"id": id_, "now": self._clock()}):
            return "cancelled"
        view = await self.status(id_, account)
        return "cancelled" if view is not None and view.state == "cancelled" else "not_cancellable"

    async def list_requests(
        self,
        *,
        account: AccountId | None = None,
        state: State | None = None,
        model: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[Request]:
        values = {"account": account, "state": state, "model": model, "before": before, "limit": limit}
        return [rows.request(row) for row in self._all("list", values)]

    async def counts(self) -> dict[State, int]:
        return dict.fromkeys(STATES, 0) | dict(self._all("counts"))

    # -- leases -----------------------------------------------------------------------------------------
    async def claim(self, claim: Claim) -> Lease | None:
        now = self._clock()
        name = "claim_head_limited" if claim.account_limit else "claim_head"
        head: dict[str, Any] = {
            "models": _json(claim.models),
            "warm": _json(claim.warm),
            # Without anything warm there is no preference to bound: plain priority and arrival.
            "old": now - claim.warm_age_bound if claim.warm else -1.0,
        }
        if claim.account_limit:
            head["account_limit"] = claim.account_limit
        # An idle slot looks without taking the write lock; after a find there probably is one more.
        if not self._found and self._one(name, head) is None:
            return None

        def take(connection: sqlite3.Connection) -> tuple[Any, ...] | None:
            found = connection.execute(sql(name), head).fetchone()
            if found is None:
                return None
            values = {"worker": claim.worker, "engine": claim.engine, "now": now, "seq": found[0]}
            row: tuple[Any, ...] = connection.execute(sql("claim"), values).fetchone()
            return row

        row = await self._writer.run(take)
        self._found = row is not None
        return None if row is None else _lease(row, claim.worker, "run")

    async def claim_inputs(self, worker: WorkerId, models: Sequence[str], limit: int) -> list[Lease]:
        wanted = {"models": _json(models)}
        if limit < 1 or self._one("has_pending", wanted) is None:
            return []
        values = wanted | {"worker": worker, "limit": limit}
        taken = await self._writer.run(lambda c: c.execute(sql("claim_inputs"), values).fetchall())
        found = [_lease(row, worker, "inputs") for row in taken]
        return sorted(found, key=lambda lease: lease.request.seq)

    async def inputs_ready(self, lease: Lease, sources: dict[str, Source]) -> bool:
        values = {**_held(lease), "sources": rows.encode(sources)}
        return await self._change("inputs_ready", values, wakes=True)

    async def refuse(self, lease: Lease, failure: Failure) -> bool:
        return await self._change(
            "refuse", {**_held(lease), "failure": rows.encode(failure), "now": self._clock()}
        )

    async def renew(self, beats: Sequence[Beat]) -> set[RequestId]:
        if not beats:
            return set()
        values = [
            {
                "id": beat.id,
                "fence": beat.fence,
                "progress": rows.encode(beat.progress) if beat.progress is not None else None,
            }
            for beat in beats
        ]

        def move_on(connection: sqlite3.Connection) -> set[RequestId]:
            statement = sql("renew")
            return {
                beat.id
                for beat, value in zip(beats, values, strict=True)
                if connection.execute(statement, value).rowcount != 1
            }

        return await self._writer.run(move_on)

    async def succeed(self, lease: Lease, outputs: Sequence[Output], cost_usd: float | None) -> bool:
        values = {
            **_held(lease),
            "outputs": rows.encode(tuple(outputs)),
            "cost_usd": cost_usd,
            "now": self._clock(),
        }
        return await self._change("succeed", values)

    async def fail(self, lease: Lease, failure: Failure) -> bool:
        return await self._change(
            "fail", {**_held(lease), "failure": rows.encode(failure), "now": self._clock()}
        )

    async def lose(self, lease: Lease, failure: Failure, attempt_limit: int) -> State | None:
        loss = Loss(failure, attempt_limit, self._clock())
        return await self._writer.run(lambda c: loss.lose(c, lease.request.id, lease.fence), wakes=True)

    async def release(self, lease: Lease) -> bool:
        return await self._change("requeue", {**_held(lease), "uncount": 1}, wakes=True)

    async def leases(self) -> list[LeaseMark]:
        return [LeaseMark(*row) for row in self._all("leases")]

    async def expire(self, marks: Sequence[LeaseMark], failure: Failure, attempt_limit: int) -> int:
        if not marks:
            return 0
        loss = Loss(failure, attempt_limit, self._clock())
        return await self._writer.run(lambda c: loss.expire(c, marks), wakes=True)

    # -- remotes ----------------------------------------------------------------------------------------
    async def waiting(self, models: Sequence[str], limit: int) -> list[Request]:
        found = self._all("waiting", {"models": _json(models), "limit": max(0, limit)})
        return [rows.request(row) for row in found]

    async def take(self, take: Take) -> Lease | Literal["gone", "account", "budget", "key_budget"]:
        now, wanted = self._clock(), check_take(take)
        taken = await self._writer.run(lambda c: spending.take(c, wanted, now))
        return taken if isinstance(taken, str) else _lease(taken, take.worker, "run")

    async def resume(
        self, worker: WorkerId, remotes: Sequence[tuple[str, str]], models: Sequence[str]
    ) -> Lease | None:
        wanted, now = {"remotes": _json(addresses(remotes)), "models": _json(models)}, self._clock()
        if self._one("resume_head", wanted) is None:  # looked up without taking the write lock
            return None
        row = await self._writer.run(lambda c: spending.resume(c, worker, wanted, now))
        return None if row is None else _lease(row, worker, "run")

    async def note(self, lease: Lease, task: RemoteTask | None) -> bool:
        values = {
            **_held(lease),
            "task": None if task is None else rows.encode(task),
            "remote": None if task is None else address_of(task),
        }
        return await self._change("note", values)

    async def abandon(self, id_: RequestId, failure: Failure) -> bool:
        values = {"id": id_, "failure": rows.encode(failure), "now": self._clock()}
        return await self._change("abandon", values)

    async def running(self, workers: Sequence[WorkerId]) -> list[Running]:
        return [rows.running(row) for row in self._all("running", {"workers": _json(workers)})]

    async def settle(self, lease: Lease, remote: str, usd: float) -> None:
        cost, now = check_usd(usd), self._clock()
        await self._writer.run(lambda c: spending.settle(c, lease, remote, cost, now))

    async def spent(self, key_id: KeyId | None) -> float:
        name = "spent" if key_id is None else "spent_by_key"
        row = self._one(name, {"day": utc_day(self._clock()), "key_id": key_id})
        assert row is not None
        return float(row[0])

    async def pace(self, models: Sequence[str]) -> dict[str, float]:
        return dict(self._all("pace", {"models": _json(models)}))

    # -- workers ----------------------------------------------------------------------------------------
    async def join(self, worker: WorkerRecord) -> None:
        values = msgspec.structs.asdict(worker) | {
            "models": _json(worker.models),
            "remotes": rows.encode(worker.remotes),
        }
        if not values["started_at"]:
            values["started_at"] = self._clock()
        await self._writer.run(lambda c: c.execute(sql("join"), values).rowcount)

    async def leave(self, worker: WorkerId) -> int:
        return await self._writer.run(lambda c: leases.leave(c, worker), wakes=True)

    async def bury(self, worker: WorkerId, failure: Failure, attempt_limit: int) -> int:
        loss = Loss(failure, attempt_limit, self._clock())
        return await self._writer.run(lambda c: loss.bury(c, worker), wakes=True)

    async def workers(self) -> list[WorkerRecord]:
        return [rows.worker(row) for row in self._all("workers")]

    async def worker_beat(self, worker: WorkerId) -> bool:
        return await self._writer.run(lambda c: c.execute(sql("worker_beat"), (worker,)).rowcount == 1)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._doorbell.subscribe(callback)

    @property
    def wake_port(self) -> int:
        return self._doorbell.port

    # -- keys and files ---------------------------------------------------------------------------------
    async def add_key(self, key: Key) -> None:
        values = msgspec.structs.asdict(key)
        await self._writer.run(lambda c: c.execute(sql("add_key"), values).rowcount)

    async def find_key(self, hash_: bytes) -> Key | None:
        row = self._one("find_key", (hash_,))
        return rows.key(row) if row else None

    async def list_keys(self) -> list[Key]:
        return [rows.key(row) for row in self._all("list_keys")]

    async def revoke_key(self, id_or_name: str) -> Key | None:
        keys = await self.list_keys()
        fitting = [key for key in keys if key.id == id_or_name] or [
            key for key in keys if key.name == id_or_name and key.revoked_at is None
        ]
        if len(fitting) > 1:
            raise ValueError(f"{len(fitting)} keys are named {id_or_name!r}: give the id")
        if not fitting:
            return None
        found = fitting[0].id
        await self._writer.run(
            lambda c: c.execute(sql("revoke_key"), {"id": found, "now": self._clock()}).rowcount
        )
        return next(key for key in await self.list_keys() if key.id == found)

    async def add_file(self, file: File) -> None:
        values = msgspec.structs.asdict(file)
        await self._writer.run(lambda c: c.execute(sql("add_file"), values).rowcount)

    async def get_file(self, id_: FileId, account: AccountId | None) -> File | None:
        row = self._one("get_file", (id_,))
        found = rows.file(row) if row else None
        return found if found is not None and account in (None, found.account) else None

    async def secret(self, name: str, fresh: bytes | None = None) -> bytes:
        made = fresh or os.urandom(32)

        def make(connection: sqlite3.Connection) -> bytes:
            connection.execute(sql("make_secret"), (name, made))
            return bytes(connection.execute(sql("secret"), (name,)).fetchone()[0])

        row = self._one("secret", (name,))
        return bytes(row[0]) if row else await self._writer.run(make)

    # -- retention --------------------------------------------------------------------------------------
    async def sweep(self, before: float, limit: int) -> list[Request]:
        if self._one("is_due", {"before": before}) is None:  # looked up without taking the write lock
            return []
        return await self._writer.run(lambda c: sweep.sweep(c, before, limit, self._clock()))

    async def sweep_files(self, before: float, limit: int) -> list[File]:
        if self._one("is_due_file", {"before": before}) is None:
            return []
        return await self._writer.run(lambda c: sweep.sweep_files(c, before, limit))

    # -- plumbing ---------------------------------------------------------------------------------------
    @property
    def _writer(self) -> Writer:
        return _open(self._writer_or_none)

    @property
    def _reader(self) -> sqlite3.Connection:
        return _open(self._reader_or_none)

    @property
    def _doorbell(self) -> Doorbell:
        return _open(self._doorbell_or_none)

    def _snapshot(self) -> sqlite3.Connection:
        """The reader, inside a transaction that ends with this turn of the event loop.

        Taking and giving back the read lock costs as much as the look-up itself, so all reads of a turn share
        one. Nobody can see less than what was acknowledged to them: who learns of a commit learns it in a
        later turn, and the end of this transaction stands before that in the loop's queue.
        """
        reader = self._reader
        if not reader.in_transaction:
            reader.execute("BEGIN")
            asyncio.get_running_loop().call_soon(self._end_snapshot)
        return reader

    def _end_snapshot(self) -> None:
        if self._reader_or_none is not None and self._reader_or_none.in_transaction:
            self._reader_or_none.execute("COMMIT")

    def _one(self, name: str, values: Any = ()) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._snapshot().execute(sql(name), values).fetchone()
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"the database cannot be read: {error}") from error
        return row

    def _all(self, name: str, values: Any = ()) -> list[Any]:
        try:
            return self._snapshot().execute(sql(name), values).fetchall()
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"the database cannot be read: {error}") from error

    async def _change(self, name: str, values: dict[str, Any], *, wakes: bool = False) -> bool:
        """One UPDATE of one row; whether the row was there to be changed."""
        statement = sql(name)
        return await self._writer.run(lambda c: c.execute(statement, values).rowcount == 1, wakes=wakes)


def _open(part: T | None) -> T:
    if part is None:
        raise StoreUnavailable("the store is not open")
    return part


def _held(lease: Lease) -> dict[str, Any]:
    return {"id": lease.request.id, "fence": lease.fence}


def _lease(row: tuple[Any, ...], worker: WorkerId, purpose: Literal["run", "inputs"]) -> Lease:
    return Lease(rows.request(row), worker, rows.fence_of(row), purpose)


def _json(values: Sequence[str]) -> str:
    return msgspec.json.encode(values).decode()


__all__ = ["KeyId", "SqliteStore"]
