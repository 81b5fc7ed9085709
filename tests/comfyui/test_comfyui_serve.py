"""`rushes serve` in front of ComfyUIs, with kill -9 of everything: one outcome each, and nothing twice at once."""

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.comfyui import Comfy
from support.comfyui_models import Models, slow_model
from support.comfyui_serving import Watcher, made_there, of_requests, record, submit, succeeded
from support.server import Server, eventually

LONG = {"2_seconds": 60.0, "2_steps": 3000}


class Servers:
    """One `rushes serve` at a time, kept from test to test as long as it stands in front of the same ComfyUIs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._urls, self._made = "", 0
        self._server: Server | None = None
        self.seeds = itertools.count()
        """Another one for each request: else ComfyUI has some of it in its cache."""
        self.models = Models(root / "models")
        self.slow = slow_model(self.models, id="test/slow")
        self.limited = slow_model(self.models, id="test/limited", time_limit=1.0)

    def fresh(self, *comfys: Comfy) -> Server:
        """A server that has just been started, with nothing in its queue."""
        self.stop()
        self._urls, self._made = ",".join(comfy.url for comfy in comfys), self._made + 1
        self._server = Server(
            self._root / f"data{self._made}",
            engine="comfyui",
            comfyui_urls=self._urls,
            models_dir=self.models.root,
        )
        return self._server.start()

    def __call__(self, *comfys: Comfy) -> Server:
        if self._server is not None and self._urls == ",".join(comfy.url for comfy in comfys):
            return self._server
        return self.fresh(*comfys)

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    made = Servers(tmp_path_factory.mktemp("serve"))
    yield made
    made.stop()


@pytest.fixture
def once(tmp_path: Path) -> dict[str, object]:
    """Inputs of a request that runs for a minute the first time, and a moment whenever it is tried again."""
    return {**LONG, "2_marker": str(tmp_path / "tried")}


def test_requests_wait_for_a_comfyui_that_is_down(comfy: Comfy, serve: Servers) -> None:
    comfy.kill()
    server = serve.fresh(comfy)
    id_ = submit(server, serve.slow)
    time.sleep(1.0)
    assert "in_queue" == server.status(id_)["status"]
    assert 0 == record(server, id_).attempt
    comfy.start()
    succeeded(server, id_)
    assert 1 == record(server, id_).attempt


def test_kill_9_of_comfyui_in_mid_run_is_one_outcome_after_another_attempt(
    comfy: Comfy, serve: Servers, once: dict[str, object]
) -> None:
    server = serve(comfy)
    with Watcher(comfy) as watcher:
        id_ = submit(server, serve.slow, **once)
        eventually(lambda: [id_] == of_requests(comfy))
        comfy.kill()
        comfy.start()
        succeeded(server, id_)
    assert 2 == record(server, id_).attempt
    assert {1, 2} >= watcher.attempts[id_]
    assert 1 == watcher.most
    succeeded(server, submit(server, serve.slow))


@pytest.mark.parametrize("role", ["slot", "worker"])
def test_kill_9_of_our_own_processes_in_mid_run_runs_nothing_twice_at_once(
    comfy: Comfy, serve: Servers, once: dict[str, object], role: str
) -> None:
    server = serve(comfy)
    with Watcher(comfy) as watcher:
        id_ = submit(server, serve.slow, **once)
        eventually(lambda: [id_] == of_requests(comfy))
        server.one(role).send_signal(signal.SIGKILL)
        succeeded(server, id_)
    assert 2 == record(server, id_).attempt
    assert ({1, 2}, 1) == (watcher.attempts[id_], watcher.most)
    assert comfy.idle()


def test_the_time_limit_ends_the_prompt_in_comfyui_too(comfy: Comfy, serve: Servers) -> None:
    server = serve(comfy)
    slot = server.one("slot").pid
    id_ = submit(server, serve.limited, **LONG)
    result = server.finished(id_)
    assert ("failed", "time_limit") == (result["status"], result["error"]["code"])
    eventually(lambda: id_ not in of_requests(comfy), 5, "ComfyUI has let go of it")
    succeeded(server, submit(server, serve.slow))
    assert slot == server.one("slot").pid, "an engine that lets go keeps its process"


def test_the_second_lane_does_not_take_from_an_idle_server(
    comfy: Comfy, second_comfy: Comfy, serve: Servers
) -> None:
    """One of two servers runs, for how long nobody knows: the next request is the other's."""
    before = made_there(comfy), made_there(second_comfy)
    server = serve.fresh(comfy, second_comfy)
    while made_there(comfy) == before[0] or made_there(second_comfy) == before[1]:  # until both are ready
        values = {"2_seconds": 0.4 + next(serve.seeds) / 100}
        for id_ in [submit(server, serve.slow, **values, **{"2_seed": next(serve.seeds)}) for _ in range(2)]:
            succeeded(server, id_)
    for seconds in (1.5, 1.6):  # work of another length: how long it takes is not known from before
        ids = [submit(server, serve.slow, **{"2_seconds": seconds, "2_steps": 40, "2_seed": next(serve.seeds)})]
        eventually(lambda: 1 == len(of_requests(comfy)) + len(of_requests(second_comfy)))
        ids.append(submit(server, serve.slow, **{"2_seconds": 0.7, "2_steps": 20, "2_seed": next(serve.seeds)}))
        eventually(lambda: 1 == len(of_requests(comfy)) == len(of_requests(second_comfy)), 5)
        for id_ in ids:
            succeeded(server, id_)


def test_two_servers_behind_one_queue_both_work(comfy: Comfy, second_comfy: Comfy, serve: Servers) -> None:
    before = made_there(comfy), made_there(second_comfy)
    server = serve(comfy, second_comfy)
    ids = [submit(server, serve.slow, **{"2_seconds": 0.3, "2_seed": next(serve.seeds)}) for _ in range(8)]
    for id_ in ids:
        succeeded(server, id_)
    done = made_there(comfy) - before[0], made_there(second_comfy) - before[1]
    assert 8 == sum(done)
    assert min(done) >= 2


def test_one_of_two_servers_dies_and_the_other_takes_over(
    comfy: Comfy, second_comfy: Comfy, serve: Servers
) -> None:
    server = serve(comfy, second_comfy)
    values = {"2_seconds": 1.0, "2_steps": 20}
    ids = [submit(server, serve.slow, **values, **{"2_seed": next(serve.seeds)}) for _ in range(4)]
    eventually(lambda: of_requests(comfy) and of_requests(second_comfy))
    comfy.kill()
    for id_ in ids:
        succeeded(server, id_)
    assert {1, 2} >= {record(server, id_).attempt for id_ in ids}
