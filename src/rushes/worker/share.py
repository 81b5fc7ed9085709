"""Which models the slots of a worker may take. Pure.

Mostly all that it serves. Routes may leave local engines out; and what the draft engine makes must not reach people
who wait for a generation: it takes a model only where its routes ask for that, or where nothing else serves it.
"""

from collections.abc import Iterable

from rushes.catalog.load import Catalog
from rushes.catalog.routes import effective_routes, routed
from rushes.catalog.routing import may_claim
from rushes.requests.record import RemoteState, WorkerRecord

DRAFT = "draft"


class Share:
    """Of a worker whose slots have this engine."""

    def __init__(self, engine: str, catalog: Catalog) -> None:
        self._engine = engine
        self._catalog = catalog
        self._others: dict[str, set[str]] = {}
        self._remotes: dict[str, dict[str, RemoteState]] = {}

    @property
    def minds_others(self) -> bool:
        return self._engine == DRAFT

    def see(self, others: Iterable[WorkerRecord], own: Iterable[RemoteState]) -> None:
        """Remember who else serves what. Nobody is forgotten: an engine that starts again must not find its requests
        drafted meanwhile.
        """
        for worker in others:
            if worker.engine != DRAFT and worker.slots:
                for id_ in worker.models:
                    self._others.setdefault(id_, set()).add(worker.engine)
            self._note(worker.remotes)
        self._note(own)

    def _note(self, remotes: Iterable[RemoteState]) -> None:
        for remote in remotes:
            for id_ in remote.models:
                self._remotes.setdefault(id_, {})[remote.name] = remote

    def may_take(self, model_id: str) -> bool:
        entry = self._catalog.get(model_id)
        if entry is None:
            return False
        serving = tuple(self._remotes.get(model_id, {}).values())
        lead_there = routed(effective_routes(entry.model, serving, 0.0), serving)
        others = self._others.get(model_id, set())
        return may_claim(self._engine, entry.model, others, [remote.name for remote in lead_there])
