"""A circuit breaker: stops asking a remote that does not answer, and honours the pauses that it asks for.

Pure: the clock comes in, in monotonic seconds.

::

    ready ── three faults in a row, or a fault of the operator's to mend ──► open
      ▲  │                                                                   │ a pause, longer each time
      │  └─ one fault, or "too many requests" ──► held ─ its pause ─► ready  ▼
      └──────────────────────── it goes well ◄───────────────── one request is let through
"""

from typing import Final, Literal, NamedTuple

from rushes.engines.remote.base import Trouble

FAULTS: Final = 3
"""Faults in a row that open the breaker."""
FIRST_PAUSE: Final = 10.0
LONGEST_PAUSE: Final = 300.0
"""Seconds for which it stays open; twice as long each time."""
HELD_PAUSE: Final = 1.0
LONGEST_HELD: Final = 60.0
"""Seconds of a pause that nobody gave a length, twice as long each time in a row."""
MODEL_PAUSE: Final = 300.0
"""Seconds for which a model that a remote does not know is not sent there."""
_OPERATORS: Final = frozenset({"key", "funds"})
"""What time does not mend: the breaker opens at once."""


class Condition(NamedTuple):
    """How a breaker stands. ``until`` in monotonic seconds, where it is not ready."""

    state: Literal["ready", "held", "open"]
    until: float | None = None
    why: str = ""


class Breaker:
    """Of one remote, in one worker."""

    def __init__(self) -> None:
        self._faults = 0
        self._held = 0
        self._opened = 0
        """How often in a row it opened, or a trial failed."""
        self._until = float("-inf")
        self._why = ""
        self._trial = False
        self._models: dict[str, tuple[float, str]] = {}
        self.taken = 0
        """How many requests it has taken, ever."""

    def ready(self, now: float, model: str = "") -> bool:
        """Whether a request, of this model, may be sent."""
        until, _ = self._models.get(model, (float("-inf"), ""))
        return now >= max(self._until, until) and not self._trial

    def begin(self) -> None:
        """One is being sent. After a time of being open it is the trial, and alone."""
        self._trial = self._opened > 0

    def accepted(self) -> None:
        """It was taken, or at least understood."""
        self.taken += 1
        self._faults = self._held = self._opened = 0
        self._until, self._why, self._trial = float("-inf"), "", False

    def answered(self) -> None:
        """A poll went well: the remote is there."""
        if not self._opened:
            self._faults = 0

    def ended(self) -> None:
        """What was begun came to an end that says nothing of the remote."""
        self._trial = False

    def failed(
        self, trouble: Trouble, now: float, *, why: str, model: str = "", retry_after: float | None = None
    ) -> None:
        """It was not taken, or not answered. ``retry_after`` in seconds, where the remote said."""
        self._trial = False
        if trouble == "model":
            self._models[model] = (now + (retry_after or MODEL_PAUSE), why)
            return
        if trouble == "throttled":
            self._held += 1
            self._pause(now, retry_after or _doubled(HELD_PAUSE, self._held, LONGEST_HELD), why)
            return
        self._faults += 1
        if trouble in _OPERATORS or self._opened or self._faults >= FAULTS:
            self._opened += 1
            self._pause(now, max(_doubled(FIRST_PAUSE, self._opened, LONGEST_PAUSE), retry_after or 0.0), why)
        else:
            self._pause(now, retry_after or _doubled(HELD_PAUSE, self._faults, LONGEST_HELD), why)

    def condition(self, now: float, model: str = "") -> Condition:
        """For people, and for those who decide where requests go."""
        until, why = self._models.get(model, (float("-inf"), ""))
        if until > max(now, self._until):
            return Condition("held", until, why)
        if self._until > now:
            return Condition("open" if self._opened else "held", self._until, self._why)
        if self._trial:
            return Condition("open", None, self._why)
        return Condition("ready")

    def unknown(self, now: float) -> dict[str, str]:
        """The models that it did not know of late, each with what it said."""
        return {model: why for model, (until, why) in self._models.items() if until > now}

    def _pause(self, now: float, seconds: float, why: str) -> None:
        self._until, self._why = max(self._until, now + seconds), why


def _doubled(first: float, times: int, most: float) -> float:
    return min(most, first * 2.0 ** min(times - 1, 16))
