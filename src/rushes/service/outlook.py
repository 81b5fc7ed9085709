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
from rushes.catalog.remotes import estimate_usd, remote_table
from rushes.catalog.roles import roles_of
from rushes.catalog.routes import RemoteView
from rushes.catalog.routing import Outlook
from rushes.queue.base import Store
from rushes.requests.ids import KeyId
from rushes.requests.record import RemoteState, Request, StatusView, WorkerRecord

DRAFT: Final = "draft"
_LAST_SEQ: Final = 2**62
_RUNNING_LOOKED_AT: Final = 200
_PACE_SECONDS: Final = 5.0
"""How long what was measured of a lane's pace is taken as true."""
_RANK: Final = {"ready": 0, "held": 1, "open": 2}


def lane_of(model: str, workers: Iterable[WorkerRecord], everything: Collection[str]) -> list[str] | None:
    """The models that compete with this one for slots: those of every worker that serves it. None: all of
    ``everything``.
    """
    together = {m for worker in workers if model in worker.models for m in worker.models}
    return None if not together or together >= set(everything) else sorted(together)


def merged(workers: Iterable[WorkerRecord]) -> tuple[RemoteState, ...]:
    """The remotes of all workers, by name: one that is ready counts before one that is not, and places add up."""
    found: dict[str, RemoteState] = {}
    for state in (state for worker in workers for state in worker.remotes):
        known = found.get(state.name)
        if known is None:
            found[state.name] = state
            continue
        better = min(known, state, key=lambda one: _RANK[one.state])
        found[state.name] = msgspec.structs.replace(
            better,
            models=tuple(sorted({*known.models, *state.models})),
            capacity=known.capacity + state.capacity,
        )
    return tuple(found.values())


def with_room(remotes: Iterable[RemoteState], running: Iterable[Request]) -> tuple[RemoteState, ...]:
    """``remotes`` with the places that are free: those that requests of ``running`` have are taken off."""
    taken = Counter(one.engine for one in running)
    return tuple(
        msgspec.structs.replace(one, capacity=max(0, one.capacity - taken[one.name])) for one in remotes
    )


def costs_of(model: Model, values: dict[str, Any], remotes: Iterable[RemoteView]) -> dict[str, float | None]:
    """What a request with this input, complete with defaults, will cost at each remote, in USD; None where its
    manifest names no price. Raises ManifestError.
    """
    roles = {role: value for role, value in roles_of(model, values).items() if role not in FILE_ROLES}
    tables = {one.name: remote_table(model, one.kind) for one in remotes}
    return {
        name: None if table is None else estimate_usd(table, model, roles) for name, table in tables.items()
    }


async def budget_left(store: Store, budget: float, key_id: KeyId | None) -> float | None:
    """USD that are left today (UTC) of a budget of this key, or of all; None for a budget of 0, which is none."""
    return budget - await store.spent(key_id) if budget else None


def minute_of_day() -> int:
    """Of this machine's local time."""
    now = datetime.now().astimezone()
    return now.hour * 60 + now.minute


class Outlooks:
    """Reads outlooks. ``clock`` gives seconds since the epoch, ``monotonic`` ages what is remembered of paces."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock, self._monotonic = clock, monotonic
        self._paces: dict[str, tuple[float, float | None]] = {}

    async def of(
        self, model: str, workers: Sequence[WorkerRecord], remotes: tuple[RemoteState, ...] | None = None
    ) -> Outlook:
        """``remotes`` in place of those that the workers have told. Raises StoreUnavailable."""
        serving = [worker for worker in workers if model in worker.models and worker.slots]
        real = [worker for worker in serving if worker.engine != DRAFT]
        engines = tuple(sorted({worker.engine for worker in real}))
        lane = sorted({m for worker in real for m in worker.models})
        slots = sum(worker.slots for worker in real)
        seconds, busy, running_here = None, 0.0, 0
        if slots:
            seconds = await self._pace(model)
            ids = {worker.id for worker in real}
            running = await self._store.list_requests(state="running", limit=_RUNNING_LOOKED_AT)
            local = [one for one in running if one.worker in ids and one.remote_task is None]
            running_here = len(local)
            busy = sum([_left(one, await self._pace(one.model), self._clock()) for one in local])
        waiting = 0
        if lane:
            waiting = await self._store.position(StatusView(_LAST_SEQ, model, "queued", 0, None), lane) - 1
        return Outlook(
            engines=engines,
            slots=slots,
            draft_slots=sum(worker.slots for worker in serving if worker.engine == DRAFT),
            waiting=waiting,
            seconds=seconds,
            busy=busy,
            remotes=merged(workers) if remotes is None else remotes,
            model=model,
            free=max(0, slots - running_here),
        )

    async def _pace(self, model: str) -> float | None:
        """Mean seconds of one request of the model on a local engine; None where none has run yet."""
        at, seconds = self._paces.get(model, (float("-inf"), None))
        if self._monotonic() - at > _PACE_SECONDS:
            seconds = (await self._store.pace([model])).get(model)
            self._paces[model] = (self._monotonic(), seconds)
        return seconds


def _left(request: Request, seconds: float | None, now: float) -> float:
    """Seconds that a running request takes yet, for all that is known."""
    progress = request.progress
    if progress is not None and progress.eta is not None:
        return progress.eta
    ran = max(0.0, now - (request.started_at or now))
    if seconds is not None:
        return max(0.0, seconds - ran)
    if progress is not None and progress.fraction > 0:
        return ran / progress.fraction - ran
    return 0.0
