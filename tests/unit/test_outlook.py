"""What several workers tell of one remote, and what a request costs there."""

from pathlib import Path

import msgspec
import pytest

from rushes.catalog.load import load_model
from rushes.catalog.model import Model
from rushes.catalog.remotes import RemoteTable
from rushes.errors import ManifestError
from rushes.requests.ids import WorkerId
from rushes.requests.record import RemoteState, WorkerRecord
from rushes.service.outlook import costs_of, merged

M = "me/mine"
FAL = RemoteState("fal", "fal", (M,), 8)
HELD = msgspec.structs.replace(FAL, state="held", until=1000.0, why="429", capacity=4)
OPEN = msgspec.structs.replace(FAL, state="open", until=1000.0, why="it does not answer", capacity=2)


def workers(*states: RemoteState) -> list[WorkerRecord]:
    return [
        WorkerRecord(WorkerId(f"w{n}"), "here", n, 0, (), "draft", "", remotes=(state,))
        for n, state in enumerate(states)
    ]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((FAL, FAL), ("ready", 16)),
        ((FAL, HELD), ("ready", 8)),
        ((HELD, FAL), ("ready", 8)),
        ((OPEN, HELD, OPEN), ("held", 4)),
        ((OPEN, OPEN, FAL, HELD, FAL), ("ready", 16)),
    ],
)
def test_places_at_a_breaker_that_is_open_are_none(
    states: tuple[RemoteState, ...], expected: tuple[str, int]
) -> None:
    (state,) = merged(workers(*states))
    assert expected == (state.state, state.capacity)


def test_a_pause_that_is_over_is_none() -> None:
    (state,) = merged(workers(FAL, HELD), now=1000.0)
    assert ("ready", 12, "") == (state.state, state.capacity, state.why)


def test_of_one_model_those_count_that_have_it() -> None:
    other = msgspec.structs.replace(FAL, models=("me/other",), capacity=5)
    assert [("open", 2, (M,))] == [(s.state, s.capacity, s.models) for s in merged(workers(OPEN, other), M)]
    assert [("ready", 5)] == [(s.state, s.capacity) for s in merged(workers(OPEN, other), "me/other")]
    assert (M, "me/other") == merged(workers(FAL, other))[0].models


def test_a_model_is_unknown_where_nobody_is_told_better() -> None:
    unknown = msgspec.structs.replace(FAL, unknown={M: "no such model"})
    assert {M: "no such model"} == merged(workers(unknown, unknown))[0].unknown
    assert {} == merged(workers(unknown, FAL))[0].unknown == merged(workers(FAL, unknown))[0].unknown
    elsewhere = msgspec.structs.replace(FAL, models=("me/other",))
    assert {M: "no such model"} == merged(workers(elsewhere, unknown))[0].unknown


MANIFEST = """
name = "M"
output = "image"
[[inputs]]
name = "size"
title = "Size"
type = "string"
role = "resolution"
default = "64x64"
enum = ["64x64"]
[engines.fal]
model = "fal-ai/mine"
price_usd = 0.5
"""


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = tmp_path / "me" / "mine"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(MANIFEST)
    (folder / "sample.json").write_text("{}")
    return load_model(folder, tmp_path)


def test_what_it_costs(model: Model) -> None:
    box = RemoteState("box", "openai-video", (), 1)
    assert {"fal": 0.5, "box": None} == costs_of(model, {"size": "64x64"}, (FAL, box))


def test_a_table_that_cannot_be_read_has_no_price_and_spoils_no_other(model: Model) -> None:
    def table_of(_: Model, kind: str) -> RemoteTable:
        if kind == "fal":
            raise ManifestError("model.toml", "engines.fal", "is wrong")
        return RemoteTable(kind, "x", price_usd=0.25)

    box = RemoteState("box", "openai-video", (), 1)
    assert {"fal": None, "box": 0.25} == costs_of(model, {}, (FAL, box), table_of)


def test_an_input_that_does_not_fit_the_model_any_more(model: Model) -> None:
    with pytest.raises(ValueError, match="portrait"):
        costs_of(model, {"size": "portrait"}, (FAL,))
