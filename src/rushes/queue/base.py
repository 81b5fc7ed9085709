"""The store: the requests table is the queue. One Protocol, one behavioural suite, several databases.

What every store promises:

- What ``submit`` acknowledged survives any crash of any process, the database's included.
- A request has at most one outcome. Each lease carries a ``fence`` that grows with every lease of that
  request; an outcome is written only where the fence still fits (``False`` comes back where it does not).
- No clock decides who owns a request. A lease has a ``beat`` that its holder moves on; a reaper that has seen
  the same beat for longer than the lease time, by its own monotonic clock, expires it
  (:mod:`rushes.worker.reaper`). A worker with a wrong clock can neither lose nor steal a request.
- Claims prefer warm models, then priority, then first come. Requests that have waited longer than the age bound
  come before any preference for a warm model.

A store refuses to know HTTP, engines and files. Methods raise :class:`rushes.errors.StoreUnavailable` when
the database cannot be reached or cannot write; then nothing happened.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from rushes.requests.ids import AccountId, FileId, KeyId, RequestId, WorkerId
from rushes.requests.record import (
    Failure,
    File,
    Key,
    Lease,
    LeaseMark,
    NewRequest,
    Output,
    Progress,
    RemoteTask,
    Request,
    Running,
    Source,
    StatusView,
    WorkerRecord,
)
from rushes.requests.states import State


class Claim(msgspec.Struct, frozen=True):
    """What a free slot asks for."""

    worker: WorkerId
    models: tuple[str, ...]
    warm: tuple[str, ...] = ()
    """The models that the slot needs to load nothing for."""
    warm_age_bound: float = 30.0
    """Seconds of waiting after which a request is no longer passed over for a warm model."""
    account_limit: int = 0
    """How many requests of one account may run at once, over all workers; 0 for no limit."""
    engine: str = ""


class Take(msgspec.Struct, frozen=True):
    """What a remote asks for: this one request. Budgets are in USD for each day (UTC) and count what
    :meth:`Store.take` has reserved and :meth:`Store.settle` has settled; 0 for no limit.
    """

    id: RequestId
    worker: WorkerId
    remote: str
    """The remote's name; becomes the request's engine."""
    reserve_usd: float = 0.0
    """What it will cost, for all that is known."""
    budget_usd: float = 0.0
    """Of all keys together."""
    key_budget_usd: float = 0.0
    """Of the request's key."""
    account_limit: int = 0


class Beat(msgspec.Struct, frozen=True):
    """A sign of life for one lease, with the progress to show."""

    id: RequestId
    fence: int
    progress: Progress | None = None


class Store(Protocol):
    """See the module."""

    async def open(self) -> None:
        """Connect and bring the schema up to date under a lock.

        Raises StoreUnavailable; SettingsError where the schema is a newer version's.
        """

    async def close(self) -> None: ...

    async def ping(self) -> None:
        """Return if the store can be read and written to; else raise StoreUnavailable."""

    # -- the request's way ------------------------------------------------------------------------------
    async def submit(self, new: NewRequest, *, queue_limit: int = 0) -> None:
        """Store durably, queued, then wake workers. Raises InvalidInput (``input_gone``) where a source names what
        retention has removed. With ``queue_limit`` > 0 raises QueueFull where the key
        has that many queued requests already. Inputs are "pending" where a source has no key and is no
        sample, else "ready".
        """

    async def status(self, id_: RequestId, account: AccountId | None) -> StatusView | None:
        """None where unknown, or of another account; ``account`` None sees all."""

    async def get(self, id_: RequestId, account: AccountId | None = None) -> Request | None: ...

    async def position(self, view: StatusView, models: Sequence[str] | None = None) -> int:
        """1 for the next one: 1 + the queued requests of ``models`` (None: of all) that are ahead of it by
        priority, then arrival.
        """

    async def cancel(
        self, id_: RequestId, account: AccountId | None
    ) -> Literal["cancelled", "not_cancellable"] | None:
        """Cancel if queued and without a remote task. None where unknown or another account's. Cancelling a cancelled
        request again answers "cancelled".
        """

    async def list_requests(
        self,
        *,
        account: AccountId | None = None,
        state: State | None = None,
        model: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[Request]:
        """Newest first; ``before`` is the ``seq`` to go on from."""

    async def counts(self) -> dict[State, int]:
        """How many requests are in each state (all five named)."""

    # -- leases -----------------------------------------------------------------------------------------
    async def claim(self, claim: Claim) -> Lease | None:
        """Take the next request whose inputs are ready: queued -> running, attempt + 1, fence + 1. Those with a
        remote task are :meth:`resume`'s.
        """

    async def waiting(self, models: Sequence[str], limit: int) -> list[Request]:
        """The queued requests of ``models`` that :meth:`take` can take, by priority, then arrival: the first
        ``limit`` of each key's part of each model's line, so that those who cannot go hide nobody; 2000 in all at
        most.
        """

    async def take(self, take: Take) -> Lease | Literal["gone", "account", "budget", "key_budget"]:
        """As :meth:`claim`, of one request, and reserve its cost, in one step. Else why not: it is not waiting any
        more; its account has as many running as it may; the day's budget, or its key's, has too little left. What was
        reserved for it at this remote before is replaced.
        """

    async def resume(
        self, worker: WorkerId, remotes: Sequence[tuple[str, str]], models: Sequence[str]
    ) -> Lease | None:
        """As :meth:`claim`, of the next request of ``models`` that waits with a remote task, by arrival: one of these
        remotes, each as ``(name, place)``; or one in the phase "submitting", whoever's: there is nothing to poll.
        """

    async def note(self, lease: Lease, task: RemoteTask | None) -> bool:
        """Store the remote task of a running request; None takes it off. False: lease lost."""

    async def abandon(self, id_: RequestId, failure: Failure) -> bool:
        """Fail a request that waits with a remote task: no worker has that remote any more. False: it does not."""

    async def running(self, workers: Sequence[WorkerId]) -> list[Running]:
        """What the slots of these workers have in hand: their running requests without a remote task."""

    async def settle(self, lease: Lease, remote: str, usd: float) -> None:
        """What the request's time at this remote did cost, in place of what was reserved; 0 takes it off."""

    async def spent(self, key_id: KeyId | None) -> float:
        """USD reserved and spent today (UTC), by this key, or by all."""

    async def pace(self, models: Sequence[str]) -> dict[str, float]:
        """Mean seconds from start to end of the latest (up to 20) succeeded requests of each model, among the latest
        thousand that ran on a local engine other than `draft` (no remote task); models without any are left out.
        """

    async def claim_inputs(self, worker: WorkerId, models: Sequence[str], limit: int) -> list[Lease]:
        """Take up to ``limit`` queued requests whose inputs are pending, oldest first: pending -> fetching,
        fence + 1. They stay queued and can be cancelled.
        """

    async def inputs_ready(self, lease: Lease, sources: dict[str, Source]) -> bool:
        """Fetching -> ready, store the sources with their keys, wake workers. False: lease lost."""

    async def refuse(self, lease: Lease, failure: Failure) -> bool:
        """End a queued request whose inputs are bad. False: lease lost (or cancelled)."""

    async def renew(self, beats: Sequence[Beat]) -> set[RequestId]:
        """Move the beats on, store the progress; answers those whose lease is lost."""

    async def succeed(self, lease: Lease, outputs: Sequence[Output], cost_usd: float | None) -> bool:
        """Running -> succeeded. False: lease lost, nothing written."""

    async def fail(self, lease: Lease, failure: Failure) -> bool:
        """Running -> failed. False: lease lost."""

    async def lose(self, lease: Lease, failure: Failure, attempt_limit: int) -> State | None:
        """An attempt ended without an outcome (a crash): back to the queue, or failed with ``failure`` at the
        limit. For an inputs lease: back to pending, whatever the limit. Where the request has a remote task, the
        attempt is not counted and there is no limit: it goes on elsewhere. None: lease lost.

        What :meth:`take` reserved for a request that has no remote task is taken off, here and wherever else its
        lease ends.
        """

    async def release(self, lease: Lease) -> bool:
        """Give back, not counting the attempt (a worker that drains). Also for inputs leases."""

    async def leases(self) -> list[LeaseMark]:
        """All live leases, of both purposes."""

    async def expire(self, marks: Sequence[LeaseMark], failure: Failure, attempt_limit: int) -> int:
        """As ``lose`` for each mark whose fence and beat still stand; answers how many did."""

    # -- workers ----------------------------------------------------------------------------------------
    async def join(self, worker: WorkerRecord) -> None:
        """Insert or replace the worker's record. Its beat goes on: to join again is a sign of life."""

    async def leave(self, worker: WorkerId) -> int:
        """Remove the record and release every lease it still holds, counting the attempts as lost ones are
        not (see ``release``). Answers how many were released.
        """

    async def bury(self, worker: WorkerId, failure: Failure, attempt_limit: int) -> int:
        """As ``leave`` for a worker known to be dead: its leases are lost (see ``lose``), at once."""

    async def workers(self) -> list[WorkerRecord]: ...

    async def worker_beat(self, worker: WorkerId) -> bool:
        """Move the worker's beat on; False where the record is gone (then join again)."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` called, on the event loop that opened the store, when there may be work or
        something else changed. Spurious calls are allowed; a slow poll bounds missed ones by a second.
        Answers the function that ends the subscription.
        """

    @property
    def wake_port(self) -> int:
        """The loopback port that wakes this process, for WorkerRecord; 0 where the store needs none."""

    # -- keys and files ---------------------------------------------------------------------------------
    async def add_key(self, key: Key) -> None: ...

    async def find_key(self, hash_: bytes) -> Key | None:
        """By SHA-256 of the key; also a revoked one."""

    async def list_keys(self) -> list[Key]: ...

    async def revoke_key(self, id_or_name: str) -> Key | None:
        """None where unknown. Raises ValueError where a name fits several live keys."""

    async def add_file(self, file: File) -> None: ...

    async def get_file(self, id_: FileId, account: AccountId | None) -> File | None: ...

    async def secret(self, name: str, fresh: bytes | None = None) -> bytes:
        """32 random bytes, made on first use and the same for every process since: signs output links.

        ``fresh`` is taken instead of new ones where there are none yet.
        """

    # -- retention --------------------------------------------------------------------------------------
    async def sweep(self, before: float, limit: int) -> list[Request]:
        """Mark as swept, and answer, up to ``limit`` ended requests with finished_at < ``before``, oldest first,
        whose own files (outputs, and the checked copies of their inputs) no queued or running request names.

        Choosing and marking are one step: a submit that names such an output either came before, and the
        output stays, or comes later and raises InvalidInput ("input_gone"), for ever. The caller deletes the
        files afterwards.
        """

    async def sweep_files(self, before: float, limit: int) -> list[File]:
        """Remove, and answer, up to ``limit`` records of uploads older than ``before``, oldest first, that no
        queued or running request names; as :meth:`sweep`.
        """


__all__ = ["AccountId", "Beat", "Claim", "KeyId", "Store", "Take"]
