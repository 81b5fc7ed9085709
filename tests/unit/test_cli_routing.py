"""What commands say of remotes and routes, in words."""

import time

import pytest

from rushes.api.schemas import schemas
from rushes.catalog.routes import Route
from rushes.cli.remotes import stands
from rushes.cli.routing import condition, conditions, duration
from rushes.cli.show import dollars, engine_note
from rushes.client import _wire
from rushes.requests.record import RemoteState
from rushes.service.outlook import settled

HELD = RemoteState("fal", "fal", ("a/b",), 2, "held", 1000.0, "429")


@pytest.mark.parametrize(
    ("usd", "shown"),
    [
        (0.0, "$0.00"),
        (0.1, "$0.10"),
        (12.0, "$12.00"),
        (1234.5, "$1,234.50"),
        (0.004, "$0.004"),
        (0.0625, "$0.0625"),
        (0.1 + 0.2, "$0.30"),
    ],
)
def test_amounts(usd: float, shown: str) -> None:
    assert shown == dollars(usd)


@pytest.mark.parametrize(
    ("engine", "cost", "note"),
    [
        (None, None, ""),
        ("wan", None, "made by the engine wan"),
        ("fal", 0.05, "made by the engine fal, which took $0.05"),
        ("fal", 0.0, "made by the engine fal, which took $0.00"),
        ("draft", None, "made by the draft engine: a draft for testing, not a generation"),
    ],
)
def test_what_made_the_outputs(engine: str | None, cost: float | None, note: str) -> None:
    assert note == engine_note(engine, cost)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "0 s"), (119.6, "120 s"), (121.0, "2 min"), (3600.0, "60 min")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert shown == duration(seconds)


def test_a_pause_ends_by_itself() -> None:
    assert HELD == settled(HELD, 999.0)
    assert RemoteState("fal", "fal", ("a/b",), 2) == settled(HELD, 1000.0)
    trial = RemoteState("fal", "fal", (), 2, "open", None, "a trial is under way")
    assert trial == settled(trial, 10**9)


def test_how_a_remote_stands() -> None:
    clock = time.strftime("%H:%M:%S", time.localtime(1000.0))
    assert f"held until {clock}" == condition(HELD)
    assert f"it asked for a pause until {clock}: 429" == stands(HELD)
    assert "it is not tried" == stands(RemoteState("fal", "fal", (), 2, "open"))
    assert "ready" == condition(RemoteState("fal", "fal", (), 2))


def test_the_conditions_of_a_route() -> None:
    assert "" == conditions(Route("local"))
    whole = Route("fal", 60.0, ("film-*", "noir"), 0.5, "20:00-06:00")
    assert "wait above 60 s; accounts film-*, noir; up to $0.50; 20:00-06:00" == conditions(whole)


@pytest.mark.parametrize(
    ("given", "read"), [(0.05, 0.05), (0, 0.0), (None, None), ("much", None), (True, None)]
)
def test_the_client_reads_what_the_engine_took(given: object, read: float | None) -> None:
    body = {"request_id": "x", "status": "succeeded", "engine": "fal", "engine_cost_usd": given}
    found = _wire.result(body)
    assert ("fal", read) == (found.engine, found.engine_cost_usd)


def test_the_document_has_it() -> None:
    result = schemas()["Result"]
    assert {"type": "number", "minimum": 0} == {
        name: result["properties"]["engine_cost_usd"][name] for name in ("type", "minimum")
    }
    assert "engine_cost_usd" not in result["required"]
