"""The life of a request, as pure moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.requests.states import (
    MOVES,
    STATES,
    TERMINAL,
    Event,
    IllegalMove,
    State,
    after_lost_attempt,
    move,
)

EVENTS: tuple[Event, ...] = ("claim", "cancel", "refuse", "succeed", "fail", "retry", "release")


@pytest.mark.parametrize(
    ("state", "event", "expected"),
    [
        ("queued", "claim", "running"),
        ("queued", "cancel", "cancelled"),
        ("queued", "refuse", "failed"),
        ("running", "succeed", "succeeded"),
        ("running", "fail", "failed"),
        ("running", "retry", "queued"),
        ("running", "release", "queued"),
    ],
)
def test_a_legal_move_leads_to_its_state(state: State, event: Event, expected: State) -> None:
    assert expected == move(state, event)


def test_all_other_moves_are_refused_by_name() -> None:
    for state in STATES:
        for event in EVENTS:
            if (state, event) not in MOVES:
                with pytest.raises(IllegalMove, match=f"a {state} request cannot {event}"):
                    move(state, event)


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_no_sequence_of_events_leaves_a_terminal_state(events: list[Event]) -> None:
    state: State = "queued"
    for event in events:
        before = state
        try:
            state = move(state, event)
        except IllegalMove:
            assert before == state
        else:
            assert before not in TERMINAL
        assert state in STATES


def test_every_state_is_reached_and_ends_are_ends() -> None:
    assert set(STATES) == {"queued", *MOVES.values()}
    assert frozenset({"succeeded", "failed", "cancelled"}) == TERMINAL
    assert TERMINAL.isdisjoint(state for state, _ in MOVES)


@given(attempt=st.integers(1, 100), limit=st.integers(1, 100))
def test_a_lost_attempt_is_tried_again_below_the_limit_alone(attempt: int, limit: int) -> None:
    assert ("retry" if attempt < limit else "fail") == after_lost_attempt(attempt, limit)


def test_a_request_is_tried_exactly_limit_times() -> None:
    attempt, state = 0, "queued"
    while state == "queued":
        state = move("queued", "claim")
        attempt += 1
        state = move("running", after_lost_attempt(attempt, 3))
    assert (3, "failed") == (attempt, state)
