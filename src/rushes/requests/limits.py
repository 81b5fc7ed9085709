"""A rate limit: a token bucket for each key. Pure: the clock comes in."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

_MOST_KEYS: Final = 10_000


class RateLimiter:
    """``rate`` per second, in bursts of up to ten seconds' worth; 0 lets everything pass."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._burst = max(1.0, 10 * rate)
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, key: Hashable, now: float) -> float:
        """Take one token at ``now`` (monotonic seconds). 0 if it was there, else the seconds until one is."""
        if not self._rate:
            return 0.0
        tokens, since = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        wait = 0.0 if tokens >= 1.0 else (1.0 - tokens) / self._rate
        self._buckets[key] = (tokens - 1.0 if not wait else tokens, now)
        if len(self._buckets) > _MOST_KEYS:
            self._buckets.popitem(last=False)
        return wait
