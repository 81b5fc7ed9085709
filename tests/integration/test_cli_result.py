"""`rushes result` against a server in a process's own view: what is printed, saved and answered."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rushes.cli import exits
from rushes.cli.main import execute
from support.stub_server import KEY, MODEL, MOVIE, StubServer, running


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with running() as server:
        yield server


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: StubServer) -> Path:
    """An empty current folder, with the server and the key in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUSHES_BASE_URL", stub.url)
    monkeypatch.setenv("RUSHES_API_KEY", KEY)
    return tmp_path


def ended(stub: StubServer) -> str:
    stub.polls = []
    job = stub.submit(MODEL, {})
    stub.poll(job)
    return job.id


def test_an_ended_request_is_downloaded(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    identifier = ended(stub)
    assert 0 == execute(["result", identifier, "--output-dir", "out"])
    printed = capfd.readouterr()
    assert f"out/{identifier}-1.mp4\n" == printed.out
    assert MOVIE == (here / "out" / f"{identifier}-1.mp4").read_bytes()
    assert "not a generation" in printed.err


def test_a_wait_shows_the_progress_and_downloads(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    identifier = stub.submit(MODEL, {}).id
    assert 0 == execute(["result", identifier, "--wait"])
    printed = capfd.readouterr()
    assert f"{identifier}-1.mp4\n" == printed.out
    for told in ("queued, position 2", "rendering, 42%", "succeeded in"):
        assert told in printed.err


def test_json_has_the_cost_and_the_files(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    identifier = ended(stub)
    assert 0 == execute(["result", identifier, "--json"])
    printed = json.loads(capfd.readouterr().out)
    assert ("succeeded", 2.85, [f"{identifier}-1.mp4"]) == (
        printed["status"],
        printed["cost"],
        printed["saved"],
    )


def test_without_a_download_the_addresses_are_printed(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    identifier = ended(stub)
    assert 0 == execute(["result", identifier, "--no-download", "--output-dir", "/proc/foo"])
    assert f"{stub.url}/files/a.mp4?signature=s3cret\n" == capfd.readouterr().out
    assert 0 == execute(["result", identifier, "--no-download", "--json"])
    assert "saved" not in json.loads(capfd.readouterr().out)
    assert [] == list(here.iterdir())


def test_a_request_that_goes_on_is_told_with_its_state(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    identifier = stub.submit(MODEL, {}).id
    assert exits.Exit.SERVER == execute(["result", identifier])
    printed = capfd.readouterr()
    assert "" == printed.out
    assert f"Request {identifier} has not ended: queued, position 2. `rushes result " in printed.err
    assert exits.Exit.SERVER == execute(["result", identifier, "--json"])
    assert "in_progress" == json.loads(capfd.readouterr().out)["status"]


def test_a_wait_that_is_over(stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stub.hold = True
    identifier = stub.submit(MODEL, {}).id
    assert exits.Exit.SERVER == execute(["result", identifier, "--wait", "--timeout", "0.2", "--json"])
    error = json.loads(capfd.readouterr().out)["error"]
    assert ("WaitTimeout", identifier) == (error["type"], error["request_id"])


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    ("word", "status"), [("failed", exits.Exit.FAILED), ("cancelled", exits.Exit.CANCELLED)]
)
def test_a_request_without_success_has_its_own_status(
    stub: StubServer,
    here: Path,
    capfd: pytest.CaptureFixture[str],
    word: str,
    status: exits.Exit,
    waits: bool,
) -> None:
    error = {"code": "out_of_memory", "message": "too large"}
    stub.outcome = {"status": word, **({"error": error} if word == "failed" else {})}
    identifier = ended(stub)
    assert status == execute(["result", identifier, "--json", *(["--wait"] if waits else [])])
    printed = capfd.readouterr()
    assert word == json.loads(printed.out)["status"]
    assert word in printed.err


def test_what_is_not_there_or_makes_no_sense(stub: StubServer, here: Path) -> None:
    assert exits.Exit.NOT_FOUND == execute(["result", "nobody"])
    assert exits.Exit.NOT_FOUND == execute(["result", "nobody", "--wait"])
    assert exits.Exit.USAGE == execute(["result", ".."])
    assert exits.Exit.USAGE == execute(["result", "nobody", "--timeout", "1"])
    assert exits.Exit.UNAUTHORIZED == execute(["result", "nobody", "--api-key", "wrong"])
    assert exits.Exit.UNREACHABLE == execute(["result", "x", "--wait", "--base-url", "http://127.0.0.1:9"])
    assert exits.Exit.FAILED == execute(["result", ended(stub), "--output-dir", "/proc/foo"])


def test_ctrl_c_leaves_the_request_alone(stub: StubServer, here: Path) -> None:
    stub.polls, stub.hold = [{"status": "in_queue", "queue_position": 3}], True
    job = stub.submit(MODEL, {})
    process = subprocess.Popen(
        [sys.executable, "-m", "rushes.cli.main", "result", job.id, "--wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not stub.calls("GET", "/status$"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate()
    assert (130, "", "in_queue") == (process.returncode, printed, job.state)
    assert f"request {job.id} goes on; `rushes result {job.id} --wait` waits for it" in told
    assert [] == stub.calls("POST", "/cancel$")
