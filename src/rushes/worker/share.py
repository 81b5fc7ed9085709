"""Which models the slots of a worker may take. Pure; the clock comes in, in monotonic seconds.

Mostly all that it serves. Routes may leave local engines out; and what the draft engine makes must not reach people
who wait for a generation: it takes a model only where its routes ask for that, or where nothing else serves it.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from rushes.catalog.load import Catalog
from rushes.catalog.routes import DRAFT, effective_routes, routed
from rushes.catalog.routing import may_claim
from rushes.requests.ids import WorkerId
from rushes.requests.record import RemoteState, WorkerRecord

REMEMBERED_SECONDS: Final = 600.0
"""For which a worker that is gone counts as one that comes back."""


class _Known(NamedTuple):
    """What another worker last told of itself, and when."""

    engine: str
    models: frozenset[str]
    """Those of its slots."""
    remotes: tuple[RemoteState, ...]
    at: float


class Share:
    """Of a worker whose slots have this engine."""

    def __init__(self, engine: str, catalog: Catalog) -> None:
        self._engine = engine
        self._catalog = catalog
        self._others: dict[WorkerId, _Known] = {}
        self._own: tuple[RemoteState, ...] = ()

    @property
    def minds_others(self) -> bool:
        return self._engine == DRAFT

    def see(self, others: Iterable[WorkerRecord], own: tuple[RemoteState, ...], now: float) -> None:
        """Who else serves what. A worker's latest word counts: one that has just started lists all that it may come
        to serve. That of one that is gone counts for ten minutes more: an engine that starts again must not find its
        requests drafted meanwhile.
        """
        self._own = own
        for worker in others:
            models = worker.models if worker.slots and worker.engine != DRAFT else ()
            self._others[worker.id] = _Known(worker.engine, frozenset(models), worker.remotes, now)
        for id_ in [id_ for id_, known in self._others.items() if now - known.at > REMEMBERED_SECONDS]:
            del self._others[id_]

    def may_take(self, model_id: str) -> bool:
        entry = self._catalog.get(model_id)
        if entry is None:
            return False
        told = (*self._own, *(state for known in self._others.values() for state in known.remotes))
        serving = tuple({state.name: state for state in told if model_id in state.models}.values())
        lead_there = routed(effective_routes(entry.model, serving, 0.0), serving)
        others = {known.engine for known in self._others.values() if model_id in known.models}
        return may_claim(self._engine, entry.model, others, [remote.name for remote in lead_there])
