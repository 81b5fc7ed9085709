"""A ComfyUI that a slot starts for itself (RUSHES_COMFYUI_DIR): it is watched, replaced, and dies with its slot."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rushes.catalog.model import Model
from support.comfyui import TESTS, kinds, real_dir, real_python
from support.comfyui_models import Models, file_field, slow_model
from support.comfyui_transcripts import empty, node, save
from support.server import Server, eventually

LONG = {"2_seconds": 60.0, "2_steps": 3000}


class House:
    """One server, which starts its ComfyUI itself, and the models that the tests use."""

    def __init__(self, root: Path, **settings: object) -> None:
        models = Models(root / "models")
        crash = node("RushesTestCrash", image=["1", 0], marker="")
        self.deadly = models.add({"1": empty(), "2": crash, "3": save("2")}, id="test/deadly")
        loading = {"1": node("LoadImage", image="a.png"), "2": save("1")}
        self.loading = models.add(loading, file_field("1_image"), id="test/loading")
        self.slow = slow_model(models, id="test/slow")
        self.server = Server(
            root / "data", engine="comfyui", models_dir=models.root, attempt_limit=2, **settings
        )

    def started(self) -> Server:
        """The server, whose ComfyUI runs."""
        if self.server.process is None or self.server.process.poll() is not None:
            self.server.start()
        eventually(lambda: comfys(self.server), 90, "ComfyUI runs")
        return self.server


@pytest.fixture(scope="module", params=kinds())
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("own")
    pack = root / "paths.yaml"
    pack.write_text(f"tests:\n  custom_nodes: {TESTS / 'support' / 'comfy_nodes'}\n")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stub":
            folder, python = root / "ComfyUI", sys.executable
            folder.mkdir()
            lines = ["import sys", f"sys.path.insert(0, {str(TESTS)!r})"]
            lines += ["from support.comfyui_stub import main", "main()"]
            (folder / "main.py").write_text("\n".join(lines))
        else:
            real = real_dir()
            assert real is not None
            folder, python = real, real_python(real)
            patch.setenv("PYTHONPATH", os.environ.get("COMFYUI_PYTHONPATH", ""))
        made = House(
            root,
            comfyui_dir=folder,
            comfyui_python=python,
            comfyui_args=f"--cpu --extra-model-paths-config {pack}",
        )
        yield made
        made.server.stop()


@pytest.fixture
def once(tmp_path: Path) -> dict[str, object]:
    """Inputs of a request that runs for a minute the first time, and a moment whenever it is tried again."""
    return {**LONG, "2_marker": str(tmp_path / "tried")}


def comfys(server: Server) -> list[psutil.Process]:
    """The ComfyUIs of the server's slots; each has a watcher beside it, which is our code."""
    found = []
    for slot in server.processes("slot"):
        try:
            for child in slot.children(recursive=True):
                line = child.cmdline()
                if "main.py" in line and "rushes.engines.comfyui.process" not in line:
                    found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def submit(server: Server, model: Model, **values: object) -> str:
    answer = server.call("POST", f"/v1/models/{model.id}", json={"prompt": "a test", **values})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def succeeded(server: Server, id_: str) -> None:
    result = server.finished(id_, 90)
    assert result["status"] == "succeeded", result


def attempts(server: Server, id_: str) -> int:
    return int(server.with_store(lambda store: store.get(id_)).attempt)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_what_was_brought_to_it_and_made_by_it_is_removed(house: House) -> None:
    server = house.started()
    succeeded(server, submit(server, house.loading, **{"1_image": "Runcomfy_Example_1290_1.png"}))

    def left() -> list[Path]:  # besides what is linked from the input folder of the ComfyUI itself
        return [path for path in (server.data_dir / "comfyui").rglob("*.png") if not path.is_symlink()]

    eventually(lambda: [] == left(), 10, "its folders are tidy")


def test_kill_9_of_it_in_mid_run_is_another_attempt_on_a_new_one(house: House, once: dict[str, object]) -> None:
    server = house.started()
    (first,) = comfys(server)
    id_ = submit(server, house.slow, **once)
    eventually(lambda: "The slow part" in str(server.with_store(lambda store: store.get(id_)).progress), 60)
    first.send_signal(signal.SIGKILL)
    succeeded(server, id_)
    assert 2 == attempts(server, id_)
    assert first.pid not in [one.pid for one in comfys(server)]
    succeeded(server, submit(server, house.slow))


def test_a_workflow_that_ends_it_fails_in_the_end_and_the_next_request_works(house: House) -> None:
    server = house.started()
    id_ = submit(server, house.deadly)
    result = server.finished(id_, 90)
    assert ("failed", "comfyui_lost") == (result["status"], result["error"]["code"])
    assert 2 == attempts(server, id_)
    succeeded(server, submit(server, house.slow))


def test_it_dies_with_its_slot(house: House, once: dict[str, object]) -> None:
    server = house.started()
    (first,) = comfys(server)
    id_ = submit(server, house.slow, **once)
    server.running(id_)
    server.one("slot").send_signal(signal.SIGKILL)
    eventually(lambda: is_gone(first), 10, "its ComfyUI is gone")
    succeeded(server, id_)
    (second,) = comfys(server)
    assert first.pid != second.pid
    assert 0 == server.stop()
    eventually(lambda: is_gone(second), 10, "its ComfyUI is gone")
