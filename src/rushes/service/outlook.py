"""How things stand for one model: which slots and remotes there are, and how long the line is.

What :mod:`rushes.catalog.routing` decides by; read from the store, by workers with remotes and by
`rushes models route`.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.remotes import RemoteTable, estimate_usd, remote_table
from rushes.catalog.roles import roles_of
from rushes.catalog.routes import DRAFT, RemoteView
from rushes.catalog.routing import Outlook
from rushes.errors import ManifestError
from rushes.queue.base import Store
from rushes.requests.ids import KeyId, WorkerId
from rushes.requests.record import RemoteState, Request, Running, StatusView, WorkerRecord

_LAST_SEQ: Final = 2**62
_PACE_SECONDS: Final = 5.0
"""How long what was measured of a model's pace is taken as true."""
_RANK: Final = {"ready": 0, "held": 1, "open": 2}


def lane_of(model: str, workers: Iterable[WorkerRecord], everything: Collection[str]) -> list[str] | None:
    """The models that compete with this one for slots: those of every worker that serves it. None: all of
    ``everything``.
    """
    together = {m for worker in workers if model in worker.models for m in worker.models}
    return None if not together or together >= set(everything) else sorted(together)


def settled(remote: RemoteState, now: float) -> RemoteState:
    """As a remote is once the pause that was told of it is over; ``now`` in seconds since the epoch."""
    if remote.until is None or remote.until > now:
        return remote
    return msgspec.structs.replace(remote, state="ready", until=None, why="")


def merged(workers: Iterable[WorkerRecord], model: str = "", *, now: float = 0.0) -> tuple[RemoteState, ...]:
    """The remotes of all workers, by name, as they are once pauses that end by ``now`` are over. Of one that several
    workers have, those count that can do most with it: have the ``model``, and find it ready. Their places add up.
    """

    def rank(state: RemoteState) -> tuple[bool, int]:
        return bool(model) and model not in state.models, _RANK[state.state]

    found: dict[str, RemoteState] = {}
    for state in (settled(state, now) for worker in workers for state in worker.remotes):
        known = found.get(state.name)
        if known is None or rank(state) < rank(known):
            found[state.name] = state
        elif rank(state) == rank(known):
            found[state.name] = _together(known, state)
    return tuple(found.values())


def _together(one: RemoteState, other: RemoteState) -> RemoteState:
    unknown = {
        id_: why
        for first, second in ((one, other), (other, one))
        for id_, why in first.unknown.items()
        if id_ in second.unknown or id_ not in second.models
    }
    models = tuple(sorted({*one.models, *other.models}))
    capacity = one.capacity + other.capacity
    return msgspec.structs.replace(one, models=models, capacity=capacity, unknown=unknown)


def with_room(remotes: Iterable[RemoteState], running: Iterable[Request]) -> tuple[RemoteState, ...]:
    """``remotes`` with the places that are free: those that requests of ``running`` have are taken off."""
    taken = Counter(one.engine for one in running)
    return tuple(
        msgspec.structs.replace(one, capacity=max(0, one.capacity - taken[one.name])) for one in remotes
    )


TableOf = Callable[[Model, str], RemoteTable | None]


def costs_of(
    model: Model, values: dict[str, Any], remotes: Iterable[RemoteView], table_of: TableOf = remote_table
) -> dict[str, float | None]:
    """What a request with this input, complete with defaults, will cost at each remote, in USD; None where its
    manifest names no price. Raises ValueError where the input does not fit the model, as one may that was submitted
    before the model changed.
    """
    roles = {role: value for role, value in roles_of(model, values).items() if role not in FILE_ROLES}
    costs: dict[str, float | None] = {}
    for one in remotes:
        try:
            table = table_of(model, one.kind)
        except ManifestError:
            table = None
        costs[one.name] = None if table is None else estimate_usd(table, model, roles)
    return costs


async def budget_left(store: Store, budget: float, key_id: KeyId | None) -> float | None:
    """USD that are left today (UTC) of a budget of this key, or of all; None for a budget of 0, which is none."""
    return budget - await store.spent(key_id) if budget else None


def minute_of_day() -> int:
    """Of this machine's local time."""
    now = datetime.now().astimezone()
    return now.hour * 60 + now.minute


class Lane(msgspec.Struct, frozen=True):
    """The slots that may take a model, at one moment, and the line for them."""

    models: tuple[str, ...] | None
    """Those that compete for the slots; None for all."""
    engines: tuple[str, ...] = ()
    slots: int = 0
    free: int = 0
    busy: float = 0.0
    """Seconds of work that is left in the slots, all together."""
    waiting: int = 0
    """Queued requests of ``models``."""


class Outlooks:
    """Reads outlooks. ``clock`` gives seconds since the epoch, ``monotonic`` ages what is remembered of paces."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.clock = clock
        self._monotonic = monotonic
        self._paces: dict[str, tuple[float, float | None]] = {}

    def look(self, workers: Sequence[WorkerRecord], everything: Collection[str] | None = None) -> "Look":
        """At this moment. ``everything`` are the ids of all models that there are, where they are known."""
        return Look(self, workers, everything)

    async def of(
        self, model: str, workers: Sequence[WorkerRecord], remotes: tuple[RemoteState, ...]
    ) -> Outlook:
        """For this model alone. Raises StoreUnavailable."""
        return await self.look(workers).of(model, remotes)

    async def paces(self, models: Collection[str]) -> dict[str, float | None]:
        """Mean seconds of one request of each model on a local engine; None where none has run yet."""
        now = self._monotonic()
        old = [id_ for id_ in models if now - self._paces.get(id_, (float("-inf"), None))[0] > _PACE_SECONDS]
        if old:
            measured = await self.store.pace(old)
            self._paces |= {id_: (now, measured.get(id_)) for id_ in old}
        return {id_: self._paces[id_][1] for id_ in models}


class Look:
    """How things stand at one moment. What several models share is read once."""

    def __init__(
        self, outlooks: Outlooks, workers: Sequence[WorkerRecord], everything: Collection[str] | None
    ) -> None:
        self._outlooks = outlooks
        self._store = outlooks.store
        self._workers = workers
        self._everything = everything
        self._lanes: dict[tuple[WorkerId, ...], Lane] = {}

    async def of(self, model: str, remotes: tuple[RemoteState, ...]) -> Outlook:
        """Raises StoreUnavailable."""
        lane = await self.lane(model)
        drafting = [one for one in self._workers if one.engine == DRAFT and model in one.models]
        paces = await self._outlooks.paces([model]) if lane.slots else {}
        return Outlook(
            engines=lane.engines,
            slots=lane.slots,
            draft_slots=sum(worker.slots for worker in drafting),
            waiting=lane.waiting,
            seconds=paces.get(model),
            busy=lane.busy,
            remotes=remotes,
            model=model,
            free=lane.free,
        )

    async def lane(self, model: str) -> Lane:
        """Of the slots that may take it, drafts aside. The same object for models of the same slots."""
        real = [one for one in self._workers if one.slots and one.engine != DRAFT and model in one.models]
        ids = tuple(worker.id for worker in real)
        if ids not in self._lanes:
            self._lanes[ids] = await self._read(model, real)
        return self._lanes[ids]

    async def _read(self, model: str, workers: Sequence[WorkerRecord]) -> Lane:
        if not workers:
            return Lane(())
        models = {m for worker in workers for m in worker.models}
        whole = self._everything is not None and lane_of(model, workers, self._everything) is None
        lane = None if whole else sorted(models)
        running = await self._store.running([worker.id for worker in workers])
        paces = await self._outlooks.paces({model, *(one.model for one in running)})
        now = self._outlooks.clock()
        slots = sum(worker.slots for worker in workers)
        place = await self._store.position(StatusView(_LAST_SEQ, model, "queued", 0, None), lane)
        return Lane(
            models=None if lane is None else tuple(lane),
            engines=tuple(sorted({worker.engine for worker in workers})),
            slots=slots,
            free=max(0, slots - len(running)),
            busy=sum(_left(one, paces[one.model], now) for one in running),
            waiting=place - 1,
        )


def _left(one: Running, seconds: float | None, now: float) -> float:
    """Seconds that a running request takes yet, for all that is known."""
    progress = one.progress
    if progress is not None and progress.eta is not None:
        return progress.eta
    ran = max(0.0, now - one.started_at)
    if seconds is not None:
        return max(0.0, seconds - ran)
    if progress is not None and progress.fraction > 0:
        return ran / progress.fraction - ran
    return 0.0
