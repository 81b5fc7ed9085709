"""Refused, failed, out of memory, interrupted: one clear error each, for users, and the rest for the log."""

import re
from pathlib import Path
from typing import Any

import pytest

from rushes.engines.comfyui.engine import ComfyUIEngine
from rushes.errors import EngineError
from support.comfyui import Comfy, Graph
from support.comfyui_models import Models, Work, field, make_job, slow_model
from support.comfyui_transcripts import empty, node, save
from support.comfyui_wire import Wire
from support.server import eventually


def says_nothing_of_the_server(error: EngineError, comfy: Comfy) -> None:
    said = f"{error.message} {error.node}"
    assert str(comfy.port) not in said
    assert "127.0.0.1" not in said
    assert "Traceback" not in said
    assert not re.search(r"(^|\s)/\w", said), said
    assert not re.search(r"\.py\b.*line \d", said), said


def works(engine: ComfyUIEngine, models: Models, folder: Path) -> None:
    """The next request is done."""
    model = models.add({"1": empty(0x0A0B0C), "2": save("1")}, id="test/next")
    assert 1 == len(Work(engine, make_job(model, folder)).made())


@pytest.mark.parametrize(
    ("value", "told"),
    [({"size": 99999}, ["size", "16384"]), ({"way": "bogus"}, ["way", "bogus", "bicubic"])],
)
def test_a_refused_value_is_named_by_its_public_field(
    comfy: Comfy,
    engine: ComfyUIEngine,
    models: Models,
    tmp_path: Path,
    value: dict[str, Any],
    told: list[str],
) -> None:
    scale = {"upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"}
    graph: Graph = {"1": empty(), "2": node("ImageScale", image=["1", 0], **scale), "3": save("2")}
    bindings = {"2.width": "input['size']", "2.upscale_method": "input['way']"}
    model = models.add(graph, field("size", 64), field("way", "area"), bindings=bindings)
    error = Work(engine, make_job(model, tmp_path, **value)).error()
    assert ("value_refused", False) == (error.reason, error.retryable)
    for word in told:
        assert word in error.message
    says_nothing_of_the_server(error, comfy)
    works(engine, models, tmp_path)


def test_a_node_that_the_server_does_not_have_is_named(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    graph: Graph = {"1": empty(), "2": node("NopeSampler", image=["1", 0]), "3": save("2")}
    error = Work(engine, make_job(models.add(graph), tmp_path)).error()
    assert ("node_missing", False) == (error.reason, error.retryable)
    assert "NopeSampler" in error.message
    says_nothing_of_the_server(error, comfy)


def test_partial_acceptance_is_a_failure_and_the_valid_part_is_not_left_running(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """ComfyUI answers 200, lists the errors of one output, and runs the other."""
    graph: Graph = {
        "1": empty(),
        "2": node("RushesTestSleep", image=["1", 0], seconds=60.0, steps=3000),
        "3": save("2"),
        "4": empty(width=99999),
        "5": save("4"),
    }
    model = models.add(graph, field("4_width", 64))
    error = Work(engine, make_job(model, tmp_path, **{"4_width": 99999})).error()
    assert ("value_refused", False) == (error.reason, error.retryable)
    assert "4_width" in error.message
    assert comfy.idle()
    works(engine, models, tmp_path)


def test_partial_acceptance_behind_another_prompt_leaves_that_one_alone(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    slow = node("RushesTestSleep", image=["1", 0], seconds=1.0, steps=20)
    other = comfy.queue_prompt({"1": empty(3), "2": slow, "3": save("2")})
    eventually(comfy.running)
    graph: Graph = {"1": empty(), "3": save("1"), "4": empty(width=99999), "5": save("4")}
    error = Work(engine, make_job(models.add(graph, field("4_width", 99999)), tmp_path)).error()
    assert "value_refused" == error.reason
    assert "success" == comfy.entry(other)["status"]["status_str"]
    assert comfy.idle()


def test_an_execution_error_has_title_type_and_message_and_the_log_has_the_rest(
    comfy: Comfy,
    engine: ComfyUIEngine,
    models: Models,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fail = {**node("RushesTestFail", image=["1", 0], reason="no luck"), "_meta": {"title": "High noise"}}
    model = models.add({"1": empty(), "2": fail, "3": save("2")})
    error = Work(engine, make_job(model, tmp_path)).error()
    assert ("node_failed", False) == (error.reason, error.retryable)
    for word in ("High noise", "ValueError", "no luck"):
        assert word in error.message
    assert "RushesTestFail" in (error.node or "")
    says_nothing_of_the_server(error, comfy)
    log = capfd.readouterr().err
    assert "Traceback" in log or "traceback" in log
    assert "behaviour.py" in log
    works(engine, models, tmp_path)


def out_of_memory(models: Models, times: int, key: str) -> Any:
    graph: Graph = {
        "1": empty(),
        "2": node("RushesTestOutOfMemory", image=["1", 0], times=times, key=key),
        "3": save("2"),
    }
    return models.add(graph)


def test_out_of_memory_frees_the_models_and_is_tried_once_more(
    comfy: Comfy, wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(wire.url)
    (made,) = Work(engine, make_job(out_of_memory(models, 1, tmp_path.name), tmp_path)).made()
    assert 64 == made.width
    assert 1 == wire.requests.count("POST /free")
    assert 2 == wire.requests.count("POST /prompt")


def test_out_of_memory_twice_fails_cleanly_and_the_next_request_works(
    comfy: Comfy, wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(wire.url)
    error = Work(engine, make_job(out_of_memory(models, 99, tmp_path.name), tmp_path)).error()
    assert ("out_of_memory", False, False) == (error.reason, error.retryable, error.replace)
    assert "memory" in error.message
    assert 2 == wire.requests.count("POST /prompt")
    says_nothing_of_the_server(error, comfy)
    works(engine, models, tmp_path)


def test_interrupted_by_somebody_else_is_not_failed(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """In the history it has the status of a failure; another attempt may well succeed."""
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 60.0, "2_steps": 3000}))
    work.stepping()
    comfy.post("/interrupt", {})
    error = work.error()
    assert ("interrupted", True) == (error.reason, error.retryable)
    works(engine, models, tmp_path)


def test_a_waiting_prompt_that_somebody_deletes_never_reads_as_done(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """No history, no message, nothing in the queue: another attempt is due."""
    slow = node("RushesTestSleep", image=["1", 0], seconds=20.0, steps=1000)
    comfy.queue_prompt({"1": empty(3), "2": slow, "3": save("2")})
    work = Work(engine, make_job(slow_model(models), tmp_path))
    eventually(comfy.pending)
    comfy.post("/queue", {"clear": True})
    error = work.error()
    assert ("comfyui_lost", True) == (error.reason, error.retryable)
    comfy.post("/interrupt", {})


def test_a_history_that_somebody_deletes_never_reads_as_done(
    comfy: Comfy, wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    """The prompt ends, and its history is deleted before the engine can read it."""
    engine = make_engine(wire.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 0.5, "2_steps": 10})).stepping()
    wire.freeze()
    eventually(comfy.history)
    comfy.post("/history", {"clear": True})
    wire.thaw()
    error = work.error()
    assert ("comfyui_lost", True) == (error.reason, error.retryable)


def test_a_workflow_that_cannot_be_used_says_nothing_of_the_disk(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    model = models.add({"1": empty(), "2": save("1")})
    (model.folder / "graph.json").write_text("{")
    error = Work(engine, make_job(model, tmp_path)).error()
    assert ("workflow_unusable", False) == (error.reason, error.retryable)
    says_nothing_of_the_server(error, comfy)
