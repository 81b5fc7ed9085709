"""When a remote is asked again, and when it is let alone."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.engines.remote.base import Trouble
from rushes.worker.breaker import (
    FAULTS,
    FIRST_PAUSE,
    HELD_PAUSE,
    LONGEST_PAUSE,
    MODEL_PAUSE,
    Breaker,
    Condition,
)

TROUBLES: tuple[Trouble, ...] = ("unreachable", "throttled", "fault", "key", "funds", "model")


def fail(breaker: Breaker, trouble: Trouble, now: float, **more: Any) -> None:
    """A submit of its own that fails so."""
    breaker.failed(breaker.begin(), trouble, now, **{"why": "refused", **more})


def broken(times: int = FAULTS) -> Breaker:
    breaker = Breaker()
    for _ in range(times):
        fail(breaker, "unreachable", 0.0)
    return breaker


def test_a_new_one_is_ready() -> None:
    breaker = Breaker()
    assert breaker.ready(0.0)
    assert Condition("ready") == breaker.condition(0.0)


def test_one_fault_is_a_short_pause() -> None:
    breaker = broken(times=1)
    assert Condition("held", 1.0, "refused") == breaker.condition(0.0)
    assert not breaker.ready(0.9)
    assert breaker.ready(1.0)


def test_three_in_a_row_open_it() -> None:
    breaker = broken()
    assert Condition("open", FIRST_PAUSE, "refused") == breaker.condition(0.0)
    assert not breaker.ready(FIRST_PAUSE - 0.1)
    assert breaker.ready(FIRST_PAUSE)


def test_what_goes_well_in_between_starts_the_count_anew() -> None:
    breaker = broken(times=2)
    breaker.accepted(breaker.begin())
    fail(breaker, "fault", 10.0)
    assert "held" == breaker.condition(10.0).state


def test_many_that_fail_at_once_open_it_once() -> None:
    breaker = Breaker()
    tokens = [breaker.begin() for _ in range(8)]
    for token in tokens:
        breaker.failed(token, "unreachable", 0.0, why="a blip")
    assert Condition("open", FIRST_PAUSE, "a blip") == breaker.condition(0.0)


def test_what_was_sent_before_it_opened_does_not_close_it() -> None:
    breaker = Breaker()
    early = breaker.begin()
    fail(breaker, "key", 0.0)
    breaker.accepted(early)
    assert "open" == breaker.condition(0.0).state


def test_what_was_sent_before_a_pause_was_asked_for_does_not_end_it() -> None:
    breaker = Breaker()
    early = breaker.begin()
    fail(breaker, "throttled", 0.0, retry_after=30.0)
    breaker.accepted(early)
    assert not breaker.ready(29.0)


def test_polls_that_go_well_do_not_close_what_takes_nothing() -> None:
    breaker = broken()
    breaker.answered()
    assert "open" == breaker.condition(0.0).state


def test_after_the_pause_one_request_is_let_through_alone() -> None:
    breaker = broken()
    token = breaker.begin()
    assert not breaker.ready(FIRST_PAUSE)
    assert "open" == breaker.condition(FIRST_PAUSE).state
    breaker.accepted(token)
    assert breaker.ready(FIRST_PAUSE)
    assert "ready" == breaker.condition(FIRST_PAUSE).state


def test_the_end_of_another_is_not_the_end_of_the_trial() -> None:
    breaker = Breaker()
    early = breaker.begin()
    for _ in range(FAULTS):
        fail(breaker, "fault", 0.0)
    breaker.begin()
    breaker.ended(early)
    assert not breaker.ready(FIRST_PAUSE)


def test_a_trial_that_fails_doubles_the_pause() -> None:
    breaker = broken()
    now, pauses = 0.0, []
    for _ in range(8):
        condition = breaker.condition(now)
        assert condition.until is not None
        pauses.append(condition.until - now)
        now = condition.until
        fail(breaker, "fault", now)
    assert [10, 20, 40, 80, 160, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE] == pauses


def test_a_trial_that_says_nothing_leaves_room_for_the_next() -> None:
    breaker = broken()
    breaker.ended(breaker.begin())
    assert breaker.ready(FIRST_PAUSE)


@pytest.mark.parametrize("trouble", ["key", "funds"])
def test_what_time_does_not_mend_opens_it_at_once(trouble: Trouble) -> None:
    breaker = Breaker()
    fail(breaker, trouble, 0.0, why="no")
    assert Condition("open", FIRST_PAUSE, "no") == breaker.condition(0.0)


def test_the_pause_that_a_remote_asks_for_is_kept() -> None:
    breaker = Breaker()
    fail(breaker, "throttled", 100.0, why="slow down", retry_after=37.0)
    assert Condition("held", 137.0, "slow down") == breaker.condition(100.0)
    assert not breaker.ready(136.9)
    assert breaker.ready(137.0)


def test_a_poll_that_is_throttled_holds_submits_too() -> None:
    breaker = Breaker()
    breaker.throttled(0.0, why="slow down", retry_after=5.0)
    assert Condition("held", 5.0, "slow down") == breaker.condition(0.0)


def test_many_that_are_throttled_at_once_are_one_word() -> None:
    breaker = Breaker()
    for _ in range(8):
        breaker.throttled(0.0, why="slow down")
    assert Condition("held", HELD_PAUSE, "slow down") == breaker.condition(0.0)


def test_a_short_answer_does_not_shorten_a_longer_pause() -> None:
    breaker = Breaker()
    breaker.throttled(0.0, why="long", retry_after=60.0)
    breaker.throttled(1.0, why="short", retry_after=1.0)
    assert not breaker.ready(59.0)


def test_throttling_never_opens_it() -> None:
    breaker = Breaker()
    for second in range(20):
        fail(breaker, "throttled", float(second))
    assert "held" == breaker.condition(19.0).state


def test_a_model_that_is_not_known_there_leaves_the_others_alone() -> None:
    breaker = Breaker()
    fail(breaker, "model", 0.0, why="no such model", model="a/b")
    assert not breaker.ready(1.0, "a/b")
    assert breaker.ready(1.0, "c/d")
    assert Condition("held", MODEL_PAUSE, "no such model") == breaker.condition(1.0, "a/b")
    assert {"a/b": "no such model"} == breaker.unknown(1.0)
    assert {} == breaker.unknown(MODEL_PAUSE)
    assert breaker.ready(MODEL_PAUSE, "a/b")


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*TROUBLES, "accepted", "answered", "begin", "ended", "poll"]), st.floats(0, 1000)
        ),
        max_size=40,
    )
)
def test_it_is_never_shut_for_good(events: list[tuple[str, float]]) -> None:
    breaker, now, open_tokens = Breaker(), 0.0, []
    for event, seconds in events:
        now += seconds
        if event == "begin" and breaker.ready(now):
            open_tokens.append(breaker.begin())
        elif event == "answered":
            breaker.answered()
        elif event == "poll":
            breaker.throttled(now, why="slow down")
        elif open_tokens and event != "begin":
            token = open_tokens.pop(0)
            if event in TROUBLES:
                breaker.failed(token, event, now, why=event, model="a/b")  # type: ignore[arg-type]
            elif event == "accepted":
                breaker.accepted(token)
            breaker.ended(token)
    for token in open_tokens:  # whatever is on its way comes to an end
        breaker.ended(token)
    assert breaker.ready(now + max(LONGEST_PAUSE, MODEL_PAUSE), "a/b")
