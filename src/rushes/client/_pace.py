"""How fast to poll, and whether and when to try again. Pure: the caller waits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from rushes.client._wire import Call, Reply, retry_after

PASSING: Final = frozenset({502, 503, 504})
"""HTTP statuses of a server that is likely back soon."""


class Lost(Exception):
    """A call without a whole answer. ``sent`` says whether the server may have acted on it.

    Of a download that broke off, ``received`` is how many bytes of the file there are, ``headers`` what its
    answer began with.
    """

    def __init__(
        self, reason: str, *, sent: bool, received: int = 0, headers: Mapping[str, str] | None = None
    ) -> None:
        self.reason, self.sent = reason, sent
        self.received = received
        self.headers = headers or {}
        super().__init__(reason)


DEFAULT_RETRIES: Final = 5
AWAY_SECONDS: Final = 60.0
"""How long a wait for an accepted request sits through a server that does not answer, in seconds.

Servers are restarted, and the request itself outlives that.
"""


@dataclass(frozen=True)
class Retries:
    """When a call that brought nothing is worth another one.

    A call that may be repeated is tried again after a lost connection and after 429, 502, 503 and 504. A
    submit is tried again only where the server certainly has not accepted it: nothing was sent, or it
    refused with 429 or 503 and said when to come back.
    """

    limit: int = DEFAULT_RETRIES
    """Tries after the first."""
    limit_unseen: int = 2
    """Tries after the first to connect to a server that has never answered: it is likely not there."""
    away: float = AWAY_SECONDS
    """Seconds without a good answer after which a wait for an accepted request gives up, whatever ``limit``
    is; with a ``limit`` of 0 nothing is tried again."""
    patience: float = 60.0
    """The longest ``Retry-After`` to sit through, in seconds; a longer one is the caller's to decide."""

    def after_loss(
        self, call: Call, lost: Lost, tried: int, *, seen: bool, jitter: float, away: float | None = None
    ) -> float | None:
        """Seconds until the next try after ``tried`` of them, or None to give up.

        ``away`` is given by the wait for an accepted request: for how many seconds its calls have failed.
        """
        if lost.sent and not call.repeatable:
            return None
        limit = self.limit if seen or lost.sent or away is not None else min(self.limit, self.limit_unseen)
        return None if self._is_over(tried, limit, away) else backoff(tried, jitter)

    def after_reply(
        self, call: Call, reply: Reply, tried: int, *, jitter: float, away: float | None = None
    ) -> float | None:
        """The same for an answer that is no success."""
        if reply.status != 429 and reply.status not in PASSING:
            return None
        asked = retry_after(reply)
        if not call.repeatable and (asked is None or reply.status not in (429, 503)):
            return None
        if self._is_over(tried, self.limit, away) or (asked or 0.0) > self.patience:
            return None
        return backoff(tried, jitter) if asked is None else asked * (1.0 + 0.1 * jitter)

    def _is_over(self, tried: int, limit: int, away: float | None) -> bool:
        return tried > limit and (limit == 0 or away is None or away >= self.away)


def backoff(tried: int, jitter: float) -> float:
    """Seconds before try ``tried + 1``: 0.25, 0.5, 1, 2, 4, 4 …, up to half less by ``jitter`` (0 to 1)."""
    return float(min(4.0, 0.25 * 2 ** (tried - 1)) * (1.0 - 0.5 * jitter))


class Polling:
    """The pauses between the status polls of one request: 0.02 s at first, growing to 2 s.

    A change of state makes it fast again, because short work may end right after; where the server says how
    long it still takes, no pause goes much past that.
    """

    FIRST: Final = 0.02
    LONGEST: Final = 2.0
    GROWTH: Final = 1.5
    LEAST_BY_ETA: Final = 0.1
    """The end may be said to be near for a while."""

    def __init__(self) -> None:
        self._pause = self.FIRST
        self._state = ""

    def pause(self, state: str, *, eta: float | None = None, retry_after: float | None = None) -> float:
        """Seconds until the next poll. The server's ``Retry-After`` is the least there may be."""
        if state != self._state:
            self._state, self._pause = state, self.FIRST
        pause = self._pause
        self._pause = min(self.LONGEST, pause * self.GROWTH)
        if eta is not None:
            pause = min(pause, max(self.LEAST_BY_ETA, eta))
        return max(pause, min(retry_after or 0.0, 60.0))


Jitter = Callable[[], float]
"""A number from 0 to 1, a new one at each call."""
