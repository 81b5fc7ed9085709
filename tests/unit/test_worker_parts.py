"""What a worker decides without any process: messages, warm models, pauses, lines of the log."""

import json
from pathlib import Path
from typing import Any

import pytest

from rushes import log
from rushes.catalog.model import Model
from rushes.engines.base import Job, Produced
from rushes.requests.record import Progress
from rushes.worker.messages import (
    Abort,
    Done,
    Failed,
    Message,
    Order,
    Ready,
    Run,
    Step,
    Unready,
    line,
    read_message,
    read_order,
)
from rushes.worker.serving import LONGEST_PAUSE, pause_after
from rushes.worker.warm import warm_models


def model(id_: str, *files: str, options: dict[str, Any] | None = None) -> Model:
    weights = [{"file": file, "folder": "diffusion_models"} for file in files]
    table = {"comfyui": {"weights": weights}} if options is None else options
    return Model(id_, id_, "", (), "image", (), (), Path("/models"), graph="graph.json", options=table)


# -- messages ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "message",
    [
        Ready("comfyui", lanes=2, aborts=True),
        Unready("No GPU."),
        Step(7, Progress(0.5, "sampling", 2, 4, 1.5), Path("/scratch/r/preview.jpg")),
        Step(7, Progress()),
        Done(7, [Produced(Path("/scratch/r/out/1.mp4"), "video", "video/mp4", 64, 48, 81, 16.0)]),
        Failed(7, "gone", "Gone.", node="6", retryable=True, began=False, replace=True),
    ],
)
def test_what_a_child_says_arrives_as_it_was(message: Message) -> None:
    assert message == read_message(line(message))
    assert 1 == line(message).count(b"\n")


def test_halves_of_characters_are_sent_as_question_marks() -> None:
    sent = Failed(7, "odd", "a \ud83d \udc80", node="\udc80", retryable=True)
    assert Failed(7, "odd", "a ? ?", node="?", retryable=True) == read_message(line(sent))
    file = Produced(Path("/scratch/\udc80.png"), "image", "image/png", 1, 1)
    assert [Path("/scratch/?.png")] == [one.path for one in _done(read_message(line(Done(7, [file]))))]


def _done(message: Message) -> list[Produced]:
    assert isinstance(message, Done)
    return message.produced


@pytest.mark.parametrize(
    "order",
    [
        Run(
            7,
            Job(
                "r", 2, model("a", "w"), {"prompt": "a\nb"}, {"seed": 1}, {"image": Path("/i.png")}, Path("/o")
            ),
        ),
        Abort(7),
    ],
)
def test_what_a_worker_says_arrives_as_it_was(order: Order) -> None:
    assert order == read_order(line(order))
    assert 1 == line(order).count(b"\n")


# -- warm models ------------------------------------------------------------------------------------------
def test_a_model_is_warm_whose_weights_are_all_loaded() -> None:
    last = model("last", "high", "low", "vae")
    others = [model("part", "vae", "low"), model("more", "vae", "clip"), model("same", "high", "low", "vae")]
    assert ("last", "part", "same") == warm_models(last, [*others, last])


def test_a_model_without_weights_is_warm_for_itself_alone() -> None:
    bare, none = model("bare"), model("none", options={})
    full = model("full", "vae")
    assert ("bare",) == warm_models(bare, [bare, none, full])
    assert ("full",) == warm_models(full, [bare, none, full])
    assert () == warm_models(None, [bare, none, full])


def test_the_variant_decides_which_weights_those_are() -> None:
    table = {
        "weights": [{"file": "bf16", "folder": "diffusion_models"}],
        "variants": {"small": {"weights": [{"file": "fp8", "folder": "diffusion_models"}]}},
    }
    last, other = model("last", options={"comfyui": table}), model("other", "fp8")
    assert ("last",) == warm_models(last, [other])
    assert ("last", "other") == warm_models(last, [other], ["small"])


def test_a_manifest_that_cannot_be_read_is_warm_for_itself_alone() -> None:
    broken = model("broken", options={"comfyui": {"wieghts": []}})
    assert ("broken",) == warm_models(broken, [broken, model("full", "vae")])
    assert ("full",) == warm_models(model("full", "vae"), [broken])


# -- pauses -----------------------------------------------------------------------------------------------
def test_pauses_grow_up_to_a_bound() -> None:
    assert [0.0, 0.0, 1.0, 2.0, 4.0] == [pause_after(times) for times in (-5, 0, 1, 2, 3)]
    assert LONGEST_PAUSE == pause_after(10_000)


# -- the log ----------------------------------------------------------------------------------------------
class _Mute:
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("half a \ud83d", {"value": "half a \ud83d"}),
        (1 << 80, {"value": 1 << 80}),
        ({"a": Path("/x"), "b": 1 << 80}, {"value": {"a": "/x", "b": 1 << 80}}),
        (_Mute(), {"unloggable": "RuntimeError"}),
        ([1, _Mute(), "\udc80"], {"unloggable": "RuntimeError"}),
    ],
)
def test_the_log_takes_everything(capfd, value, written) -> None:
    log.event("odd", value=value)
    (text,) = capfd.readouterr().err.splitlines()
    record = json.loads(text)
    del record["time"]
    assert {"event": "odd"} | written == record
