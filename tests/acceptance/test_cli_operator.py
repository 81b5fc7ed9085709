"""An operator's and a user's commands against a real server, in folders right and wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from support.server import T2I, Server, environment, eventually


def rushes(
    *arguments: str, cwd: Path, server: Server | None = None, **settings: object
) -> "subprocess.CompletedProcess[str]":
    known = {"base_url": server.url, "api_key": server.key} if server else {}
    return subprocess.run(
        [sys.executable, "-m", "rushes.cli.main", *arguments],
        cwd=cwd,
        env=environment(**known, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_request_is_fetched_later_and_from_anywhere(make_server, tmp_path: Path) -> None:
    server: Server = make_server().start()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    submitted = rushes("run", T2I, "-i", "prompt=sleep 0.5", "--no-wait", cwd=elsewhere, server=server)
    identifier = submitted.stdout.strip()
    assert f"`rushes result {identifier} --wait`" in submitted.stderr
    early = rushes("result", identifier, cwd=elsewhere, server=server)
    assert early.returncode in (0, 9), early.stderr
    done = rushes("result", identifier, "--wait", "--output-dir", "out", cwd=elsewhere, server=server)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / done.stdout.strip()).read_bytes().startswith(b"\x89PNG")
    listed = rushes("models", "list", cwd=elsewhere, server=server)
    assert T2I in listed.stdout
    assert f"as {server.url} shows it" in listed.stderr
    shown = json.loads(rushes("models", "show", T2I, "--json", cwd=elsewhere, server=server).stdout)
    assert shown["input_schema"]["required"] == ["prompt"]
    stranger = rushes("run", T2I, "-i", "prompt=ok", "--api-key", "rsh_x", cwd=elsewhere, server=server)
    assert stranger.returncode == 4
    assert "in the server's folder, or with its --data-dir" in stranger.stderr
    assert server.stop() == 0


def test_a_picture_that_is_not_here(make_server, tmp_path: Path) -> None:
    server: Server = make_server(engine="noop").start()
    arguments = ("-i", "56_text=ok", "-i", "118_image=nope.png", "--json")
    done = rushes("run", "community/wan-2-2/vace-fun", *arguments, cwd=tmp_path, server=server)
    assert done.returncode == 5
    assert [field["field"] for field in json.loads(done.stdout)["error"]["fields"]] == ["118_image"]
    assert "there is no file 'nope.png' here" in done.stderr
    assert ".." not in done.stderr
    assert server.stop() == 0


def test_operator_commands_in_the_wrong_folder_make_nothing(make_server, tmp_path: Path) -> None:
    server: Server = make_server(engine="noop").start()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for arguments in (("requests", "list"), ("keys", "list"), ("doctor",)):
        done = rushes(*arguments, cwd=wrong)
        assert done.returncode == (0 if arguments == ("doctor",) else 2), done.stderr
        assert "--data-dir" in done.stdout + done.stderr
    assert list(wrong.iterdir()) == []
    made = rushes("keys", "create", "--name", "lost", cwd=wrong)
    assert str(wrong / "rushes-data" / "rushes.db") in made.stderr
    assert "a new one was made" in made.stderr
    right = rushes("keys", "create", "--name", "found", "--data-dir", str(server.data_dir), cwd=wrong)
    assert str(server.data_dir / "rushes.db") in right.stderr
    assert server.call("GET", "/v1/models", key=made.stdout.strip()).status_code == 401
    assert server.call("GET", "/v1/models", key=right.stdout.strip()).status_code == 200
    assert server.stop() == 0


def test_a_run_outlives_a_restart_of_its_server(make_server, tmp_path: Path) -> None:
    server: Server = make_server().start()
    port = server.url.rpartition(":")[2]
    identifier = server.submit("sleep 2")
    server.running(identifier)
    process = subprocess.Popen(
        [sys.executable, "-m", "rushes.cli.main", "result", identifier, "--wait"],
        cwd=tmp_path,
        env=environment(base_url=server.url, api_key=server.key),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert identifier in process.stderr.readline()
    server.kill_everything()
    again = Server(server.data_dir, arguments=("--port", port))
    again.key = server.key
    try:
        again.start()
        printed, told = process.communicate(timeout=60)
    finally:
        again.stop()
    assert process.returncode == 0, told
    assert (tmp_path / printed.strip()).exists()


def test_a_worker_whose_patterns_fit_nothing_says_so(make_server, tmp_path: Path) -> None:
    server: Server = make_server(engine="noop", workers=0).start()
    log = tmp_path / "worker.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "rushes.cli.main", "worker", "--models", "nope/*,wan-ai/*"],
            env=server.environment,
            stdout=sink,
            stderr=sink,
        )
    try:
        eventually(lambda: "worker joined" in log.read_text(), what="the worker joined")
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(30)
    assert "warning: no model fits --models 'nope/*'" in log.read_text()
    assert "wan-ai" not in log.read_text().partition("worker joined")[0]
    assert server.stop() == 0
