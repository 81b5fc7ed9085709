"""Who has stopped giving signs of life: decided by our own monotonic clock and by nothing that others say.

A lease has a beat that its holder moves on. A beat that we have seen standing still for the lease time has
expired. No wall clock is read, here or by the holder, so a wrong one can do no harm. Pure: the clock comes in.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class BeatWatch(Generic[K]):
    """Watches beats by key. ``patience`` in seconds; ``interval`` is the time between two looks."""

    def __init__(self, patience: float, interval: float) -> None:
        self._patience = patience
        self._gap = max(4 * interval, interval + 1.0)
        self._seen: dict[K, tuple[Hashable, float]] = {}
        self._last: float | None = None

    def look(self, beats: Mapping[K, Hashable], now: float) -> list[K]:
        """The keys whose beats have stood still for the patience.

        Where we ourselves were away (stopped, suspended, starved), the others may have been too, or we see an
        old state first: everybody gets the whole time anew.
        """
        if self._last is not None and now - self._last > self._gap:
            self._seen.clear()
        self._last = now
        self._seen = {
            key: (beat, self._seen[key][1] if self._seen.get(key, (None,))[0] == beat else now)
            for key, beat in beats.items()
        }
        return [key for key, (_, since) in self._seen.items() if now - since >= self._patience]

    def forget(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._seen.pop(key, None)
