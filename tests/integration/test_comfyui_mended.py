"""A ComfyUI that answers badly, or somebody who answers in its place: nothing fails for good, runs on for nobody,
runs twice, or tells the log what it should not.
"""

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from rushes.engines.comfyui.engine import ComfyUIEngine
from rushes.errors import EngineError
from support import comfyui_stub
from support.comfyui import Graph
from support.comfyui_models import Models, Work, make_job, slow_model
from support.comfyui_stub_nodes import Folders
from support.comfyui_transcripts import empty, node, save
from support.server import eventually
from support.worker import workbench

LONG = {"2_seconds": 30.0, "2_steps": 300}
MakeEngine = Callable[..., ComfyUIEngine]
Fault = Callable[[str, str], int | None]
"""Of method and path: the status with which something else than ComfyUI answers; None where ComfyUI is asked."""


class Faulty(comfyui_stub.Stub):
    """The stub, in a thread of this process, with switches."""

    fault: Fault = staticmethod(lambda _method, _path: None)
    own_ids = False
    """As before ``prompt_id`` was taken: the server chooses the id."""
    in_part: Any = None
    """``node_errors`` of an answer that takes a prompt all the same."""
    lost_answers = 0
    """To so many prompts the connection breaks after they were taken."""
    shift_history = False
    """The answer about a prompt has another shape than any version has."""

    def __init__(self, folder: Path) -> None:
        for name in ("in", "out", "temp"):
            (folder / name).mkdir(parents=True)
        super().__init__(Folders(folder / "in", folder / "out", folder / "temp"))
        self.asked: list[str] = []
        self.url = ""

    def app(self) -> web.Application:
        app = super().app()

        @web.middleware
        async def disturbed(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.asked.append(f"{request.method} {request.path}")
            status = self.fault(request.method, request.path)
            if status is not None:
                return web.Response(status=status, text="<html>not ComfyUI</html>", content_type="text/html")
            return await handler(request)

        app.middlewares.append(disturbed)
        return app

    async def _post_prompt(self, request: web.Request) -> web.Response:
        if self.own_ids:
            body = await request.json()
            body.pop("prompt_id", None)
            request._read_bytes = json.dumps(body).encode()
        answer = await super()._post_prompt(request)
        if answer.status == 200 and self.in_part is not None:
            assert answer.text is not None
            return web.json_response({**json.loads(answer.text), "node_errors": self.in_part})
        if self.lost_answers:
            self.lost_answers -= 1
            assert request.transport is not None
            request.transport.abort()
        return answer

    async def _get_history(self, request: web.Request) -> web.Response:
        answer = await super()._get_history(request)
        wanted = request.match_info.get("prompt_id")
        if self.shift_history and wanted in self._queue.history:
            return web.json_response({wanted: {"status": {"messages": 5}}})
        return answer

    # -- what it holds, asked from the test's thread ----------------------------------------------------
    def ids(self) -> tuple[list[str], list[str]]:
        """Of what runs and what waits."""
        running, pending = self._queue.current()
        return [one[1] for one in running], [one[1] for one in pending]

    def idle(self) -> bool:
        return self.ids() == ([], [])

    def posts(self) -> int:
        return self.asked.count("POST /prompt")


@contextmanager
def running(stub: Faulty) -> Iterator[Faulty]:
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(stub.app(), shutdown_timeout=0.1, access_log=None)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()

    loop.run_until_complete(start())
    stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Faulty]:
    with running(Faulty(tmp_path / "comfy")) as made:
        yield made


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "models")


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    made: list[ComfyUIEngine] = []

    def make(url: str, **more: Any) -> ComfyUIEngine:
        made.append(ComfyUIEngine(url, **{"identity": "test:0", "start_seconds": 20.0, **more}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def only(status: int, *asked: str) -> Fault:
    return lambda method, path: status if f"{method} {path.split('/')[1]}" in asked else None


def everything(status: int) -> Fault:
    return lambda _method, _path: status


# -- 1: what is not ComfyUI's word -------------------------------------------------------------------------
@pytest.mark.parametrize("status", [401, 429, 500, 530])
def test_an_error_of_a_gateway_on_everything_is_waited_out(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path, status: int
) -> None:
    engine = make_engine(comfy.url)
    comfy.fault = everything(status)
    work = Work(engine, make_job(slow_model(models), tmp_path))
    eventually(lambda: comfy.asked.count("GET /queue") > 2)
    comfy.fault = Faulty.fault
    assert 1 == len(work.made())


@pytest.mark.parametrize("status", [404, 500, 530])
def test_an_error_of_a_gateway_on_everything_ends_the_server_s_life(
    comfy: Faulty,
    make_engine: MakeEngine,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    monkeypatch.setattr("rushes.engines.comfyui.watch.SILENCE_SECONDS", 1.0)
    monkeypatch.setattr("rushes.engines.comfyui.watch._QUIET_SECONDS", 0.2)
    engine = make_engine(comfy.url)
    model = slow_model(models)
    comfy.fault = everything(status)
    works = [Work(engine, make_job(model, tmp_path)) for _ in range(2)]
    errors = [work.error() for work in works]
    assert 2 * [("comfyui_lost", True, True)] == [(e.reason, e.retryable, e.replace) for e in errors]
    assert [False, True] == sorted(error.began for error in errors)
    with pytest.raises(EngineError) as raised:
        make_engine(comfy.url, start_seconds=0.3)
    assert "comfyui_unreachable" == raised.value.reason


@pytest.mark.parametrize("status", [429, 500, 502, 530])
def test_a_prompt_on_which_comfyui_fails_is_submitted_twice_and_counted(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path, status: int
) -> None:
    engine = make_engine(comfy.url)
    comfy.fault = only(status, "POST prompt")
    error = Work(engine, make_job(slow_model(models), tmp_path)).error()
    assert ("comfyui_lost", True, True, False) == (error.reason, error.retryable, error.began, error.replace)
    assert 2 == comfy.posts()


async def test_requests_outlive_an_outage_and_a_prompt_that_always_fails_comes_to_an_end(
    comfy: Faulty, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = slow_model(models)
    urls = {"comfyui_urls": (comfy.url,), "models_dir": models.root}
    async with workbench(tmp_path, monkeypatch, engine="comfyui", **urls) as bench:
        bench.start()
        first = await bench.ended(await bench.submit("x", model.id))
        assert "succeeded" == first.state
        comfy.fault = everything(530)
        ids = [await bench.submit("x", model.id) for _ in range(4)]
        comfy.asked.clear()
        await asyncio.to_thread(eventually, lambda: comfy.asked.count("GET /queue") > 2)
        comfy.fault = Faulty.fault
        assert 4 * [("succeeded", 1)] == [
            (record.state, record.attempt) for record in [await bench.ended(one) for one in ids]
        ]
        comfy.fault = only(500, "POST prompt")
        comfy.asked.clear()
        failed = await bench.ended(await bench.submit("x", model.id))
        assert ("failed", bench.settings.attempt_limit) == (failed.state, failed.attempt)
        assert failed.failure is not None
        assert "comfyui_lost" == failed.failure.code
        assert 2 * bench.settings.attempt_limit == comfy.posts()


# -- 2: nothing runs on for nobody -------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["queue", "history"])
@pytest.mark.parametrize("status", [404, 429, 500])
def test_an_error_while_it_is_followed_is_borne(
    comfy: Faulty,
    make_engine: MakeEngine,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    status: int,
) -> None:
    monkeypatch.setattr("rushes.engines.comfyui.engine._SOCKET_SECONDS", 0.1)
    monkeypatch.setattr("rushes.engines.comfyui.prompt._POLL_SECONDS", 0.2)
    comfy.fault = only(404, "GET ws")  # all is found by asking
    engine = make_engine(comfy.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 1.0}))
    eventually(comfy.posts)
    comfy.fault = only(status, "GET ws", f"GET {path}")
    before = len(comfy.asked)
    eventually(lambda: sum(one.startswith(f"GET /{path}") for one in comfy.asked[before:]) > 2)
    comfy.fault = only(404, "GET ws")
    assert 1 == len(work.made())
    assert 1 == comfy.posts()


def test_what_is_given_up_without_an_answer_is_taken_back(
    comfy: Faulty,
    make_engine: MakeEngine,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rushes.engines.comfyui.line._INSIST_SECONDS", 0.5)
    monkeypatch.setattr("rushes.engines.comfyui.prompt._POLL_SECONDS", 0.2)
    engine = make_engine(comfy.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **LONG)).stepping()
    comfy._sockets.clear()  # nothing is heard any more
    asked = 0

    def for_a_while(method: str, path: str) -> int | None:
        nonlocal asked
        asked += path == "/queue"
        return 500 if (method, path) == ("GET", "/queue") and asked < 6 else None

    comfy.fault = for_a_while
    error = work.error()
    assert ("comfyui_lost", True, True, False) == (error.reason, error.retryable, error.began, error.replace)
    assert comfy.idle()


def test_what_cannot_be_taken_back_has_the_process_replaced(
    comfy: Faulty,
    make_engine: MakeEngine,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one is ready only once the prompt is gone."""
    monkeypatch.setattr("rushes.engines.comfyui.line._INSIST_SECONDS", 0.3)
    monkeypatch.setattr("rushes.engines.comfyui.prompt._POLL_SECONDS", 0.2)
    engine = make_engine(comfy.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **LONG)).stepping()
    comfy.fault = only(500, "GET queue", "GET history")
    comfy._sockets.clear()  # nothing is heard any more
    error = work.error()
    assert ("comfyui_lost", True, True, True) == (error.reason, error.retryable, error.began, error.replace)
    comfy.fault = Faulty.fault
    make_engine(comfy.url)
    assert comfy.idle()


def test_an_answer_of_a_new_shape_ends_nothing_for_good(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rushes.engines.comfyui.engine._SOCKET_SECONDS", 0.1)
    comfy.fault = only(404, "GET ws")
    comfy.shift_history = True
    engine = make_engine(comfy.url)
    error = Work(engine, make_job(slow_model(models), tmp_path)).error()
    assert ("comfyui_unclear", True, True) == (error.reason, error.retryable, error.began)
    assert comfy.idle()


@pytest.mark.parametrize("status", [404, 500])
def test_an_error_while_it_is_taken_back_is_still_an_abort(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path, status: int
) -> None:
    engine = make_engine(comfy.url)
    work = Work(engine, make_job(slow_model(models), tmp_path, **LONG)).stepping()
    comfy.fault = only(status, "GET queue", "POST interrupt", "POST queue")
    comfy.asked.clear()
    engine.abort(work.job.request_id, 1)
    eventually(lambda: "GET /queue" in comfy.asked)
    assert not work.over
    comfy.fault = only(status, "POST interrupt")
    eventually(lambda: comfy.asked.count("POST /interrupt") > 1)
    comfy.fault = Faulty.fault
    assert "aborted" == work.error().reason
    assert comfy.idle()


def test_a_comfyui_without_free_still_ends_out_of_memory(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path
) -> None:
    comfy.fault = only(404, "POST free")
    engine = make_engine(comfy.url)
    greedy = node("RushesTestOutOfMemory", image=["1", 0], times=99, key=tmp_path.name)
    model = models.add({"1": empty(), "2": greedy, "3": save("2")})
    error = Work(engine, make_job(model, tmp_path)).error()
    assert ("out_of_memory", False) == (error.reason, error.retryable)
    assert 2 == comfy.posts()


# -- 3: a submit without an answer -------------------------------------------------------------------------
def test_a_submit_that_got_lost_once_is_made_again(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(comfy.url)
    comfy.fault = lambda _, path: 504 if path == "/prompt" and comfy.posts() == 1 else None
    assert 1 == len(Work(engine, make_job(slow_model(models), tmp_path)).made())
    assert 2 == comfy.posts()


def test_a_submit_that_comes_through_late_is_not_run_twice(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path
) -> None:
    """Some gateway answers for ComfyUI, and hands the prompt on all the same, when nobody looks any more."""
    engine = make_engine(comfy.url)
    comfy.fault = lambda _, path: 504 if path == "/prompt" and comfy.posts() == 1 else None
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 1.0, "2_steps": 20})).stepping()
    (mine,), _ = comfy.ids()
    (first,) = {one["prompt"] for one in _submits(engine)} - {mine}
    late = {"rushes": {"slot": "test:0", "request": work.job.request_id, "attempt": 1, "prompt": first}}
    graph: Graph = copy.deepcopy(comfy._queue.current()[0][0][2])
    graph["2"]["inputs"] |= {"seconds": 30.0, "steps": 300, "seed": 5}
    comfy._queue.put((99, first, graph, late, ["3"]))
    assert 1 == len(work.made())
    assert comfy.idle()
    ended = comfy._queue.history.get(first)
    assert ended is None or "error" == ended["status"]["status_str"]


def _submits(engine: ComfyUIEngine) -> list[dict[str, str]]:
    """The ids under which the engine's prompts were submitted."""
    return [{"prompt": one} for prompt in engine._prompts.values() for one in prompt.ids]


# -- 5: servers that choose the id -------------------------------------------------------------------------
@pytest.mark.parametrize("own_ids", [False, True])
def test_a_prompt_that_is_taken_in_part_is_taken_back_whatever_its_id(
    comfy: Faulty,
    make_engine: MakeEngine,
    models: Models,
    tmp_path: Path,
    own_ids: bool,
) -> None:
    engine = make_engine(comfy.url)
    comfy.own_ids = own_ids
    comfy.in_part = {"9": {"class_type": "X", "errors": [{"type": "x", "message": "bad", "details": ""}]}}
    error = Work(engine, make_job(slow_model(models), tmp_path, **LONG)).error()
    assert ("workflow_refused", False, False) == (error.reason, error.retryable, error.replace)
    assert comfy.idle()


def test_a_lost_answer_is_found_under_the_server_s_own_id(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(comfy.url)
    comfy.own_ids, comfy.lost_answers = True, 1
    work = Work(engine, make_job(slow_model(models), tmp_path, **{"2_seconds": 1.0, "2_steps": 20}))
    work.stepping()  # its messages are followed under that id
    assert 1 == len(work.made())
    assert 1 == comfy.posts()


def test_a_lost_answer_is_found_in_the_history_too(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(comfy.url)
    comfy.own_ids, comfy.lost_answers = True, 1
    comfy.fault = lambda _, path: 500 if path == "/queue" and not comfy._queue.history else None
    assert 1 == len(Work(engine, make_job(slow_model(models), tmp_path)).made())
    assert 1 == comfy.posts()


def test_an_abort_while_the_answer_is_out_finds_the_server_s_own_id(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path
) -> None:
    engine = make_engine(comfy.url)
    comfy.own_ids, comfy.lost_answers = True, 1
    comfy.fault = only(500, "GET queue")
    comfy.asked.clear()
    work = Work(engine, make_job(slow_model(models), tmp_path, **LONG))
    eventually(lambda: "GET /queue" in comfy.asked and comfy.ids()[0])
    engine.abort(work.job.request_id, 1)
    comfy.fault = Faulty.fault
    assert "aborted" == work.error().reason
    assert comfy.idle()


# -- 8, 15, 16: what is written down -----------------------------------------------------------------------
def test_no_password_is_shown_or_logged(
    comfy: Faulty, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rushes.engines.comfyui.engine._REMIND_SECONDS", 0.0)
    address = comfy.url.replace("//", "//user:hunter2@")
    comfy.fault = everything(401)
    with pytest.raises(EngineError) as raised:
        make_engine(address, start_seconds=0.6)
    assert comfy.url in raised.value.message
    assert "hunter2" not in raised.value.message
    comfy.fault = Faulty.fault
    engine = make_engine(address)
    engine._gone("for a test")
    logged = capfd.readouterr().err
    assert {"comfyui_awaited", "comfyui_gone"} <= {json.loads(one)["event"] for one in logged.splitlines()}
    assert comfy.url in logged
    assert "hunter2" not in logged


def test_a_refusal_that_nobody_can_write_down_leaves_nothing_running(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine(comfy.url)
    problem = {
        "type": "custom_validation_failed",
        "message": "x",
        "details": "a \ud800 detail",
        "extra_info": 5,
    }
    comfy.in_part = {"\udc80": {"class_type": "X\udfff", "errors": [problem]}}
    error = Work(engine, make_job(slow_model(models), tmp_path, **LONG)).error()
    assert "workflow_refused" == error.reason
    assert "a ? detail" in error.message
    assert "? X?" == error.node
    assert comfy.idle()
    assert '"comfyui_refused"' in capfd.readouterr().err


def test_a_refusal_is_logged_without_what_was_asked_for(
    comfy: Faulty, make_engine: MakeEngine, models: Models, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine(comfy.url)
    secret = str(tmp_path / "my secret prompt")  # the node makes a file of this name
    comfy.in_part = {
        "2": {
            "class_type": "RushesTestSleep",
            "dependent_outputs": ["3"],
            "errors": [
                {
                    "type": "value_not_in_list",
                    "message": "Value not in list",
                    "details": f"marker: '{secret}' not in ['a']",
                    "extra_info": {"input_name": "marker", "input_config": [["a"]], "received_value": secret},
                }
            ],
        }
    }
    error = Work(engine, make_job(slow_model(models), tmp_path, **{"2_marker": secret})).error()
    assert ("value_refused", "2_marker") == (error.reason, error.field)
    logged = capfd.readouterr().err
    (event,) = [one for one in map(json.loads, logged.splitlines()) if one["event"] == "comfyui_refused"]
    expected = {"type": "value_not_in_list", "message": "Value not in list", "input": "marker"}
    assert {"2": {"class_type": "RushesTestSleep", "errors": [expected]}} == event["answer"]
    assert ("value_refused", 200) == (event["reason"], event["status"])
    assert secret not in logged
