"""Which of the waiting requests go to the remotes of this worker: one look down the line at a time.

A remote is chosen for each request, by its model's routes (:mod:`rushes.catalog.routing`). Whatever is wrong with one
request or one manifest must not keep the others waiting.
"""

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from rushes import log
from rushes.catalog.model import Model
from rushes.catalog.remotes import RemoteTable, remote_table
from rushes.catalog.routes import Route, effective_routes
from rushes.catalog.routing import Case, Outlook, decide, may_leave
from rushes.errors import ManifestError, StoreUnavailable
from rushes.queue.base import Store, Take
from rushes.requests.ids import AccountId, KeyId, RequestId, WorkerId
from rushes.requests.record import Lease, RemoteState, Request, WorkerRecord
from rushes.service.outlook import (
    Lane,
    Look,
    Outlooks,
    budget_left,
    costs_of,
    merged,
    minute_of_day,
    with_room,
)
from rushes.settings import Settings
from rushes.worker.errand import Tools
from rushes.worker.fleet import Fleet, Remote
from rushes.worker.line import Depth, Memory, Places

MOST_HOPS: Final = 3
"""Servers that pass a request on, one to the next, at most: two that overflow into each other would never end."""
LEFT_SECONDS: Final = 5.0
"""For which a request is left to a remote of another worker that comes before ours, and could have taken it."""
_PASSES_ON: Final = "runcomfy"
"""The kind of remote that may be a server such as this one."""
_RUNNING_LOOKED_AT: Final = 1000
_IN_A_ROW: Final = 32
"""Requests that are weighed until others of this process have their turn."""


class Looked(NamedTuple):
    """What came of one look."""

    weighed: int = 0
    sent: int = 0
    deeper: bool = False
    """The next one should come soon: it sees more."""


class Dispatcher:
    """``begin`` starts the errand of a request that was taken for a remote."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        settings: Settings,
        worker: WorkerId,
        tools: Tools,
        models: Callable[[], Sequence[str]],
        begin: Callable[[Remote, Lease], None],
    ) -> None:
        self.fleet = fleet
        self.settings = settings
        self.worker = worker
        self.tools = tools
        self.begin = begin
        self.memory = Memory()
        self._store: Store = tools.store
        self._catalog = tools.catalog
        self._models = models
        self._depth = Depth()
        self._outlooks = Outlooks(tools.store, clock=tools.clock)
        self._version = -1
        self._tables: dict[tuple[str, str], RemoteTable | ManifestError | None] = {}
        """By model and kind, as long as the catalog stays as it is."""
        self._everything: frozenset[str] = frozenset()

    async def look(self) -> Looked:
        """Weigh those who wait, and send those who should go. Raises StoreUnavailable."""
        now = time.monotonic()
        ids = [id_ for id_ in self._models() if self.fleet.takes(id_, now)]
        if not ids:
            return Looked()
        budget = await budget_left(self._store, self.settings.budget_usd_per_day, None)
        if budget is not None and budget <= 0:
            return Looked()
        self._renew()
        workers = await self._store.workers()
        others = await self._others(workers, set(ids))
        weighing = _Weighing(self, self._outlooks.look(workers, self._everything), others, now)
        ids = [id_ for id_ in ids if await weighing.may_leave(id_)]
        waiting = await self._store.waiting(ids, self._depth.value) if ids else []
        went = await weighing.all_of(waiting)
        room = any(self.fleet.takes(id_, time.monotonic()) for id_ in ids)
        return Looked(len(waiting), len(went), self._depth.looked(waiting, went, room=room))

    async def _others(self, workers: Sequence[WorkerRecord], ids: set[str]) -> tuple[RemoteState, ...]:
        """The remotes that only other workers have, with the places that are free there."""
        there = merged([one for one in workers if one.id != self.worker], now=self.tools.clock())
        others = [state for state in there if state.name not in self.fleet and not ids.isdisjoint(state.models)]
        if not others:
            return ()
        return with_room(others, await self._store.list_requests(state="running", limit=_RUNNING_LOOKED_AT))

    def model(self, id_: str) -> Model | None:
        entry = self._catalog.get(id_)
        return entry.model if entry is not None else None

    def table(self, model: Model, kind: str) -> RemoteTable | None:
        """As :func:`rushes.catalog.remotes.remote_table`, read once."""
        key = (model.id, kind)
        if key not in self._tables:
            try:
                self._tables[key] = remote_table(model, kind)
            except ManifestError as error:
                self._tables[key] = error
        table = self._tables[key]
        if isinstance(table, ManifestError):
            raise table
        return table

    def _renew(self) -> None:
        if self._version != self._catalog.version:
            self._version = self._catalog.version
            self._tables.clear()
            self._everything = frozenset(entry.model.id for entry in self._catalog.entries())


class _Line(NamedTuple):
    """One model's, for one look."""

    model: Model
    outlook: Outlook
    lane: Lane
    routes: dict[tuple[bool, bool], tuple[Outlook, tuple[Route, ...]]]
    """By whether servers that pass on, and remotes of others, are left out."""


class _Weighing:
    """One look, and what it has read already."""

    def __init__(self, dispatcher: Dispatcher, look: Look, others: tuple[RemoteState, ...], now: float) -> None:
        self._of = dispatcher
        self._store = dispatcher.tools.store
        self._memory = dispatcher.memory
        self._look = look
        self._others = others
        self._now = now
        self._minute = minute_of_day()
        self._seen: tuple[RemoteState, ...] | None = None
        self._lines: dict[str, _Line] = {}
        self._places: dict[Lane, Places] = {}
        self._waiting: Sequence[Request] = ()
        self._idle: dict[str, float] = {}
        self._left: dict[KeyId | None, float | None] = {}
        """Of the budgets."""
        self._full: set[AccountId] = set()
        """Those that have as many running as they may."""

    async def may_leave(self, model_id: str) -> bool:
        """Whether anything that waits for the model may go to a remote, for all that its routes say."""
        line = await self._line(model_id)
        if line is None:
            return False
        outlook, routes = self._routed(line, tired=False, alone=False)
        return may_leave(routes, outlook)

    async def all_of(self, waiting: Sequence[Request]) -> set[RequestId]:
        """Weigh them all; those who went."""
        self._waiting = waiting
        went: set[RequestId] = set()
        # What a remote had a fault over must not keep it from trying the others.
        turns = sorted(waiting, key=lambda request: request.id in self._of.tools.faults)
        for turn, request in enumerate(turns, 1):
            if self._of.tools.stopping.is_set():
                break
            if turn % _IN_A_ROW == 0:
                await asyncio.sleep(0)
            try:
                if await self._weigh(request):
                    went.add(request.id)
            except StoreUnavailable:
                raise
            except Exception:
                self._say_once("request not weighed", request, traceback=traceback.format_exc())
        return went

    async def _weigh(self, request: Request) -> bool:
        """Whether it went to a remote of ours."""
        line = await self._line(request.model)
        if line is None or request.account in self._full:
            return False
        waited = self._memory.waited(request.id, self._now)
        idle = min(waited, self._idle_for(line))
        if not self._of.fleet.takes(request.model, self._now):
            return False
        case = Case(
            account=request.account,
            position=await self._place(request, line),
            waited=waited,
            minute=self._minute,
            costs=self._costs(request, line.model),
            budget_left=await self._budget(None),
            key_budget_left=await self._budget(request.key_id),
            idle_for=idle,
        )
        remote = self._chosen(request, line, case)
        return remote is not None and await self._send(request, remote, case)

    def _chosen(self, request: Request, line: _Line, case: Case) -> Remote | None:
        """The remote of ours that should have it."""
        tired = request.hops >= MOST_HOPS
        name = self._decided(line, case, tired=tired, alone=False)
        to_others = name is not None and name not in self._of.fleet
        if self._memory.left(request.id, self._now, to_others=to_others) > LEFT_SECONDS:
            name = self._decided(line, case, tired=tired, alone=True)
        if tired and name is None:
            self._say_if_stranded(request, line)
        remote = self._of.fleet.get(name)
        if remote is None or not remote.room():
            return None
        return remote if remote.breaker.ready(time.monotonic(), request.model) else None

    def _decided(self, line: _Line, case: Case, *, tired: bool, alone: bool) -> str | None:
        outlook, routes = self._routed(line, tired=tired, alone=alone)
        return next((one.remote for one in decide(routes, outlook, case) if one.takes), None)

    async def _send(self, request: Request, remote: Remote, case: Case) -> bool:
        settings = self._of.settings
        take = Take(
            id=request.id,
            worker=self._of.worker,
            remote=remote.name,
            reserve_usd=case.costs.get(remote.name) or 0.0,
            budget_usd=settings.budget_usd_per_day,
            key_budget_usd=settings.key_budget_usd_per_day,
            account_limit=settings.account_limit,
        )
        lease = await self._store.take(take)
        if lease == "account":
            self._full.add(request.account)
        if isinstance(lease, Lease):
            self._of.begin(remote, lease)
            self._changed()
        elif lease != "gone":
            self._left.clear()
            return False
        for places in self._places.values():
            places.gone(request.id)
        self._left.clear()
        return isinstance(lease, Lease)

    # -- what is read once ------------------------------------------------------------------------------
    async def _line(self, model_id: str) -> _Line | None:
        if model_id not in self._lines:
            model = self._of.model(model_id)
            if model is None:
                return None
            outlook = await self._look.of(model_id, ())
            self._lines[model_id] = _Line(model, outlook, await self._look.lane(model_id), {})
        return self._lines[model_id]

    def _routed(self, line: _Line, *, tired: bool, alone: bool) -> tuple[Outlook, tuple[Route, ...]]:
        """The outlook with the remotes that may have the request, and the routes there."""
        found = line.routes.get((tired, alone))
        if found is None:
            states = [
                one
                for one in self._states()
                if not (tired and one.kind == _PASSES_ON) and not (alone and one.name not in self._of.fleet)
            ]
            outlook = msgspec.structs.replace(line.outlook, remotes=tuple(states))
            routes = effective_routes(line.model, states, self._of.settings.overflow_seconds)
            found = line.routes[tired, alone] = outlook, routes
        return found

    def _states(self) -> tuple[RemoteState, ...]:
        """All remotes: ours as they are at this moment, those of others as they told."""
        if self._seen is None:
            fleet = self._of.fleet
            self._seen = (*(fleet.state(one, one.room()) for one in fleet), *self._others)
        return self._seen

    def _changed(self) -> None:
        """One of our remotes has a place less."""
        self._seen = None
        for line in self._lines.values():
            line.routes.clear()

    def _idle_for(self, line: _Line) -> float:
        id_ = line.model.id
        if id_ not in self._idle:
            self._idle[id_] = self._memory.idle(id_, self._now, free=line.outlook.free > 0)
        return self._idle[id_]

    async def _place(self, request: Request, line: _Line) -> int:
        lane = line.lane
        if not lane.slots:
            return 1
        if lane not in self._places:
            listed = [one for one in self._waiting if lane.models is None or one.model in lane.models]
            self._places[lane] = Places(self._store, lane.models, listed, lane.waiting)
        return await self._places[lane].of(request)

    def _costs(self, request: Request, model: Model) -> dict[str, float | None]:
        """At each remote; all unknown where its input cannot be read: whoever takes it will say why it fails."""
        try:
            values = msgspec.json.decode(request.input)
            return costs_of(model, values, self._states(), self._of.table)
        except Exception as error:
            self._say_once("request not readable", request, error=f"{type(error).__name__}: {error}")
            return {}

    async def _budget(self, key_id: KeyId | None) -> float | None:
        if key_id not in self._left:
            settings = self._of.settings
            budget = settings.budget_usd_per_day if key_id is None else settings.key_budget_usd_per_day
            self._left[key_id] = await budget_left(self._store, budget, key_id)
        return self._left[key_id]

    # -- what people are told ---------------------------------------------------------------------------
    def _say_if_stranded(self, request: Request, line: _Line) -> None:
        served = [one for one in self._states() if request.model in one.models]
        if line.outlook.slots or line.outlook.draft_slots or any(one.kind != _PASSES_ON for one in served):
            return
        why = f"{request.hops} servers have passed it on, and only others of their kind could take it"
        self._say_once("request stays", request, why=why)

    def _say_once(self, what: str, request: Request, **fields: str) -> None:
        if self._memory.first(what, request.id):
            log.event(what, request=request.id, model=request.model, **fields)
