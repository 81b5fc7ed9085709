"""What a worker with remotes knows of the requests that wait: since when, in which place, and how deep it looks.

Clocks come in, in monotonic seconds: how long something has waited is measured here, never by the clock of another
machine, and a worker that starts does not take for waiting what happened before.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Sequence
from typing import Final

from rushes.queue.base import Store
from rushes.requests.ids import RequestId
from rushes.requests.record import Request, StatusView

LEAST_DEPTH: Final = 8
MOST_DEPTH: Final = 512
_MOST_IN_ALL: Final = 2000
"""What :meth:`rushes.queue.base.Store.waiting` answers at most."""
_REMEMBERED: Final = 16384
_INTERRUPTED_SECONDS: Final = 5.0
"""A state that nobody has looked at for so long may have ended meanwhile."""
_ASKED: Final = 16
"""How often the store is asked for a place in one line, at most, for one look."""


class Depth:
    """How far into the line of each model and key is looked. Mostly not far: who stands at the head goes first. Where
    the heads stay, those behind them may go.
    """

    def __init__(self) -> None:
        self.value = LEAST_DEPTH

    def looked(self, waiting: Sequence[Request], went: Collection[RequestId], *, room: bool) -> bool:
        """What came of a look: those who waited, and who of them went. Whether the next one should come soon, as it
        goes deeper.
        """
        groups: Counter[tuple[str, str]] = Counter()
        moved: dict[tuple[str, str], int] = {}
        """The groups of those who went, and how deep the last of them stood."""
        for request in waiting:
            group = (request.model, request.key_id)
            groups[group] += 1
            if request.id in went:
                moved[group] = groups[group]
        stuck = any(count >= self.value and group not in moved for group, count in groups.items())
        if stuck and room and self.value < MOST_DEPTH and len(waiting) < _MOST_IN_ALL:
            self.value *= 2
            return True
        if moved and not stuck:
            self.value = LEAST_DEPTH
            while self.value < max(moved.values()):
                self.value *= 2
        return False


class Memory:
    """What was seen in earlier looks."""

    def __init__(self) -> None:
        self._since: OrderedDict[tuple[str, Hashable], tuple[float, float]] = OrderedDict()
        """Since when something is so, and when it was last seen to be."""

    def waited(self, id_: RequestId, now: float) -> float:
        """Seconds since the request was first seen waiting."""
        return self._lasts(("waiting", id_), now, float("inf"))

    def idle(self, model: str, now: float, *, free: bool) -> float:
        """Seconds for which slots have been ``free`` at every look, though requests for the model waited."""
        return self._while(("idle", model), now, holds=free)

    def left(self, id_: RequestId, now: float, *, to_others: bool) -> float:
        """Seconds for which the request has been left to a remote of another worker."""
        return self._while(("left", id_), now, holds=to_others)

    def first(self, what: str, id_: RequestId) -> bool:
        """Whether this is said of the request for the first time."""
        key = (f"said {what}", id_)
        known = key in self._since
        self._lasts(key, 0.0, float("inf"))
        return not known

    def _while(self, key: tuple[str, Hashable], now: float, *, holds: bool) -> float:
        if holds:
            return self._lasts(key, now, _INTERRUPTED_SECONDS)
        self._since.pop(key, None)
        return 0.0

    def _lasts(self, key: tuple[str, Hashable], now: float, gap: float) -> float:
        since, seen = self._since.pop(key, (now, now))
        if now - seen > gap:
            since = now
        self._since[key] = (since, now)
        while len(self._since) > _REMEMBERED:
            self._since.popitem(last=False)
        return now - since


class Places:
    """The places of requests in the line for the same slots. ``listed`` are those of them that are looked at, in
    their order, ``waiting`` how many there are in all: where these are the same, nobody needs to be asked. Else the
    store is asked for some of them, and what lies between is counted.
    """

    def __init__(
        self, store: Store, models: Sequence[str] | None, listed: Sequence[Request], waiting: int
    ) -> None:
        self._store = store
        self._models = models
        self._listed = listed
        self._index = {request.id: index for index, request in enumerate(listed)}
        self._stride = max(1, -(-len(listed) // _ASKED))
        self._known: dict[int, int] = {}
        self._gone: set[int] = set()
        if len(listed) == waiting and all(request.priority >= 0 for request in listed):
            self._stride, self._known[0] = len(listed) + 1, 1

    async def of(self, request: Request) -> int:
        """Its place, now: 1 is the next. Raises StoreUnavailable."""
        index = self._index[request.id]
        anchor = index - index % self._stride
        if anchor not in self._known:
            one = self._listed[anchor]
            view = StatusView(one.seq, one.model, "queued", one.priority, None)
            place = await self._store.position(view, self._models)
            self._known[anchor] = place + self._gone_before(anchor)
        return max(1, self._known[anchor] + index - anchor - self._gone_before(index))

    def gone(self, id_: RequestId) -> None:
        """It stands in the line no more."""
        if id_ in self._index:
            self._gone.add(self._index[id_])

    def _gone_before(self, index: int) -> int:
        return sum(one < index for one in self._gone)
