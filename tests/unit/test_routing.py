"""Which engine a request goes to, and why."""

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.catalog.routes import Route, is_local
from rushes.catalog.routing import Case, Outlook, Verdict, decide, may_leave
from rushes.requests.record import RemoteState

FAL = RemoteState(name="fal", kind="fal", models=("me/mine",), capacity=8)
BOX = RemoteState(name="box", kind="openai-video", models=("me/mine",), capacity=2)
HELD = msgspec.structs.replace(FAL, state="held", until=1_000_000_000.0, why="429, asked for 30 s")
OPEN = msgspec.structs.replace(FAL, state="open", until=1_000_000_060.0, why="5 failures: 503")
FULL = msgspec.structs.replace(FAL, capacity=0)
LOCAL, DRAFT = Route("local"), Route("draft")
OVER = Route("fal", queue_eta_above=60)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def outlook(**values: Any) -> Outlook:
    usual: dict[str, Any] = {
        "engines": ("comfyui",),
        "slots": 2,
        "draft_slots": 0,
        "waiting": 3,
        "seconds": 40.0,
        "busy": 70.0,
        "remotes": (FAL,),
    }
    return Outlook(**(usual | values))


def case(**values: Any) -> Case:
    usual: dict[str, Any] = {
        "account": "film-1",
        "position": 4,
        "waited": 0.0,
        "minute": 12 * 60,
        "costs": {"fal": 0.1, "box": 0.0},
        "budget_left": None,
        "key_budget_left": None,
    }
    return Case(**(usual | values))


NOBODY = outlook(engines=(), slots=0, waiting=0, seconds=None, busy=0.0)


def taker(verdicts: list[Verdict]) -> str | None:
    took = [one.remote or one.engine for one in verdicts if one.takes]
    assert len(took) <= 1
    return took[0] if took else None


# -- the wait -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "position", "waited", "idle_for", "eta"),
    [
        ({}, 1, 0.0, 0.0, 35.0),
        ({}, 4, 0.0, 0.0, 95.0),
        ({}, 4, 500.0, 0.0, 95.0),
        ({"busy": 0.0, "free": 2}, 1, 5.0, 5.0, 0.0),
        ({"free": 1}, 1, 0.0, 0.0, 0.0),
        ({"free": 1}, 2, 0.0, 0.0, 55.0),
        ({"seconds": None}, 4, 12.0, 0.0, 12.0),
        ({"seconds": None, "free": 1}, 1, 2.0, 2.0, 0.0),
        # it has waited, but not for the slots: they are free since a moment ago
        ({"free": 1}, 1, 500.0, 1.0, 0.0),
        ({"seconds": None, "free": 1}, 1, 500.0, 0.0, 0.0),
        # a slot that has nothing to do, and yet does not take it
        ({"seconds": None, "free": 1}, 1, 12.0, 12.0, 12.0),
        ({"free": 1}, 1, 12.0, 12.0, 12.0),
        ({"free": 1}, 2, 60.0, 60.0, 60.0),
        ({"free": 1, "seconds": None}, 2, 60.0, 12.0, 60.0),
        ({"slots": 0}, 1, 12.0, 12.0, None),
    ],
)
def test_the_wait(
    values: dict[str, Any], position: int, waited: float, idle_for: float, eta: float | None
) -> None:
    assert eta == outlook(**values).eta(position, waited, idle_for)


# -- the order ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("routes", "at_hand", "taken"),
    [
        # a local engine that is there keeps the request where nothing says otherwise
        ((LOCAL, Route("fal")), outlook(), "local"),
        ((Route("comfyui"), Route("fal")), outlook(), "comfyui"),
        ((Route("wan"), Route("comfyui"), Route("fal")), outlook(), "comfyui"),
        ((Route("comfyui"), LOCAL), outlook(remotes=()), "comfyui"),
        # one that is not leaves it to the next, however long that limit is
        ((LOCAL, Route("fal")), NOBODY, "fal"),
        ((LOCAL, Route("fal", queue_eta_above=1e9)), NOBODY, "fal"),
        ((Route("wan"), Route("fal")), outlook(), "fal"),
        ((Route("fal"),), outlook(), "fal"),
        ((Route("fal", queue_eta_above=60),), outlook(seconds=0.0, busy=0.0), "fal"),
        # the wait
        ((LOCAL, OVER), outlook(), "fal"),
        ((LOCAL, OVER), outlook(busy=0.0), "local"),
        ((LOCAL, OVER), outlook(free=4), "local"),
        # remotes in their order, by name and by kind
        ((Route("box"), Route("fal")), outlook(remotes=(FAL, BOX)), "box"),
        ((Route("openai-video"), Route("fal")), outlook(remotes=(FAL, BOX)), "box"),
        ((LOCAL, Route("box"), OVER), outlook(remotes=(FAL, BOX)), "fal"),
        ((Route("runcomfy"), Route("fal")), outlook(), "fal"),
        # nobody
        ((LOCAL, Route("runcomfy")), NOBODY, None),
        ((LOCAL,), NOBODY, None),
        # draft pictures
        ((LOCAL, DRAFT), outlook(engines=(), slots=0, draft_slots=3), "draft"),
        ((LOCAL, DRAFT), outlook(draft_slots=3), "local"),
        ((DRAFT, LOCAL), outlook(draft_slots=3), "draft"),
        ((LOCAL, DRAFT), NOBODY, None),
        ((DRAFT, Route("fal")), outlook(draft_slots=3), "draft"),
        ((DRAFT, Route("fal")), NOBODY, "fal"),
    ],
)
def test_who_takes_it(routes: tuple[Route, ...], at_hand: Outlook, taken: str | None) -> None:
    verdicts = decide(routes, at_hand, case())
    assert [route.engine for route in routes] == [one.engine for one in verdicts]
    assert taken == taker(verdicts)


@pytest.mark.parametrize(("waited", "taken"), [(59.0, "local"), (60.0, "local"), (60.5, "fal")])
def test_without_a_known_pace_the_time_waited_counts(waited: float, taken: str) -> None:
    assert taken == taker(decide((LOCAL, OVER), outlook(seconds=None), case(waited=waited)))
    assert taken.replace("local", "draft") == taker(
        decide((DRAFT, OVER), outlook(engines=(), slots=0, draft_slots=1), case(waited=waited))
    )


def test_who_waits_behind_another_waits_no_shorter() -> None:
    """So what the last one in the line may not, none may."""
    for values in ({}, {"free": 2}, {"seconds": None, "free": 1}):
        waits = [outlook(**values).eta(position, 40.0, 30.0) or 0.0 for position in range(1, 9)]
        assert sorted(waits) == waits


@pytest.mark.parametrize(
    ("routes", "at_hand", "may"),
    [
        ((LOCAL, Route("fal")), outlook(), False),
        ((LOCAL, Route("fal")), NOBODY, True),
        ((LOCAL, OVER), outlook(), True),
        ((LOCAL, OVER), outlook(busy=0.0, waiting=2), False),
        # nobody knows how long it takes, or why slots stay idle: it depends on how long it has waited
        ((LOCAL, OVER), outlook(seconds=None, waiting=1), True),
        ((LOCAL, OVER), outlook(free=2, waiting=1), True),
        ((LOCAL, Route("box", queue_eta_above=1)), outlook(), False),
        ((LOCAL, OVER), outlook(model="me/other"), False),
        ((DRAFT, OVER), outlook(engines=(), slots=0, draft_slots=1), True),
        ((LOCAL, DRAFT), outlook(), False),
    ],
)
def test_whether_any_may_leave(routes: tuple[Route, ...], at_hand: Outlook, may: bool) -> None:
    assert may is may_leave(routes, at_hand)


def test_a_route_without_a_limit_waits_for_nobody_but_those_before_it() -> None:
    routes = (Route("comfyui"), Route("fal"), Route("box"))
    full = outlook(engines=(), slots=0, remotes=(FULL, BOX))
    assert "box" == taker(decide(routes, full, case()))


# -- conditions ---------------------------------------------------------------------------------------------
EVERYTHING = (
    "not for the account web, only for film-*; it is 00:00, and it takes from 08:00 to 18:00; "
    "fal is not tried until 01:47:40: 5 failures: 503; its price is not known at fal, and max_cost_usd is $0.10; "
    "the day's budget is spent"
)
ALL = Route("fal", queue_eta_above=60, accounts=("film-*",), max_cost_usd=0.1, hours="08:00-18:00")


@pytest.mark.parametrize(
    ("route", "changes", "at_hand", "why"),
    [
        (
            Route("fal", accounts=("film-*",)),
            {"account": "web"},
            {},
            "not for the account web, only for film-*",
        ),
        (
            Route("fal", hours="08:00-18:00"),
            {"minute": 18 * 60},
            {},
            "it is 18:00, and it takes from 08:00 to 18:00",
        ),
        (
            Route("fal", hours="20:00-06:00"),
            {"minute": 6 * 60 + 5},
            {},
            "it is 06:05, and it takes from 20:00 to 06:00",
        ),
        (
            Route("fal", max_cost_usd=0.05),
            {},
            {},
            "it costs about $0.10 at fal, and max_cost_usd is $0.05",
        ),
        (
            Route("fal", max_cost_usd=0.05),
            {"costs": {"fal": None}},
            {},
            "its price is not known at fal, and max_cost_usd is $0.05",
        ),
        (
            Route("fal", max_cost_usd=0.005),
            {"costs": {}},
            {},
            "its price is not known at fal, and max_cost_usd is $0.0050",
        ),
        (Route("fal"), {"budget_left": 0.0}, {}, "the day's budget is spent"),
        (Route("fal"), {"key_budget_left": -0.5}, {}, "the key's budget is spent"),
        (
            Route("fal"),
            {"budget_left": 0.04, "key_budget_left": 9.0},
            {},
            "it costs about $0.10 at fal, and the day's budget has $0.04 left",
        ),
        (
            Route("fal"),
            {"key_budget_left": 0.04},
            {},
            "it costs about $0.10 at fal, and the key's budget has $0.04 left",
        ),
        (
            Route("fal"),
            {},
            {"remotes": (HELD,)},
            "fal asked for a pause until 01:46:40: 429, asked for 30 s",
        ),
        (Route("fal"), {}, {"remotes": (OPEN,)}, "fal is not tried until 01:47:40: 5 failures: 503"),
        (
            Route("fal"),
            {},
            {"remotes": (msgspec.structs.replace(OPEN, until=None, why=""),)},
            "fal is not tried",
        ),
        (Route("fal"), {}, {"remotes": (FULL,)}, "fal has as many as it may"),
        (Route("fal"), {}, {"remotes": ()}, "no worker has fal for the model"),
        (Route("fal"), {}, {"model": "me/other"}, "no worker has fal for the model"),
        (
            ALL,
            {"account": "web", "minute": 0, "costs": {}, "budget_left": 0.0},
            {"remotes": (OPEN,)},
            EVERYTHING,
        ),
    ],
)
def test_a_condition_that_does_not_hold(
    route: Route, changes: dict[str, Any], at_hand: dict[str, Any], why: str
) -> None:
    nobody = msgspec.structs.replace(NOBODY, **at_hand)
    (verdict,) = decide((route,), nobody, case(**changes))
    assert (False, why) == (verdict.takes, verdict.why)


@pytest.mark.parametrize(
    ("route", "changes"),
    [
        (Route("fal", accounts=("web", "film-?")), {}),
        (Route("fal", hours="08:00-18:00"), {"minute": 8 * 60}),
        (Route("fal", hours="20:00-06:00"), {"minute": 0}),
        (Route("fal", max_cost_usd=0.1), {}),
        (Route("fal"), {"costs": {}}),
        (Route("fal"), {"budget_left": 0.1, "key_budget_left": 0.1}),
        (ALL, {"budget_left": 0.2, "key_budget_left": 0.2}),
    ],
)
def test_a_condition_that_holds(route: Route, changes: dict[str, Any]) -> None:
    assert "fal" == taker(decide((route,), NOBODY, case(**changes)))


def test_all_conditions_together() -> None:
    assert "fal" == taker(decide((LOCAL, ALL), outlook(), case()))
    for changes in ({"account": "web"}, {"minute": 0}, {"costs": {"fal": 0.11}}, {"position": 1}):
        assert "local" == taker(decide((LOCAL, ALL), outlook(), case(**changes)))


@pytest.mark.parametrize(
    ("cost", "left", "takes"),
    [(0.1, 0.1, True), (0.1 + 0.2, 0.3, True), (0.31, 0.3, False), (None, 0.01, True), (None, 0.0, False)],
)
def test_budgets(cost: float | None, left: float, takes: bool) -> None:
    for budget in ("budget_left", "key_budget_left"):
        verdicts = decide((Route("fal"),), NOBODY, case(costs={"fal": cost}, **{budget: left}))
        assert takes is verdicts[0].takes


# -- several remotes of one kind ----------------------------------------------------------------------------
def test_of_several_remotes_of_a_kind_the_first_that_can_takes_it() -> None:
    other = msgspec.structs.replace(FAL, name="fal-2")
    for first in (HELD, OPEN, FULL):
        one = msgspec.structs.replace(first, name="fal-1")
        verdicts = decide((Route("fal"),), msgspec.structs.replace(NOBODY, remotes=(one, other)), case())
        assert "fal-2" == taker(verdicts)
    both = msgspec.structs.replace(NOBODY, remotes=(msgspec.structs.replace(FAL, name="fal-1"), other))
    assert "fal-1" == taker(decide((Route("fal"),), both, case()))
    dear = Route("fal", max_cost_usd=0.2)
    assert "fal-2" == taker(decide((dear,), both, case(costs={"fal-1": 0.3, "fal-2": 0.2})))


def test_where_none_of_a_kind_can_each_says_why() -> None:
    one, two = (msgspec.structs.replace(FAL, name=f"fal-{n}", capacity=0) for n in (1, 2))
    (verdict,) = decide((Route("fal"),), msgspec.structs.replace(NOBODY, remotes=(one, two)), case())
    assert (None, "fal-1 has as many as it may; fal-2 has as many as it may") == (verdict.remote, verdict.why)


# -- the words ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("routes", "at_hand", "changes", "whys"),
    [
        (
            (LOCAL, OVER, Route("box")),
            outlook(remotes=(FAL, BOX)),
            {},
            [
                "2 slots of comfyui, 3 waiting, about 95 s",
                "about 95 s, and it takes over above 60 s; about $0.10",
                "fal takes it",
            ],
        ),
        (
            (LOCAL, OVER),
            outlook(slots=1, busy=4.0, waiting=0),
            {"position": 1},
            ["1 slot of comfyui, 0 waiting, about 4 s", "about 4 s; it takes over above 60 s"],
        ),
        (
            (LOCAL, Route("fal")),
            outlook(engines=("comfyui", "wan"), free=1),
            {"position": 1},
            ["2 slots of comfyui and wan, free now", "only where local cannot take it"],
        ),
        (
            (Route("comfyui"), Route("wan"), Route("fal")),
            outlook(engines=("comfyui", "wan")),
            {},
            [
                "2 slots of comfyui, 3 waiting, about 95 s",
                "2 slots of wan, 3 waiting, about 95 s; comfyui comes first",
                "only where comfyui or wan cannot take it",
            ],
        ),
        (
            (LOCAL, OVER),
            outlook(seconds=None),
            {"waited": 7.0},
            [
                "2 slots of comfyui, 3 waiting, nothing tells how long it takes yet",
                "has waited 7 s; it takes over above 60 s",
            ],
        ),
        (
            (LOCAL, OVER),
            outlook(free=2),
            {"position": 1, "idle_for": 61.0},
            [
                "2 slots of comfyui, free now",
                "a slot has been free for 61 s and has not taken it, and it takes over above 60 s; about $0.10",
            ],
        ),
        (
            (LOCAL, Route("fal", queue_eta_above=600)),
            outlook(seconds=1000.0),
            {"costs": {}},
            [
                "2 slots of comfyui, 3 waiting, about 26 min",
                "about 26 min, and it takes over above 10 min; its price is not known",
            ],
        ),
        (
            (LOCAL, Route("fal")),
            NOBODY,
            {"costs": {"fal": 0.0}},
            [
                "no live slot of a local engine serves the model",
                "no local engine before it can take it; about $0.00",
            ],
        ),
        (
            (Route("wan"), DRAFT),
            outlook(engines=(), slots=0, draft_slots=1, seconds=90000.0),
            {},
            ["no live slot of wan serves the model", "1 slot for draft pictures"],
        ),
        ((DRAFT,), NOBODY, {}, ["no live slot for draft pictures"]),
        (
            (LOCAL, Route("fal", queue_eta_above=1)),
            outlook(slots=1, seconds=9000.0),
            {"costs": {"fal": 0.0024}},
            [
                "1 slot of comfyui, 3 waiting, about 8 h",
                "about 8 h, and it takes over above 1 s; about $0.0024",
            ],
        ),
    ],
)
def test_why(routes: tuple[Route, ...], at_hand: Outlook, changes: dict[str, Any], whys: list[str]) -> None:
    assert whys == [one.why for one in decide(routes, at_hand, case(**changes))]


# -- always -------------------------------------------------------------------------------------------------
NAMES = ("local", "draft", "comfyui", "wan", "fal", "box", "openai-video", "runcomfy")
ROUTES = st.builds(
    Route,
    engine=st.sampled_from(NAMES),
    queue_eta_above=st.none() | st.floats(0, 1000),
    accounts=st.sampled_from([(), ("film-*",), ("web",)]),
    max_cost_usd=st.none() | st.floats(0, 1),
    hours=st.sampled_from(["", "08:00-18:00", "20:00-06:00"]),
)
STATES = st.sampled_from(["ready", "held", "open"])
REMOTES = st.tuples(
    st.builds(
        lambda state, room: msgspec.structs.replace(FAL, state=state, capacity=room), STATES, st.integers(0, 3)
    ),
    st.builds(
        lambda state, room: msgspec.structs.replace(BOX, state=state, capacity=room), STATES, st.integers(0, 3)
    ),
)
OUTLOOKS = st.builds(
    Outlook,
    engines=st.sampled_from([(), ("comfyui",), ("comfyui", "wan")]),
    slots=st.integers(0, 4),
    draft_slots=st.integers(0, 4),
    waiting=st.integers(0, 50),
    seconds=st.none() | st.floats(0, 1000),
    busy=st.floats(0, 1000),
    remotes=REMOTES,
    free=st.integers(0, 4),
)
MONEY = st.none() | st.floats(-1, 5)
CASES = st.builds(
    Case,
    account=st.sampled_from(["film-1", "web"]),
    position=st.integers(1, 50),
    waited=st.floats(0, 1000),
    idle_for=st.floats(0, 1000),
    minute=st.integers(0, 1439),
    costs=st.dictionaries(st.sampled_from(["fal", "box"]), st.none() | st.floats(0, 2)),
    budget_left=MONEY,
    key_budget_left=MONEY,
)


@given(st.lists(ROUTES, max_size=5), OUTLOOKS, CASES)
def test_at_most_one_takes_it_and_never_a_remote_that_must_not(
    routes: list[Route], at_hand: Outlook, request: Case
) -> None:
    local = [route for route in routes if is_local(route.engine)]
    ordered = [*local, *(route for route in routes if not is_local(route.engine))]

    verdicts = decide(ordered, at_hand, request)

    assert [route.engine for route in ordered] == [one.engine for one in verdicts]
    assert all(one.why for one in verdicts)
    taker(verdicts)
    for one in verdicts:
        if one.takes and not is_local(one.engine):
            assert may_leave(ordered, msgspec.structs.replace(at_hand, waiting=50))
            remote = next(state for state in at_hand.remotes if state.name == one.remote)
            cost = request.costs.get(remote.name)
            assert "ready" == remote.state
            assert remote.capacity > 0
            for left in (request.budget_left, request.key_budget_left):
                assert left is None or (left > 0 and (cost or 0.0) <= left + 1e-6)
