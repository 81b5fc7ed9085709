"""Two prompts in hand, progress, previews, aborts, left-overs, and a socket that is no truth."""

import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image

from rushes.engines.comfyui.engine import ComfyUIEngine
from rushes.errors import EngineError
from support.comfyui import Comfy, Graph
from support.comfyui_models import Models, Work, make_job, slow_model
from support.comfyui_transcripts import empty, node, save
from support.comfyui_wire import Wire
from support.server import eventually

LONG = {"2_seconds": 60.0, "2_steps": 3000}


def extra_of(entry: list[Any]) -> dict[str, Any]:
    return dict(entry[3]["rushes"])


def slow_prompt(seconds: float, steps: int, color: int = 3) -> Graph:
    slow = node("RushesTestSleep", image=["1", 0], seconds=seconds, steps=steps)
    return {"1": empty(color), "2": slow, "3": save("2", "others/x")}


# -- progress and previews ----------------------------------------------------------------------------------
def test_progress_grows_and_names_the_nodes_and_their_steps(
    engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 0.6, "2_steps": 6}))
    work.made()
    fractions = [progress.fraction for progress in work.told]
    assert fractions == sorted(fractions)
    assert 0.0 <= fractions[0] < 0.5
    assert 1.0 == fractions[-1]
    of_the_node = [progress for progress in work.told if progress.stage == "The slow part"]
    assert {6} == {progress.steps for progress in of_the_node if progress.steps}
    steps = [progress.step for progress in of_the_node if progress.step]
    assert steps == sorted(steps)
    assert 6 == steps[-1]


def test_the_time_left_is_known_before_the_start_of_work_seen_earlier(
    engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    model = slow_model(models)
    values = {"2_seconds": 0.7, "2_steps": 10}
    first = Work(engine, make_job(model, tmp_path, **values, **{"2_seed": 1}))
    first.made()
    second = Work(engine, make_job(model, tmp_path, **values, **{"2_seed": 2}))
    second.made()
    assert first.told[0].eta is None
    told = second.told[0].eta
    assert told is not None
    assert 0.3 < told < 10


@pytest.mark.parametrize("old", [False, True], ids=["with-metadata", "old-form"])
def test_the_latest_preview_lies_beside_the_outputs(
    comfy: Comfy,
    wire: Wire,
    make_engine: Any,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: bool,
) -> None:
    if old:  # as servers do that do not know the flag: no metadata, no prompt id
        monkeypatch.setattr("rushes.engines.comfyui.events._HELLO", '{"type": "feature_flags", "data": {}}')
    engine = make_engine(comfy.url)
    graph = slow_prompt(60.0, 600)
    graph["2"]["inputs"]["preview"] = True
    job = make_job(models.add(graph), tmp_path)
    work = Work(engine, job)
    path = job.output_dir.parent / "preview.jpg"
    eventually(path.exists, what="a preview")
    with Image.open(path) as image:
        assert ("JPEG", (8, 8)) == (image.format, image.size)
    engine.abort(job.request_id, job.attempt)
    assert "aborted" == work.error().reason


# -- two at once --------------------------------------------------------------------------------------------
def test_the_next_prompt_waits_in_comfyuis_own_queue_while_one_runs(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    assert engine.lanes >= 2
    model = slow_model(models)
    first = make_job(model, tmp_path, **{"2_seconds": 1.5, "2_steps": 30, "2_seed": 1})
    second = make_job(model, tmp_path, **{"2_seed": 2})
    works = [Work(engine, first).stepping()]
    works.append(Work(engine, second))
    (waiting,) = eventually(comfy.pending)
    (running,) = comfy.running()
    assert first.request_id == extra_of(running)["request"]
    about = extra_of(waiting)
    assert (second.request_id, 1, "test:0") == (about["request"], about["attempt"], about["slot"])
    assert waiting[3]["client_id"] == running[3]["client_id"] != ""
    assert [1, 1] == [len(work.made()) for work in works]


def test_two_attempts_of_one_request_cannot_be_mixed_up(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """ComfyUI takes a prompt id twice and then has one history entry: ours are never used twice."""
    id_ = str(uuid.uuid4())
    model = slow_model(models)
    jobs = [
        make_job(model, tmp_path, request_id=id_, attempt=n, **{"2_seconds": 0.5, "2_seed": n}) for n in (1, 2)
    ]
    works = [Work(engine, jobs[0]).stepping(), Work(engine, jobs[1])]
    eventually(comfy.pending)
    queued = [*comfy.running(), *comfy.pending()]
    assert [(id_, 1), (id_, 2)] == [(extra_of(one)["request"], extra_of(one)["attempt"]) for one in queued]
    assert 2 == len({one[1] for one in queued})
    assert id_ not in {one[1] for one in queued}
    paths = [work.made()[0].path for work in works]
    assert [job.output_dir for job in jobs] == [path.parent for path in paths]


def test_the_same_attempt_given_again_is_a_new_prompt(
    engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    model = slow_model(models)
    id_ = str(uuid.uuid4())
    for _ in range(2):
        (made,) = Work(engine, make_job(model, tmp_path, request_id=id_)).made()
        assert made.path.stat().st_size


# -- aborts -------------------------------------------------------------------------------------------------
def test_abort_of_a_running_prompt_ends_that_one_alone(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    job = make_job(slow_model(models), tmp_path, **LONG)
    work = Work(engine, job).stepping()
    behind = comfy.queue_prompt(slow_prompt(0.1, 2))
    engine.abort(job.request_id, job.attempt)
    assert "aborted" == work.error(15).reason
    assert "success" == comfy.entry(behind)["status"]["status_str"]
    assert comfy.idle()


def test_abort_of_a_waiting_prompt_leaves_the_running_one_alone(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    model = slow_model(models)
    first = Work(engine, make_job(model, tmp_path, **{"2_seconds": 1.5, "2_steps": 30})).stepping()
    job = make_job(model, tmp_path, **LONG)
    second = Work(engine, job)
    eventually(comfy.pending)
    engine.abort(job.request_id, job.attempt)
    assert "aborted" == second.error(15).reason
    assert [] == comfy.pending()
    assert 1 == len(first.made())


def test_abort_of_what_is_not_there_is_no_error(engine: ComfyUIEngine, models: Models, tmp_path: Path) -> None:
    engine.abort("unknown", 1)
    work = Work(engine, make_job(slow_model(models), tmp_path))
    engine.abort(work.job.request_id, 2)
    assert 1 == len(work.made())
    engine.abort(work.job.request_id, 1)


def test_abort_while_somebody_elses_prompt_runs_does_not_interrupt_that(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    other = comfy.queue_prompt(slow_prompt(1.0, 20))
    eventually(comfy.running)
    job = make_job(slow_model(models), tmp_path, **LONG)
    work = Work(engine, job)
    eventually(comfy.pending)
    engine.abort(job.request_id, job.attempt)
    assert "aborted" == work.error(15).reason
    assert "success" == comfy.entry(other)["status"]["status_str"]


# -- what earlier processes left ----------------------------------------------------------------------------
def test_left_overs_of_a_dead_child_are_cleaned_and_others_are_not(
    comfy: Comfy, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    def left(slot: str, seconds: float) -> str:
        rushes = {"slot": slot, "request": "r", "attempt": 1}
        return comfy.queue_prompt(slow_prompt(seconds, 50), extra_data={"rushes": rushes})

    ours = [left("test:0", 60.0)]
    eventually(comfy.running)
    others = left("test:1", 0.2)
    ours.append(left("test:0", 60.0))
    engine = make_engine(comfy.url)
    assert not {one[1] for one in [*comfy.running(), *comfy.pending()]} & set(ours)
    assert "success" == comfy.entry(others)["status"]["status_str"]
    assert 1 == len(Work(engine, make_job(slow_model(models), tmp_path)).made())


def test_a_left_over_that_does_not_end_keeps_the_engine_from_starting(comfy: Comfy, make_engine: Any) -> None:
    graph: Graph = {"1": empty(4), "2": node("RushesTestHang", image=["1", 0], seconds=60.0), "3": save("2")}
    comfy.queue_prompt(graph, extra_data={"rushes": {"slot": "test:0"}})
    eventually(comfy.running)
    with pytest.raises(EngineError) as raised:
        make_engine(comfy.url, start_seconds=1.5)
    assert (True, False) == (raised.value.retryable, raised.value.began)
    assert comfy.running()
    comfy.kill()


# -- the socket is a convenience ----------------------------------------------------------------------------
def test_messages_about_others_prompts_are_not_taken_for_ours(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """A prompt without a client id has its messages sent to everybody."""
    answer = comfy.post("/prompt", {"prompt": slow_prompt(0.6, 10)})
    assert 200 == answer.status_code
    eventually(comfy.running)
    job = make_job(slow_model(models), tmp_path, **{"2_seconds": 0.3, "2_steps": 3})
    work = Work(engine, job)
    work.made()
    assert {3, None} >= {progress.steps for progress in work.told}
    assert "success" == comfy.entry(answer.json()["prompt_id"])["status"]["status_str"]


def test_connections_cut_in_mid_run_cost_nothing(
    wire: Wire, make_engine: Any, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(wire.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 2.0, "2_steps": 40}))
    for _ in range(3):
        before = len(work.stepping().told)
        wire.cut()
        eventually(lambda before=before: len(work.told) > before or work.over, what="it goes on")
    assert 1 == len(work.made())
    assert 1 == wire.requests.count("POST /prompt")


async def test_a_socket_that_stays_silent_is_not_waited_for(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """ComfyUI keeps one socket for a client id: a second one takes the messages of the first."""
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 1.0, "2_steps": 10})).stepping()
    client_id = comfy.running()[0][3]["client_id"]
    address = f"{comfy.url}/ws?clientId={client_id}"
    async with aiohttp.ClientSession() as http, http.ws_connect(address) as socket:
        await socket.receive()
        assert 1 == len(work.made())
    # The end of that second socket may have taken away the one that the engine opened meanwhile; not the next.
    assert 1 == len(Work(engine, make_job(slow_model(models), tmp_path)).made())
    again = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 1.0, "2_steps": 10}))
    assert 1 == len(again.stepping().made())
