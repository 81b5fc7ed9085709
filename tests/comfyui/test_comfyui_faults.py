"""ComfyUI dies, restarts, hangs, is late, or the network loses what was said: never done by mistake, never twice."""

import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rushes.engines.comfyui.engine import ComfyUIEngine
from rushes.errors import EngineError
from support.comfyui import Comfy
from support.comfyui_models import Models, Work, file_field, make_job, slow_model
from support.comfyui_transcripts import node, save
from support.comfyui_wire import Wire
from support.server import eventually, free_port

LONG = {"2_seconds": 60.0, "2_steps": 3000}


def works(engine: ComfyUIEngine, models: Models, folder: Path) -> None:
    assert 1 == len(Work(engine, make_job(slow_model(models, id="test/next"), folder)).made())


def runs_of_ours(comfy: Comfy) -> int:
    """How many of our prompts have saved a file: each has a folder of its own."""
    return len({path.parent for path in (comfy.output_dir / "rushes").rglob("*.png")})


# -- at the start -------------------------------------------------------------------------------------------
def test_an_engine_waits_for_a_server_that_is_not_up_yet(
    comfy: Comfy, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    comfy.kill()
    made: list[ComfyUIEngine] = []
    starting = threading.Thread(target=lambda: made.append(make_engine(comfy.url)), daemon=True)
    starting.start()
    starting.join(0.7)
    assert [] == made
    comfy.start()
    starting.join(60)
    works(made[0], models, tmp_path)


def test_a_server_that_never_comes_up_is_an_error_that_names_it(make_engine: Any) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError) as raised:
        make_engine(url, start_seconds=0.5)
    error = raised.value
    assert (True, False, True) == (error.retryable, error.began, error.replace)
    assert url in error.message


def test_something_else_at_the_address_is_no_comfyui(make_engine: Any, tmp_path: Path) -> None:
    wire = Wire(free_port())  # takes connections and has nobody behind it
    try:
        with pytest.raises(EngineError) as raised:
            make_engine(wire.url, start_seconds=0.5)
    finally:
        wire.close()
    assert "comfyui_unreachable" == raised.value.reason


# -- in mid-run ---------------------------------------------------------------------------------------------
def test_kill_9_in_mid_run_is_a_lost_attempt_and_another_succeeds(
    comfy: Comfy, make_engine: Any, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rushes.engines.comfyui.watch.REFUSED_SECONDS", 1.0)
    engine = make_engine(comfy.url)
    model = slow_model(models)
    running = Work(engine, make_job(model, tmp_path, **LONG)).stepping()
    waiting = Work(engine, make_job(model, tmp_path, **LONG))
    eventually(comfy.pending)
    comfy.kill()
    error = running.error()
    assert ("comfyui_lost", True, True) == (error.reason, error.retryable, error.began)
    bystander = waiting.error()
    assert ("comfyui_lost", True, False) == (bystander.reason, bystander.retryable, bystander.began)
    comfy.start()
    works(make_engine(comfy.url), models, tmp_path)


def test_a_restart_in_mid_run_does_not_read_as_done(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """Queue and history are in memory: the new server knows nothing of the prompt."""
    work = Work(engine, make_job(slow_model(models), tmp_path, **LONG)).stepping()
    comfy.kill()
    comfy.start()
    error = work.error()
    assert ("comfyui_lost", True, True) == (error.reason, error.retryable, error.began)


def test_a_restart_between_the_end_of_a_prompt_and_its_history_does_not_read_as_done(
    comfy: Comfy, wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(wire.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 0.5, "2_steps": 10})).stepping()
    wire.freeze()
    eventually(comfy.history)
    comfy.kill()
    comfy.start()
    wire.thaw()
    error = work.error()
    assert ("comfyui_lost", True) == (error.reason, error.retryable)


def test_a_server_that_stands_still_for_a_while_is_waited_for(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """While it loads a large model it answers nobody."""
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 1.0, "2_steps": 20})).stepping()
    comfy.freeze()
    work._thread.join(2.5)  # longer than the engine waits before it asks
    assert not work.over
    comfy.thaw()
    assert 1 == len(work.made())


def test_a_server_that_hangs_is_given_up(
    comfy: Comfy,
    make_engine: Any,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rushes.engines.comfyui.watch.SILENCE_SECONDS", 1.0)
    monkeypatch.setattr("rushes.engines.comfyui.watch._PROBE_SECONDS", 0.5)
    monkeypatch.setattr("rushes.engines.comfyui.watch._QUIET_SECONDS", 0.5)
    engine = make_engine(comfy.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **LONG)).stepping()
    comfy.freeze()
    error = work.error(30)
    assert ("comfyui_lost", True, True) == (error.reason, error.retryable, error.replace)


def test_the_end_of_the_engine_leaves_nothing_running(
    comfy: Comfy, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(comfy.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **LONG)).stepping()
    engine.close()
    assert work.error(15).retryable
    # What still ran is a left-over now, and the next engine of this slot takes it back.
    make_engine(comfy.url)
    assert comfy.idle()


# -- what the network loses ---------------------------------------------------------------------------------
def test_a_prompt_whose_answer_is_lost_runs_once(
    comfy: Comfy, wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(wire.url)
    before = runs_of_ours(comfy)
    wire.lose_answer_to = b"POST /prompt"
    (made,) = Work(engine, make_job(slow_model(models), tmp_path)).made()
    assert 64 == made.width
    assert 1 == wire.requests.count("POST /prompt")
    assert 1 == runs_of_ours(comfy) - before


def test_a_prompt_that_never_arrived_is_sent_once_more(
    comfy: Comfy, wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(wire.url)
    wire.lose_request = b"POST /prompt"
    Work(engine, make_job(slow_model(models), tmp_path)).made()
    assert 2 == len([one for one in wire.requests if one.startswith("POST /prompt")])
    assert comfy.idle()


def test_a_download_that_breaks_off_is_begun_again(
    wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(wire.url)
    wire.cut_answer_to = b"GET /view"
    (made,) = Work(engine, make_job(slow_model(models), tmp_path)).made()
    with Image.open(made.path) as image:
        image.load()
    assert 2 == len([one for one in wire.requests if one.startswith("GET /view")])


def test_an_upload_that_breaks_off_is_begun_again(
    wire: Wire, make_engine: Any, models: Models, tmp_path: Path, png: Path
) -> None:
    engine = make_engine(wire.url)
    wire.lose_request = b"POST /upload/image"
    model = models.add({"1": node("LoadImage", image="a.png"), "2": save("1")}, file_field("1_image"))
    (made,) = Work(engine, make_job(model, tmp_path, files={"1_image": png})).made()
    assert (80, 48) == (made.width, made.height)
    assert 2 == wire.requests.count("POST /upload/image")


def test_an_output_that_is_gone_is_not_success(
    comfy: Comfy, wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    """Somebody tidied ComfyUI's output folder between the end and the copy."""
    engine = make_engine(wire.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 0.5, "2_steps": 10})).stepping()
    wire.freeze()
    (entry,) = eventually(comfy.history).values()
    for file in entry["outputs"]["3"]["images"]:
        (comfy.output_dir / file["subfolder"] / file["filename"]).unlink()
    wire.thaw()
    error = work.error()
    assert ("output_gone", True) == (error.reason, error.retryable)
