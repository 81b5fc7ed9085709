"""Processes die, stop, lie about the time and run out of disk; every accepted request gets one outcome."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rushes.requests.record import Request
from support.postgres import postgres_server
from support.server import T2I, Server, eventually


class Submitter(threading.Thread):
    """Submits as fast as it can until stopped; ``acknowledged`` are the ids that were answered."""

    def __init__(self, server: Server, prompt: str = "ok") -> None:
        super().__init__(daemon=True)
        self._server, self._prompt = server, prompt
        self._over = threading.Event()
        self.acknowledged: list[str] = []
        self.refused = 0

    def run(self) -> None:
        while not self._over.is_set():
            try:
                with self._server.client() as client:
                    while not self._over.is_set():
                        answer = client.post(f"/v1/models/{T2I}", json={"prompt": self._prompt})
                        if answer.status_code == 200:
                            self.acknowledged.append(answer.json()["request_id"])
                        else:
                            assert answer.status_code == 503, answer.text
                            self.refused += 1
            except httpx.HTTPError:
                self.refused += 1

    def stop(self) -> list[str]:
        self._over.set()
        self.join(40)
        assert not self.is_alive()
        return self.acknowledged


def record(server: Server, id_: str) -> Request:
    found = server.with_store(lambda store: store.get(id_))
    assert found is not None, f"{id_} was acknowledged and is gone"
    return found


def all_succeed(server: Server, ids: list[str], seconds: float = 60) -> None:
    """Each of ``ids`` is there and has its one outcome; the store holds nothing that has none."""

    def over() -> bool:
        counts = server.with_store(lambda store: store.counts())
        return counts["queued"] + counts["running"] == 0

    eventually(over, seconds, "everything has an outcome")
    states = [record(server, id_).state for id_ in ids]
    assert ids
    assert ["succeeded"] * len(ids) == states


def test_kill_9_of_a_child(make_server, database) -> None:
    server: Server = make_server(**database).start()
    id_ = server.submit("sleep 2")
    server.running(id_)
    child = server.one("slot")
    child.send_signal(signal.SIGKILL)
    result = server.finished(id_)
    assert "succeeded" == result["status"]
    assert 2 == record(server, id_).attempt
    assert child.pid != server.one("slot").pid
    server.stop()


def test_attempts_are_limited_and_failures_explained(make_server, database, tmp_path) -> None:
    runs = tmp_path / "runs"
    server: Server = make_server(test_runs=runs, **database).start()
    expected = {
        "crash": ("failed", "engine_crashed", 3),
        "oom": ("failed", "engine_killed", 3),
        "fail": ("failed", "bad_prompt", 1),
        "raise": ("failed", "engine_error", 1),
        "crash-once": ("succeeded", None, 2),
        "retry": ("succeeded", None, 2),
        "print": ("succeeded", None, 1),
    }
    ids = {prompt: server.submit(prompt) for prompt in expected}
    for prompt, (status, code, attempts) in expected.items():
        result = server.finished(ids[prompt])
        assert (prompt, status) == (prompt, result["status"])
        assert (prompt, code) == (prompt, result.get("error", {}).get("code"))
        assert (prompt, attempts) == (prompt, record(server, ids[prompt]).attempt)
        assert attempts == runs.read_text().count(ids[prompt])
        assert "/secret/path" not in str(result)
    assert "6 CLIPTextEncode" == server.result(ids["fail"])["error"]["node"]
    assert "succeeded" == server.finished(server.submit("ok"))["status"]
    server.stop()


def test_a_hung_engine_is_ended_at_the_models_time_limit(make_server, tmp_path) -> None:
    folder = tmp_path / "models" / "me" / "short"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(
        'name = "Short"\ndescription = "Ends soon."\ncategories = ["text-to-image"]\noutput = "image"\n'
        'required = ["prompt"]\ntime_limit = 1\n'
        '[[inputs]]\nname = "prompt"\ntitle = "Prompt"\ntype = "string"\nrole = "prompt"\n'
    )
    (folder / "sample.json").write_text('{"prompt": "ok"}')
    server: Server = make_server(models_dir=tmp_path / "models").start()
    hung = server.submit("hang", model="me/short")
    after = server.submit("ok", model="me/short")
    result = server.finished(hung)
    assert ("failed", "time_limit") == (result["status"], result["error"]["code"])
    assert "succeeded" == server.finished(after)["status"]
    server.stop()


def test_kill_9_of_the_worker(make_server, database) -> None:
    server: Server = make_server(**database).start()
    id_ = server.submit("sleep 1")
    server.running(id_)
    slot = server.one("slot")
    server.one("worker").send_signal(signal.SIGKILL)
    assert "succeeded" == server.finished(id_)["status"]
    assert 2 == record(server, id_).attempt
    eventually(lambda: not slot.is_running() or slot.status() == "zombie", 10, "the old child is gone")
    server.stop()


def test_kill_9_of_the_gateway_in_mid_submit(make_server, database) -> None:
    server: Server = make_server(engine="noop", **database).start()
    submitters = [Submitter(server) for _ in range(4)]
    for submitter in submitters:
        submitter.start()
    for _ in range(2):
        before = sum(len(s.acknowledged) for s in submitters)
        eventually(lambda before=before: sum(len(s.acknowledged) for s in submitters) > before + 40)
        gateway = server.one("gateway")
        gateway.send_signal(signal.SIGKILL)
        eventually(lambda pid=gateway.pid: server.one("gateway").pid != pid)
    before = sum(len(s.acknowledged) for s in submitters)
    eventually(lambda: sum(len(s.acknowledged) for s in submitters) > before, what="submits go on")
    ids = [id_ for submitter in submitters for id_ in submitter.stop()]
    all_succeed(server, ids)
    server.stop()


def test_kill_9_of_everything(make_server, database) -> None:
    server: Server = make_server(workers=2, **database).start()
    submitters = [Submitter(server, "sleep 0.02") for _ in range(3)]
    for submitter in submitters:
        submitter.start()
    eventually(lambda: sum(len(s.acknowledged) for s in submitters) > 60)
    server.kill_everything()
    ids = [id_ for submitter in submitters for id_ in submitter.stop()]
    server.start()
    all_succeed(server, ids)
    assert "succeeded" == server.finished(server.submit("ok"))["status"]
    server.stop()


@contextlib.contextmanager
def lone_worker(server: Server, name: str, **more: str) -> Iterator["subprocess.Popen[bytes]"]:
    with (server.data_dir.parent / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rushes.cli.main", "worker", "--workers", "1"],
            env=server.environment | more,
            stderr=log,
            stdout=log,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(30)


def test_a_stopped_worker_loses_its_request_and_cannot_write_the_outcome(make_server, database) -> None:
    server: Server = make_server(workers=0, lease_seconds=1, **database).start()
    with lone_worker(server, "first") as first:
        id_ = server.submit("sleep 1.5")
        server.running(id_)
        first.send_signal(signal.SIGSTOP)
        # Where it was stopped inside a transaction it would hold SQLite's write lock: stop it elsewhere.
        while server.call("GET", "/healthz").status_code != 200:
            first.send_signal(signal.SIGCONT)
            first.send_signal(signal.SIGSTOP)
        holder = record(server, id_).worker
        with lone_worker(server, "second"):
            result = server.finished(id_)
            taken = record(server, id_)
            assert (2, "succeeded") == (taken.attempt, taken.state)
            first.send_signal(signal.SIGCONT)
            log = server.data_dir.parent / "first.log"
            eventually(lambda: "lease lost" in log.read_text() or "discarded" in log.read_text(), 20)
            again = server.submit("ok")
            assert "succeeded" == server.finished(again)["status"]
            after = record(server, id_)
            assert taken == after
            assert holder is not None
            assert result["output"].keys() == server.result(id_)["output"].keys()
            assert 200 == httpx.get(server.result(id_)["output"]["image"]).status_code
    server.stop()


@pytest.mark.parametrize("offset", ["+400d", "-400d"])
def test_a_worker_with_the_wrong_clock_harms_nobody(make_server, database, offset, tmp_path) -> None:
    import libfaketime

    library = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"
    assert library.exists()
    server: Server = make_server(workers=0, lease_seconds=1, **database).start()
    with lone_worker(server, "right", RUSHES_TEST_GATES=str(tmp_path)):
        slow = server.submit("until enough")
        server.running(slow)
        wrong = {"LD_PRELOAD": str(library), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        with lone_worker(server, "wrong", **wrong):
            quick = [server.submit("ok") for _ in range(3)]
            for id_ in quick:
                assert "succeeded" == server.finished(id_)["status"]
            time.sleep(1.5)  # more than the lease, in which the wrong clock could end the other worker's
            assert "in_progress" == server.status(slow)["status"]
            (tmp_path / "enough").touch()
            assert "succeeded" == server.finished(slow)["status"]
    assert [1, 1, 1, 1] == [record(server, id_).attempt for id_ in [slow, *quick]]
    server.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_while_storing(make_server, database, small_disk, tmp_path) -> None:
    server: Server = make_server(attempt_limit=2, **database)
    server.data_dir.mkdir()
    (server.data_dir / "files").symlink_to(small_disk)
    server.start()
    assert "succeeded" == server.finished(server.submit("big 600"))["status"]
    ballast = small_disk / "ballast"
    fill(ballast)
    lost = server.submit("big 900")
    result = server.finished(lost, 60)
    assert ("failed", "output_not_stored") == (result["status"], result["error"]["code"])
    assert str(small_disk) not in str(result)
    waits = server.submit("big 900")
    eventually(lambda: server.log.read_text().count("output not stored") > 8, 30)
    ballast.unlink()
    done = server.finished(waits)
    assert "succeeded" == done["status"]
    assert 900 * 900 * 3 < int(httpx.head(done["output"]["image"]).headers["content-length"])
    server.stop()


def test_disk_full_under_the_database(make_server, small_disk) -> None:
    server: Server = make_server(workers=0)
    server.data_dir = small_disk / "data"
    server.start()
    first = [server.submit("ok") for _ in range(5)]
    ballast = small_disk / "ballast"
    fill(ballast)
    refused = eventually(lambda: refusal(server), 20, "a submit is refused")
    assert 503 == refused.status_code
    assert refused.headers["retry-after"]
    assert {"in_queue"} == {server.status(id_)["status"] for id_ in first}
    ballast.unlink()
    first.append(eventually(lambda: accepted(server), 20, "submits are taken again"))
    server.stop()
    server.settings["workers"] = 1
    server.start()
    for id_ in first:
        assert "succeeded" == server.finished(id_)["status"]
    server.stop()


def refusal(server: Server) -> httpx.Response | None:
    answer = server.call("POST", f"/v1/models/{T2I}", json={"prompt": "x" * 2000})
    return None if answer.status_code == 200 else answer


def accepted(server: Server) -> str | None:
    answer = server.call("POST", f"/v1/models/{T2I}", json={"prompt": "ok"})
    return str(answer.json()["request_id"]) if answer.status_code == 200 else None


def fill(ballast: Path) -> None:
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):
            while os.write(file, os.urandom(4096)):
                pass
    finally:
        os.close(file)


def test_kill_9_of_postgresql(make_server) -> None:
    with postgres_server() as postgres:
        server: Server = make_server(workers=2, database_url=postgres.create_database()).start()
        submitters = [Submitter(server) for _ in range(4)]
        for submitter in submitters:
            submitter.start()
        eventually(lambda: sum(len(s.acknowledged) for s in submitters) > 50)
        running = server.submit("sleep 1")
        postgres.kill9()
        eventually(lambda: sum(s.refused for s in submitters) > 3, what="submits are refused meanwhile")
        before = sum(len(s.acknowledged) for s in submitters)
        postgres.start()
        eventually(
            lambda: sum(len(s.acknowledged) for s in submitters) > before + 10, 60, "submits are taken again"
        )
        ids = [id_ for submitter in submitters for id_ in submitter.stop()]
        all_succeed(server, [*ids, running], 90)
        server.stop()
