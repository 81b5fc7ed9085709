"""The states of a request and the legal moves between them. Pure: no clock, no store.

::

                 cancel ──────────────► cancelled
                   │
    (submit) ► queued ── claim ► running ── succeed ► succeeded
                 │  ▲               │ │
          refuse │  └─ retry/release┘ └──── fail ────► failed
                 ▼
               failed

Both stores build their SQL on these names and their suites compare them with :func:`move`.
"""

from typing import Final, Literal, get_args

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Event = Literal["claim", "cancel", "refuse", "succeed", "fail", "retry", "release"]

STATES: Final[tuple[State, ...]] = get_args(State)
TERMINAL: Final[frozenset[State]] = frozenset({"succeeded", "failed", "cancelled"})

MOVES: Final[dict[tuple[State, Event], State]] = {
    ("queued", "claim"): "running",
    ("queued", "cancel"): "cancelled",
    ("queued", "refuse"): "failed",
    ("running", "succeed"): "succeeded",
    ("running", "fail"): "failed",
    ("running", "retry"): "queued",
    ("running", "release"): "queued",
}


class IllegalMove(ValueError):
    """This move does not exist from this state."""


def move(state: State, event: Event) -> State:
    """The state after ``event``; raises :class:`IllegalMove` where the life of a request has no such step."""
    try:
        return MOVES[state, event]
    except KeyError:
        raise IllegalMove(f"a {state} request cannot {event}") from None


def after_lost_attempt(attempt: int, attempt_limit: int) -> Event:
    """What follows an attempt that ended without an outcome: another try, or failure at the limit."""
    return "retry" if attempt < attempt_limit else "fail"
