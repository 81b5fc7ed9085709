"""A circuit breaker: stops sending to a remote that does not take anything, and honours the pauses that it asks for.

Pure: the clock comes in, in monotonic seconds. Submits decide; of polls, which go on whatever it says, only a "too
many requests" counts.

::

    ready ── three faults in a row, or a fault of the operator's to mend ──► open
      ▲  │                                                                   │ a pause, longer each time
      │  └─ one fault, or "too many requests" ──► held ─ its pause ─► ready  ▼
      └──────────────────────── it goes well ◄───────────── one request is let through, alone
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
_NEVER: Final = float("-inf")


class Condition(NamedTuple):
    """How a breaker stands. ``until`` in monotonic seconds, where it is not ready."""

    state: Literal["ready", "held", "open"]
    until: float | None = None
    why: str = ""


class Breaker:
    """Of one remote, in one worker. Each submit has a token of :meth:`begin`, which its outcome presents: what was on
    its way when the breaker opened says nothing of how things are afterwards.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._valid_from = 0
        """Tokens up to this one were given before the state last changed."""
        self._trial: int | None = None
        self._faults = 0
        self._throttled = 0
        self._opened = 0
        """How often in a row it opened, or a trial failed."""
        self._until = _NEVER
        self._why = ""
        self._models: dict[str, tuple[float, str]] = {}
        self.taken = 0
        """How many requests it has taken, ever."""

    def ready(self, now: float, model: str = "") -> bool:
        """Whether a request, of this model, may be sent."""
        until, _ = self._models.get(model, (_NEVER, ""))
        return now >= max(self._until, until) and self._trial is None

    def begin(self) -> int:
        """One is being sent; its token. After a time of being open it is the trial, and alone."""
        self._tokens += 1
        if self._opened:
            self._trial = self._tokens
        return self._tokens

    def accepted(self, token: int) -> None:
        """It was taken, or refused by one who understood it."""
        self.taken += 1
        if self._is_old(token):
            return
        self._faults = self._throttled = self._opened = 0
        self._until, self._why, self._trial = _NEVER, "", None

    def ended(self, token: int) -> None:
        """It came to an end that says nothing of the remote. A second word on a token is none."""
        if token == self._trial:
            self._trial = None

    def failed(
        self,
        token: int,
        trouble: Trouble,
        now: float,
        *,
        why: str,
        model: str = "",
        retry_after: float | None = None,
    ) -> None:
        """It was not taken. ``retry_after`` in seconds, where the remote said."""
        if trouble == "model":
            self._models[model] = (now + (retry_after or MODEL_PAUSE), why)
            self.ended(token)
            return
        if trouble == "throttled":
            self.ended(token)
            self.throttled(now, why=why, retry_after=retry_after)
            return
        if self._is_old(token):
            return
        self._trial = None
        self._faults += 1
        if trouble in _OPERATORS or self._opened or self._faults >= FAULTS:
            self._opened += 1
            self._valid_from = self._tokens
            self._pause(now, max(_doubled(FIRST_PAUSE, self._opened, LONGEST_PAUSE), retry_after or 0.0), why)
        else:
            self._pause(now, retry_after or _doubled(HELD_PAUSE, self._faults, LONGEST_HELD), why)

    def throttled(self, now: float, *, why: str, retry_after: float | None = None) -> None:
        """It has too much to do, as it said of a submit or of a poll. What is said in a pause is one word."""
        if now >= self._until:
            self._throttled += 1
        self._valid_from = self._tokens
        self._pause(now, retry_after or _doubled(HELD_PAUSE, self._throttled, LONGEST_HELD), why)

    def answered(self) -> None:
        """A poll went well."""
        if not self._opened:
            self._throttled = 0

    def condition(self, now: float, model: str = "") -> Condition:
        """For people, and for those who decide where requests go."""
        until, why = self._models.get(model, (_NEVER, ""))
        if until > max(now, self._until):
            return Condition("held", until, why)
        if self._until > now:
            return Condition("open" if self._opened else "held", self._until, self._why)
        if self._trial is not None:
            return Condition("open", None, self._why)
        return Condition("ready")

    def unknown(self, now: float) -> dict[str, str]:
        """The models that it did not know of late, each with what it said."""
        return {model: why for model, (until, why) in self._models.items() if until > now}

    def _is_old(self, token: int) -> bool:
        """Whether it was sent before the state last changed."""
        return token <= self._valid_from and token != self._trial

    def _pause(self, now: float, seconds: float, why: str) -> None:
        self._until, self._why = max(self._until, now + seconds), why


def _doubled(first: float, times: int, most: float) -> float:
    return min(most, first * 2.0 ** min(max(times, 1) - 1, 16))
