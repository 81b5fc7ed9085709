"""The remotes of this worker, and which of its models each of them has."""

import asyncio
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from rushes import log
from rushes.catalog.load import Catalog, Entry
from rushes.engines.remote.base import RemoteEngine
from rushes.requests.record import RemoteState
from rushes.worker.breaker import Breaker


class Remote:
    """One remote, and what of it is busy."""

    def __init__(self, engine: RemoteEngine, limit: int) -> None:
        self.engine = engine
        self.limit = limit
        self.breaker = Breaker()
        self.errands: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        return self.engine.name

    def room(self) -> int:
        """How many more requests it may be given."""
        return max(0, self.limit - len(self.errands))


class Fleet:
    """All remotes of a worker. ``models`` are the ids that it serves, ``clock`` gives seconds since the epoch."""

    def __init__(
        self,
        engines: Sequence[RemoteEngine],
        limit: int,
        *,
        catalog: Catalog,
        models: Callable[[], Sequence[str]],
        clock: Callable[[], float],
    ) -> None:
        self._remotes = {engine.name: Remote(engine, limit) for engine in engines}
        self._catalog = catalog
        self._models = models
        self._clock = clock
        self._served_of: tuple[int, tuple[str, ...]] | None = None
        """The catalog and the models that :attr:`_served` is for: engines read manifests to answer."""
        self._served: dict[str, tuple[str, ...]] = {}
        self._sets: dict[str, frozenset[str]] = {}

    def __len__(self) -> int:
        return len(self._remotes)

    def __iter__(self) -> Iterator[Remote]:
        return iter(self._remotes.values())

    def __contains__(self, name: object) -> bool:
        return name in self._remotes

    def get(self, name: str | None) -> Remote | None:
        return self._remotes.get(name or "")

    def served(self, remote: Remote) -> tuple[str, ...]:
        """The ids of the models that it can run, of those that the worker serves."""
        self._renew()
        return self._served[remote.name]

    def takes(self, model: str, now: float) -> bool:
        """Whether some remote would take a request for it; ``now`` in monotonic seconds."""
        self._renew()
        return any(
            model in self._sets[one.name] and one.room() and one.breaker.ready(now, model) for one in self
        )

    def state(self, remote: Remote, capacity: int) -> RemoteState:
        """As other workers, people and routes see it."""
        now = time.monotonic()
        condition = remote.breaker.condition(now)
        until = None
        if condition.until is not None:
            until = round(self._clock() + condition.until - now, 1)
        return RemoteState(
            name=remote.name,
            kind=remote.engine.kind,
            models=self.served(remote),
            capacity=capacity,
            state=condition.state,
            until=until,
            why=condition.why,
            unknown=remote.breaker.unknown(now),
        )

    def _renew(self) -> None:
        models = tuple(self._models())
        if self._served_of == (self._catalog.version, models):
            return
        entries = [entry for entry in map(self._catalog.get, models) if entry is not None]
        self._served = {
            one.name: tuple(entry.model.id for entry in entries if _serves(one.engine, entry)) for one in self
        }
        self._sets = {name: frozenset(ids) for name, ids in self._served.items()}
        self._served_of = (self._catalog.version, models)


def _serves(engine: RemoteEngine, entry: Entry) -> bool:
    """One manifest that an engine cannot read must not keep the others from it."""
    try:
        return engine.serves(entry.model)
    except Exception:
        log.event(
            "model not offered to remote",
            model=entry.model.id,
            remote=engine.name,
            traceback=traceback.format_exc(),
        )
        return False
