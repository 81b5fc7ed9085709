"""Which waiting requests go to the remotes of this worker, and the errands that are under way.

Slots take what comes; a remote is chosen for each request, by its model's routes (:mod:`rushes.catalog.routing`).
Requests that a remote has already are taken up first, whoever handed them over.
"""

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from rushes import log
from rushes.catalog.load import Catalog
from rushes.catalog.model import Model
from rushes.catalog.routes import effective_routes
from rushes.catalog.routing import Case, Outlook, decide
from rushes.engines.remote.base import RemoteEngine
from rushes.errors import StoreUnavailable
from rushes.queue.base import Store, Take
from rushes.requests.ids import WorkerId
from rushes.requests.record import Lease, RemoteState, Request, StatusView, WorkerRecord
from rushes.service.outlook import Outlooks, budget_left, costs_of, lane_of, merged, minute_of_day
from rushes.settings import Settings
from rushes.worker.breaker import Breaker
from rushes.worker.errand import Tools, run_errand

LOOK_SECONDS: Final = 1.0
"""How long a change can go unnoticed that nobody tells of: a pause that ends, an hour that begins, a longer line."""
_LEAST_PAUSE: Final = 0.02
"""Between two looks, however often the bell rings."""
MOST_HOPS: Final = 3
"""Servers that pass a request on, one to the next, at most: two that overflow into each other would never end."""
_PASSES_ON: Final = "runcomfy"
"""The kind of remote that may be a server such as this one."""
_WAITING: Final = 100
"""Requests of the line that are looked at."""


class _Remote:
    """One remote, and what of it is busy."""

    def __init__(self, engine: RemoteEngine, limit: int) -> None:
        self.engine = engine
        self.limit = limit
        self.breaker = Breaker()
        self.errands: set[asyncio.Task[None]] = set()

    def room(self) -> int:
        return max(0, self.limit - len(self.errands))


class Remotes:
    """``models`` are the ids that this worker serves, ``workers`` all live workers as they were last read."""

    def __init__(
        self,
        engines: Sequence[RemoteEngine],
        *,
        settings: Settings,
        worker: WorkerId,
        tools: Tools,
        models: Callable[[], Sequence[str]],
    ) -> None:
        self._remotes = {engine.name: _Remote(engine, settings.remote_limit) for engine in engines}
        self._settings = settings
        self._worker = worker
        self._tools = tools
        self._store: Store = tools.store
        self._catalog: Catalog = tools.catalog
        self._models = models
        self._outlooks = Outlooks(tools.store)
        self._bell: asyncio.Event | None = None
        self.workers: list[WorkerRecord] = []

    def __bool__(self) -> bool:
        return bool(self._remotes)

    @property
    def working(self) -> list[asyncio.Task[None]]:
        return [errand for remote in self._remotes.values() for errand in remote.errands]

    def models(self) -> tuple[str, ...]:
        """The ids of the models that some remote here can run."""
        return tuple(
            id_ for id_ in self._models() if any(self._serves(one, id_) for one in self._remotes.values())
        )

    def states(self) -> tuple[RemoteState, ...]:
        """As other workers, and people, see them."""
        return tuple(self._state(remote, remote.limit) for remote in self._remotes.values())

    async def run(self, bell: asyncio.Event) -> None:
        """Serve until the worker stops; ``bell`` is set when there may be something to do."""
        self._bell = bell
        while not self._tools.stopping.is_set():
            bell.clear()
            try:
                await self._resume()
                await self._dispatch()
            except StoreUnavailable as error:
                log.event("no remote work taken", error=error.message)
            except Exception:
                log.event("remotes failed", traceback=traceback.format_exc())
                await asyncio.sleep(LOOK_SECONDS)
            await asyncio.sleep(_LEAST_PAUSE)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await bell.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        for remote in self._remotes.values():
            await remote.engine.close()

    # -- what is there already --------------------------------------------------------------------------
    async def _resume(self) -> None:
        """Take up what a remote has. There is no limit to it: it runs there anyway."""
        while not self._tools.stopping.is_set():
            lease = await self._store.resume(self._worker, list(self._remotes))
            if lease is None:
                return
            task = lease.request.remote_task
            assert task is not None
            self._begin(self._remotes[task.remote], lease)

    def _begin(self, remote: _Remote, lease: Lease) -> None:
        errand = asyncio.create_task(run_errand(self._tools, remote.engine, remote.breaker, lease))
        remote.errands.add(errand)
        errand.add_done_callback(remote.errands.discard)
        if self._bell is not None:
            bell = self._bell
            errand.add_done_callback(lambda _: bell.set())

    # -- what waits -------------------------------------------------------------------------------------
    async def _dispatch(self) -> None:
        now = time.monotonic()
        ids = [
            id_
            for id_ in self._models()
            if any(
                one.room() and one.breaker.ready(now, id_) and self._serves(one, id_)
                for one in self._remotes.values()
            )
        ]
        if not ids:
            return
        waiting = await self._store.waiting(ids, _WAITING)
        if not waiting:
            return
        # What a remote had a fault over must not keep it from trying the others.
        waiting.sort(key=lambda request: request.id in self._tools.faults)
        self.workers = await self._store.workers()
        places: dict[str, _Line] = {}
        for request in waiting:
            if self._tools.stopping.is_set():
                return
            entry = self._catalog.get(request.model)
            if entry is None:
                continue
            line = places.get(request.model)
            if line is None:
                line = places[request.model] = await self._line(request)
            if not await self._send(request, entry.model, line):
                line.position += 1

    async def _line(self, first: Request) -> "_Line":
        outlook = await self._outlooks.of(first.model, self.workers)
        everything = {entry.model.id for entry in self._catalog.entries()}
        real = [worker for worker in self.workers if worker.slots and worker.engine != "draft"]
        lane = lane_of(first.model, real, everything)
        view = StatusView(first.seq, first.model, "queued", first.priority, None)
        position = await self._store.position(view, lane) if outlook.slots else 1
        return _Line(outlook, position)

    async def _send(self, request: Request, model: Model, line: "_Line") -> bool:
        """Whether it went to a remote of ours."""
        seen = self._seen()
        if request.hops >= MOST_HOPS:
            seen = tuple(state for state in seen if state.kind != _PASSES_ON)
        outlook = msgspec.structs.replace(line.outlook, remotes=seen)
        costs = costs_of(model, msgspec.json.decode(request.input), outlook.remotes)
        case = Case(
            account=request.account,
            position=line.position,
            waited=max(0.0, self._tools.clock() - request.created_at),
            minute=minute_of_day(),
            costs=costs,
            budget_left=await budget_left(self._store, self._settings.budget_usd_per_day, None),
            key_budget_left=await budget_left(
                self._store, self._settings.key_budget_usd_per_day, request.key_id
            ),
        )
        routes = effective_routes(model, outlook.remotes, self._settings.overflow_seconds)
        chosen = next((one.remote for one in decide(routes, outlook, case) if one.takes), None)
        remote = self._remotes.get(chosen or "")
        if remote is None or not remote.breaker.ready(time.monotonic(), model.id) or not remote.room():
            return False
        take = Take(
            id=request.id,
            worker=self._worker,
            remote=remote.engine.name,
            reserve_usd=costs[remote.engine.name] or 0.0,
            budget_usd=self._settings.budget_usd_per_day,
            key_budget_usd=self._settings.key_budget_usd_per_day,
            account_limit=self._settings.account_limit,
        )
        lease = await self._store.take(take)
        if not isinstance(lease, Lease):
            return lease == "gone"
        remote.breaker.begin()
        self._begin(remote, lease)
        return True

    def _seen(self) -> tuple[RemoteState, ...]:
        """All remotes: ours as they are at this moment, those of others as they told."""
        others = [
            state
            for state in merged(worker for worker in self.workers if worker.id != self._worker)
            if state.name not in self._remotes
        ]
        return (*(self._state(remote, remote.room()) for remote in self._remotes.values()), *others)

    def _state(self, remote: _Remote, capacity: int) -> RemoteState:
        now = time.monotonic()
        condition = remote.breaker.condition(now)
        until = None
        if condition.until is not None:
            until = round(self._tools.clock() + condition.until - now, 1)
        return RemoteState(
            name=remote.engine.name,
            kind=remote.engine.kind,
            models=tuple(id_ for id_ in self._models() if self._serves(remote, id_)),
            capacity=capacity,
            state=condition.state,
            until=until,
            why=condition.why,
            unknown=remote.breaker.unknown(now),
        )

    def _serves(self, remote: _Remote, model_id: str) -> bool:
        entry = self._catalog.get(model_id)
        return entry is not None and remote.engine.serves(entry.model)


class _Line:
    """One model's line while it is looked through."""

    def __init__(self, outlook: Outlook, position: int) -> None:
        self.outlook = outlook
        self.position = position
        """Of the next one that is looked at."""
