"""What `rushes doctor` and `rushes requests` tell of remote engines."""

import asyncio
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rushes.cli.exits import Exit
from rushes.cli.main import execute
from rushes.queue.base import Take
from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import AccountId, KeyId, WorkerId, new_request_id
from rushes.requests.record import Lease, NewRequest, Output, RemoteState, RemoteTask, WorkerRecord

KEYS = ("DASHSCOPE_API_KEY", "RUNCOMFY_TOKEN", "FAL_KEY", "REPLICATE_API_TOKEN", "OPENAI_API_KEY")
SECRET = "key-that-nobody-may-see"
MANIFEST = """
name = "Portrait"
description = "A portrait."
output = "image"

[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"
default = "x"

[engines.fal]
model = "fal-ai/portrait"

[engines.openai-video]
model = "portrait"
"""


class Answering(ThreadingHTTPServer):
    """Answers 401 to all, and keeps the headers of what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Refusing)
        self.asked: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Answering)
        self.server.asked.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def remote() -> Iterator[Answering]:
    with Answering() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RUSHES_") or name in KEYS]:
        monkeypatch.delenv(name)
    model = tmp_path / "models" / "studio" / "portrait"
    model.mkdir(parents=True)
    (model / "model.toml").write_text(MANIFEST)
    (model / "sample.json").write_text('{"prompt": "x"}')
    monkeypatch.setenv("RUSHES_MODELS_DIR", str(tmp_path / "models"))
    return tmp_path


def doctor(capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = execute(["doctor"])
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    return status, printed.out.splitlines()


def of(lines: list[str], what: str) -> list[str]:
    return [line for line in lines if line[6:].startswith(f"{what}:")]


def test_doctor_says_nothing_of_remotes_where_there_are_none(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, lines = doctor(capfd)
    assert (0, []) == (status, [line for line in lines if "remote" in line])


def test_doctor_asks_each_remote_without_its_key(
    here: Path, remote: Answering, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUSHES_REMOTES", f"box=openai-video@{remote.url}/v1")
    monkeypatch.setenv("RUSHES_REMOTE_BOX_KEY", SECRET)
    status, lines = doctor(capfd)
    assert [
        f"ok    remote box: openai-video at {remote.url}/v1 answers (401, asked without a key)",
        "ok    remote box: its key is there, from RUSHES_REMOTE_BOX_KEY",
        "ok    remote box: has studio/portrait",
    ] == of(lines, "remote box")
    assert 0 == status
    assert [None] == [headers.get("authorization") for headers in remote.asked]
    assert of(lines, "budget")[0].startswith("note  budget: none: RUSHES_BUDGET_USD_PER_DAY")


def test_doctor_notes_what_cannot_be_reached(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RUSHES_REMOTES", f"box=openai-video@{url}/v1")
    monkeypatch.setenv("RUSHES_BUDGET_USD_PER_DAY", "5")
    status, lines = doctor(capfd)
    first, key, _ = of(lines, "remote box")
    assert f"note  remote box: openai-video at {url}/v1 cannot be reached from here" in first
    assert "note  remote box: no key is sent; if it wants one, set RUSHES_REMOTE_BOX_KEY" == key
    assert (0, []) == (status, of(lines, "budget"))


def test_doctor_names_the_key_that_is_missing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One without a key keeps nobody from hearing of the others."""
    monkeypatch.setenv("RUSHES_REMOTES", "fal, replicate")
    status, lines = doctor(capfd)
    assert 1 == status
    for name, variable in (("fal", "FAL_KEY"), ("replicate", "REPLICATE_API_TOKEN")):
        (line,) = of(lines, f"remote {name}")
        assert line.startswith("bad ")
        assert f"set {variable} or RUSHES_REMOTE_{name.upper()}_KEY" in line


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_doctor_looks_at_the_secrets_file(
    here: Path, remote: Answering, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = here / "secrets.toml"
    file.write_text(f'RUSHES_REMOTE_FAL_KEY = "{SECRET}"\n')
    file.chmod(0o644)
    monkeypatch.setenv("RUSHES_REMOTES", f"fal@{remote.url}")
    monkeypatch.setenv("RUSHES_SECRETS_FILE", str(file))
    status, lines = doctor(capfd)
    expected = f"bad   secrets file: {file} (secrets_file) can be read by other users: chmod 600 {file}"
    assert (1, [expected]) == (status, of(lines, "secrets file"))
    assert f"ok    remote fal: its key is there, from the secrets file {file}" in lines
    file.chmod(0o600)
    assert (0, []) == ((found := doctor(capfd))[0], of(found[1], "secrets file"))


def test_doctor_tells_of_keys_that_are_sent_nowhere(
    here: Path, remote: Answering, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in KEYS:
        monkeypatch.setenv(name, SECRET)
    _, lines = doctor(capfd)
    for name in KEYS:
        (line,) = of(lines, name)
        assert line.startswith(f"note  {name}: is set, and nothing is sent to ")
    monkeypatch.setenv("RUSHES_REMOTES", f"other=runcomfy@{remote.url}")
    _, lines = doctor(capfd)
    assert [] == of(lines, "RUNCOMFY_TOKEN")
    assert "RUNCOMFY_TOKEN is for runcomfy's own address and not sent here" in of(lines, "remote other")[1]
    assert "has community/wan-2-1/fusionx/image-to-video, " in of(lines, "remote other")[2]


def test_doctor_names_models_whose_routes_leave_a_remote_out(
    here: Path, remote: Answering, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = here / "models" / "studio" / "portrait" / "model.toml"
    manifest.write_text(f'{MANIFEST}\n[[routes]]\nengine = "fal"\n')
    monkeypatch.setenv("RUSHES_REMOTES", f"box=openai-video@{remote.url}/v1")
    _, lines = doctor(capfd)
    line = of(lines, "remote box")[2]
    assert "note  remote box: no model runs there; the routes of studio/portrait leave it out" in line
    manifest.write_text(MANIFEST.partition("[engines.openai-video]")[0])
    assert "none has [engines.openai-video] (docs/models.md)" in of(doctor(capfd)[1], "remote box")[2]


def write(
    here: Path, *, cost: float | None = None, states: tuple[RemoteState, ...] = (), released: bool = False
) -> str:
    """A worker with these remotes, and a request that ran at fal, or waits for a worker that has it."""

    async def run() -> str:
        store = SqliteStore(here / "rushes-data" / "rushes.db")
        await store.open()
        id_ = new_request_id()
        try:
            me = WorkerId("me")
            record = WorkerRecord(me, platform.node(), os.getpid(), 0, (), "draft", "", remotes=states)
            await store.join(record)
            new = NewRequest(id_, AccountId("default"), KeyId("k"), "studio/portrait", b'{"prompt": "x"}', {})
            await store.submit(new)
            lease = await store.take(Take(id_, me, "fal"))
            assert isinstance(lease, Lease)
            task = RemoteTask("fal", "accepted", 1.0, handle="its-own-id", cost_usd=cost)
            assert await store.note(lease, task)
            if released:
                assert await store.release(lease)
            if cost is not None:
                output = Output("outputs/x/1/1.png", "image", "image/png", 10, 64, 64)
                assert await store.succeed(lease, [output], None)
        finally:
            await store.close()
        return id_

    return asyncio.run(run())


def test_doctor_tells_how_remotes_stand(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    until = time.time() + 3600
    write(
        here,
        states=(
            RemoteState("fal", "fal", ("studio/portrait",), 8),
            RemoteState("box", "openai-video", (), 4, "open", until, "it does not answer"),
        ),
    )
    (here / "rushes-data" / "files").mkdir()
    _, lines = doctor(capfd)
    clock = time.strftime("%H:%M:%S", time.localtime(until))
    assert "ok    remote fal: 1 worker(s) have it, 8 request(s) at once" in lines
    expected = f"1 worker(s) have it, 4 request(s) at once; it is not tried until {clock}: it does not answer"
    assert f"note  remote box: {expected}" in lines


def test_the_operator_sees_what_a_remote_has_and_took(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    running = write(here)
    assert 0 == execute(["requests", "show", running])
    record = json.loads(capfd.readouterr().out)
    expected = {"remote": "fal", "phase": "accepted", "submitted_at": 1.0, "handle": "its-own-id"}
    assert ("running", "fal", expected) == (record["state"], record["engine"], record["remote_task"])
    ended = write(here, cost=0.05)
    assert 0 == execute(["requests", "show", ended])
    assert 0.05 == json.loads(capfd.readouterr().out)["remote_task"]["cost_usd"]
    assert 0 == execute(["requests", "list"])
    header, first, second = (line.split() for line in capfd.readouterr().out.splitlines()[:3])
    assert "usd" == header[7]
    assert [ended, "fal", "0.05"] == [first[0], first[4], first[-1]]
    assert [running, "fal"] == [second[0], second[4]]


def test_requests_of_a_remote_that_nobody_has_any_more(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ids = [write(here, released=True) for _ in range(2)]
    _, lines = doctor(capfd)
    (line,) = of(lines, "remote fal")
    assert line.startswith("note  remote fal: 2 requests wait for it, and no live worker has it: ")
    assert f"`rushes requests fail ID` ({ids[1]}, {ids[0]})" in line

    assert 0 == execute(["requests", "fail", ids[0], "--why", "fal is\nout of business."])
    assert "failed\n" == capfd.readouterr().out
    assert 0 == execute(["requests", "show", ids[0]])
    record = json.loads(capfd.readouterr().out)
    failure = {"code": "remote_lost", "message": "fal is out of business."}
    assert ("failed", failure) == (record["state"], record["failure"])

    write(here, states=(RemoteState("fal", "fal", ("studio/portrait",), 8),), released=True)
    assert [] == [line for line in of(doctor(capfd)[1], "remote fal") if "wait" in line]


def test_only_what_waits_for_a_remote_is_given_up(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    running, ended = write(here), write(here, cost=0.05)
    for id_, said in (
        (running, "it is running; a worker asks the remote about it"),
        (ended, "it is succeeded"),
    ):
        assert 1 == execute(["requests", "fail", id_])
        assert f"It does not wait for a remote: {said}.\n" == capfd.readouterr().err
    assert Exit.NOT_FOUND == execute(["requests", "fail", "nobody"])
    assert Exit.USAGE == execute(["requests", "fail", running, "--why", " "])
    waiting = write(here, released=True)
    assert 0 == execute(["requests", "fail", waiting])
    capfd.readouterr()
    assert 0 == execute(["requests", "show", waiting])
    said = json.loads(capfd.readouterr().out)["failure"]["message"]
    assert said.startswith("The remote engine that had this request is not in use any more.")
