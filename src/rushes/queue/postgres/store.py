"""The PostgreSQL store: for many machines. SKIP LOCKED, LISTEN/NOTIFY, group commit.

Submits, outcomes and status polls that arrive together go to the server together. Nothing here decides: the
SQL files do, under the constraints of the schema.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from rushes.errors import QueueFull, StoreUnavailable
from rushes.queue.base import Beat, Claim, Take
from rushes.queue.matching import address_of, addresses
from rushes.queue.postgres import rows
from rushes.queue.postgres.batch import Batcher
from rushes.queue.postgres.connection import Database
from rushes.queue.postgres.keys import KeyCache
from rushes.queue.postgres.listen import Listener
from rushes.queue.retention import gone
from rushes.queue.spending import check_take, check_usd
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

_NEWEST = 2**63 - 1
_TRIES = 5


class _Submit(NamedTuple):
    new: NewRequest
    queue_limit: int


class _Outcome(NamedTuple):
    lease: Lease
    outputs: bytes | None
    failure: bytes | None
    cost_usd: float | None
    storage_keys: str


class PostgresStore:
    """See :class:`rushes.queue.base.Store` for what each method promises.

    Times are the database's. ``clock`` is monotonic, in seconds, and ages only the cache of keys, in which a
    key that another process revokes may go on working for ``key_cache_seconds``. ``timeout`` bounds every
    round trip, in seconds; ``connections`` is the size of the pool, beside one that listens.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        key_cache_seconds: float = 1.0,
        connections: int = 8,
        timeout: float = 10.0,
    ) -> None:
        self._database = Database(url, connections=connections, timeout=timeout)
        self._listener = Listener(self._database)
        self._keys = KeyCache(self._database, clock=clock, seconds=key_cache_seconds)
        self._secrets: dict[str, bytes] = {}
        self._submits = Batcher(
            self._submit_group, identity=lambda s: s.new.id, weight=lambda s: len(s.new.input) + 256
        )
        self._outcomes = Batcher(self._finish_group, identity=lambda o: o.lease.request.id)
        self._polls = Batcher(self._status_group, identity=lambda poll: poll)

    async def open(self) -> None:
        await self._database.open()
        try:
            await self._listener.start()
        except (OSError, TimeoutError) as error:
            await self._database.close()
            raise StoreUnavailable(f"PostgreSQL cannot be listened to: {error}") from error
        except BaseException:
            await self._database.close()
            raise

    async def close(self) -> None:
        await self._listener.stop()
        for batcher in (self._submits, self._outcomes, self._polls):
            await batcher.close()
        await self._database.close()

    async def ping(self) -> None:
        row = await self._database.row("ping", again=True)
        if row["standby"]:
            raise StoreUnavailable("PostgreSQL is a standby: it cannot be written to.")

    # -- the request's way ------------------------------------------------------------------------------
    async def submit(self, new: NewRequest, *, queue_limit: int = 0) -> None:
        await self._submits(_Submit(new, queue_limit))

    async def _submit_group(self, group: Sequence[_Submit]) -> list[Exception | None]:
        news = [submit.new for submit in group]
        answers = await self._database.rows(
            "submit",
            [n.id for n in news],
            [n.account for n in news],
            [n.key_id for n in news],
            [n.model for n in news],
            [n.priority for n in news],
            [rows.inputs_state(n.sources) for n in news],
            [n.input for n in news],
            [rows.encode(n.sources) for n in news],
            [rows.encode(rows.storage_keys(n.sources)).decode() for n in news],
            [submit.queue_limit for submit in group],
            [n.hops for n in news],
            again=True,
        )
        results: list[Exception | None] = []
        for submit, answer in zip(group, answers, strict=True):
            outcome = answer["outcome"]
            if outcome == "full":
                results.append(QueueFull(retry_after=1.0))
            elif outcome == "gone":
                results.append(gone(submit.new.sources, answer["swept"]))
            elif outcome == "known":
                results.append(await self._unless_same(submit.new))
            else:
                results.append(None)
        return results

    async def _unless_same(self, new: NewRequest) -> ValueError | None:
        """None where this id holds just this request: it was stored, and only the answer was lost."""
        row = await self._database.row(
            "submit_is_same", new.id, new.account, new.key_id, new.model, new.input, again=True
        )
        return None if row and row["same"] else ValueError(f"the id {new.id} is in use")

    async def status(self, id_: RequestId, account: AccountId | None) -> StatusView | None:
        row = await self._polls(id_)
        if row is None or (account is not None and row["account"] != account):
            return None
        return rows.status_view(row)

    async def _status_group(self, ids: Sequence[RequestId]) -> list[Any]:
        askable = [id_ for id_ in ids if _storable(id_)]
        found = {row["id"]: row for row in await self._database.rows("status", askable, again=True)}
        return [found.get(id_) for id_ in ids]

    async def get(self, id_: RequestId, account: AccountId | None = None) -> Request | None:
        if not _storable(id_):
            return None
        row = await self._database.row("get", id_, account, again=True)
        return rows.request(row) if row else None

    async def position(self, view: StatusView, models: Sequence[str] | None = None) -> int:
        wanted = None if models is None else _storables(models)
        row = await self._database.row("position", view.seq, view.priority, wanted, again=True)
        return int(row[0])

    async def cancel(
        self, id_: RequestId, account: AccountId | None
    ) -> Literal["cancelled", "not_cancellable"] | None:
        if not _storable(id_):
            return None
        for _ in range(_TRIES):
            row = await self._database.row("cancel", id_, account, again=True)
            if row is None:
                return None
            # Still "queued" means: somebody else moved it while this statement waited. Look again.
            if row["state"] != "queued" or row["at_remote"]:
                return "cancelled" if row["state"] == "cancelled" else "not_cancellable"
        raise StoreUnavailable("The request changes too fast to be cancelled.")

    async def list_requests(
        self,
        *,
        account: AccountId | None = None,
        state: State | None = None,
        model: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[Request]:
        if not _storable(account, state, model):
            return []
        values = (state, model, _NEWEST if before is None else before, limit)
        if account is None:
            found = await self._database.rows("list", *values, again=True)
        else:
            found = await self._database.rows("list_of_account", *values, account, again=True)
        return [rows.request(row) for row in found]

    async def counts(self) -> dict[State, int]:
        found = await self._database.rows("counts", again=True)
        return dict.fromkeys(STATES, 0) | {row["state"]: row["n"] for row in found}

    # -- leases -----------------------------------------------------------------------------------------
    async def claim(self, claim: Claim) -> Lease | None:
        row = await self._database.row(
            "claim",
            claim.worker,
            claim.engine,
            claim.models,
            claim.warm,
            claim.warm_age_bound,
            claim.account_limit,
        )
        return None if row is None else _lease(row, claim.worker, "run")

    async def claim_inputs(self, worker: WorkerId, models: Sequence[str], limit: int) -> list[Lease]:
        if limit < 1:
            return []
        taken = await self._database.rows("claim_inputs", worker, models, limit)
        leases = [_lease(row, worker, "inputs") for row in taken]
        return sorted(leases, key=lambda lease: lease.request.seq)

    async def inputs_ready(self, lease: Lease, sources: dict[str, Source]) -> bool:
        id_, fence, encoded = lease.request.id, lease.fence, rows.encode(sources)
        keys = rows.storage_keys(sources)
        return await self._once("inputs_ready", (id_, fence, encoded, keys), (id_, fence, encoded))

    async def refuse(self, lease: Lease, failure: Failure) -> bool:
        id_, fence, why = lease.request.id, lease.fence, rows.encode(failure)
        return await self._once("refuse", (id_, fence, why), (id_, fence, None, why), check="was_finished")

    async def renew(self, beats: Sequence[Beat]) -> set[RequestId]:
        latest = {(beat.id, beat.fence): beat for beat in beats}
        if not latest:
            return set()
        held = await self._database.rows(
            "renew",
            [id_ for id_, _ in latest],
            [fence for _, fence in latest],
            [rows.encode_progress(beat.progress) for beat in latest.values()],
            again=True,
        )
        return {beat.id for beat in beats} - {row["id"] for row in held}

    async def succeed(self, lease: Lease, outputs: Sequence[Output], cost_usd: float | None) -> bool:
        keys = rows.storage_keys(lease.request.sources, outputs)
        encoded = rows.encode(tuple(outputs))
        return await self._outcomes(_Outcome(lease, encoded, None, cost_usd, rows.encode(keys).decode()))

    async def fail(self, lease: Lease, failure: Failure) -> bool:
        keys = rows.storage_keys(lease.request.sources)
        return await self._outcomes(
            _Outcome(lease, None, rows.encode(failure), None, rows.encode(keys).decode())
        )

    async def _finish_group(self, group: Sequence[_Outcome]) -> list[bool | Exception]:
        values = (
            [o.lease.request.id for o in group],
            [o.lease.fence for o in group],
            [o.outputs for o in group],
            [o.failure for o in group],
            [o.cost_usd for o in group],
            [o.storage_keys for o in group],
        )
        try:
            ended = await self._database.rows("finish", *values)
        except StoreUnavailable:
            return [await self._finish_again(outcome) for outcome in group]
        ids = {row["id"] for row in ended}
        return [o.lease.request.id in ids for o in group]

    async def _finish_again(self, outcome: _Outcome) -> bool:
        """After an answer that was lost: an outcome that stands there, under this fence, is this one."""
        id_, fence = outcome.lease.request.id, outcome.lease.fence
        values = ([id_], [fence], [outcome.outputs], [outcome.failure], [outcome.cost_usd])
        if await self._database.rows("finish", *values, [outcome.storage_keys]):
            return True
        check = (id_, fence, outcome.outputs, outcome.failure)
        return bool(await self._database.rows("was_finished", *check, again=True))

    async def lose(self, lease: Lease, failure: Failure, attempt_limit: int) -> State | None:
        return await self._end_lease(lease, rows.encode(failure), attempt_limit, counted=True)

    async def release(self, lease: Lease) -> bool:
        return await self._end_lease(lease, None, 0, counted=False) is not None

    async def _end_lease(
        self, lease: Lease, failure: bytes | None, attempt_limit: int, *, counted: bool
    ) -> State | None:
        row = await self._database.row("lose", lease.request.id, lease.fence, counted, failure, attempt_limit)
        state: State | None = row["state"] if row else None
        return state

    async def leases(self) -> list[LeaseMark]:
        """Also folds the tally: the reaper asks from time to time, also where nothing is submitted."""
        found = await self._database.rows("leases", again=True)
        await self._database.rows("fold", again=True)
        return [rows.lease_mark(row) for row in found]

    async def expire(self, marks: Sequence[LeaseMark], failure: Failure, attempt_limit: int) -> int:
        if not marks:
            return 0
        ended = await self._database.rows(
            "expire",
            [mark.id for mark in marks],
            [mark.fence for mark in marks],
            [mark.beat for mark in marks],
            rows.encode(failure),
            attempt_limit,
        )
        return len(ended)

    # -- remotes ----------------------------------------------------------------------------------------
    async def waiting(self, models: Sequence[str], limit: int) -> list[Request]:
        found = await self._database.rows("waiting", _storables(models), max(0, limit), again=True)
        return [rows.request(row) for row in found]

    async def take(self, take: Take) -> Lease | Literal["gone", "account", "budget", "key_budget"]:
        wanted = check_take(take)
        if not _storable(wanted.id):
            return "gone"
        row = await self._database.row(
            "take",
            wanted.id,
            wanted.worker,
            wanted.remote,
            wanted.reserve_usd,
            wanted.budget_usd,
            wanted.key_budget_usd,
            wanted.account_limit,
        )
        verdict: Literal["taken", "gone", "account", "budget", "key_budget"] = row["verdict"]
        return _lease(row, wanted.worker, "run") if verdict == "taken" else verdict

    async def resume(
        self, worker: WorkerId, remotes: Sequence[tuple[str, str]], models: Sequence[str]
    ) -> Lease | None:
        row = await self._database.row("resume", worker, _storables(addresses(remotes)), _storables(models))
        return None if row is None else _lease(row, worker, "run")

    async def note(self, lease: Lease, task: RemoteTask | None) -> bool:
        noted = (None, None) if task is None else (rows.encode(task), address_of(task))
        return bool(await self._database.rows("note", lease.request.id, lease.fence, *noted, again=True))

    async def abandon(self, id_: RequestId, failure: Failure) -> bool:
        return _storable(id_) and bool(await self._database.rows("abandon", id_, rows.encode(failure)))

    async def running(self, workers: Sequence[WorkerId]) -> list[Running]:
        found = await self._database.rows("running", _storables(workers), again=True)
        return [rows.running(row) for row in found]

    async def settle(self, lease: Lease, remote: str, usd: float) -> None:
        cost = check_usd(usd)
        await self._database.rows("settle", lease.request.id, lease.fence, remote, cost, again=True)

    async def spent(self, key_id: KeyId | None) -> float:
        row = await self._database.row("spent", key_id, again=True)
        return float(row["usd"])

    async def pace(self, models: Sequence[str]) -> dict[str, float]:
        found = await self._database.rows("pace", _storables(models), again=True)
        return {row["model"]: row["seconds"] for row in found}

    # -- workers ----------------------------------------------------------------------------------------
    async def join(self, worker: WorkerRecord) -> None:
        await self._database.rows(
            "join",
            worker.id,
            worker.host,
            worker.pid,
            worker.slots,
            worker.models,
            worker.engine,
            worker.owner,
            worker.wake_port,
            worker.beat,
            worker.started_at,
            rows.encode(worker.remotes),
            again=True,
        )

    async def leave(self, worker: WorkerId) -> int:
        return len(await self._database.rows("lose_all", worker, False, None, 0))

    async def bury(self, worker: WorkerId, failure: Failure, attempt_limit: int) -> int:
        return len(await self._database.rows("lose_all", worker, True, rows.encode(failure), attempt_limit))

    async def workers(self) -> list[WorkerRecord]:
        return [rows.worker(row) for row in await self._database.rows("workers", again=True)]

    async def worker_beat(self, worker: WorkerId) -> bool:
        return bool(await self._database.rows("worker_beat", worker, again=True))

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._listener.subscribe(callback)

    @property
    def wake_port(self) -> int:
        return 0

    # -- keys and files ---------------------------------------------------------------------------------
    async def add_key(self, key: Key) -> None:
        await self._keys.add(key)

    async def find_key(self, hash_: bytes) -> Key | None:
        return await self._keys.find(hash_)

    async def list_keys(self) -> list[Key]:
        return await self._keys.all()

    async def revoke_key(self, id_or_name: str) -> Key | None:
        return await self._keys.revoke(id_or_name) if _storable(id_or_name) else None

    async def add_file(self, file: File) -> None:
        await self._database.rows(
            "add_file",
            file.id,
            file.account,
            file.name.encode(),
            file.key,
            file.content_type,
            file.size,
            file.created_at,
        )

    async def get_file(self, id_: FileId, account: AccountId | None) -> File | None:
        row = await self._database.row("get_file", id_, account, again=True) if _storable(id_) else None
        return rows.file(row) if row else None

    async def secret(self, name: str, fresh: bytes | None = None) -> bytes:
        for _ in range(_TRIES):
            if name in self._secrets:
                return self._secrets[name]
            # No row: another process made it after this statement began. The next look sees it.
            row = await self._database.row("secret", name, fresh or os.urandom(32), again=True)
            if row:
                self._secrets[name] = row["value"]
        return self._secrets[name]

    # -- retention --------------------------------------------------------------------------------------
    async def sweep(self, before: float, limit: int) -> list[Request]:
        return [rows.request(row) for row in await self._database.rows("sweep", before, limit)]

    async def sweep_files(self, before: float, limit: int) -> list[File]:
        return [rows.file(row) for row in await self._database.rows("sweep_files", before, limit)]

    # -- plumbing ---------------------------------------------------------------------------------------
    async def _once(
        self, name: str, values: tuple[Any, ...], proof: tuple[Any, ...], *, check: str = "inputs_were_ready"
    ) -> bool:
        """One change of one row; where the answer was lost, again, and then see whether the first had done it."""
        try:
            return bool(await self._database.rows(name, *values))
        except StoreUnavailable:
            if await self._database.rows(name, *values):
                return True
            return bool(await self._database.rows(check, *proof))


def _lease(row: rows.Row, worker: WorkerId, purpose: Literal["run", "inputs"]) -> Lease:
    return Lease(rows.request(row), worker, row["fence"], purpose)


def _storable(*texts: str | None) -> bool:
    """PostgreSQL's text holds no NUL and no lone surrogate: nothing is stored under such a name."""
    return not any(t is not None and ("\0" in t or not _is_utf8(t)) for t in texts)


def _storables(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if _storable(text)]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
