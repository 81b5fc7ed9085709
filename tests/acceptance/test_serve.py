"""`rushes serve` as a user runs it: real processes, real sockets, real signals."""

import json
import signal

import httpx
import pytest

from rushes.queue.base import Store
from support.server import T2I, Server, eventually


def test_a_request_goes_in_and_a_file_comes_out(make_server) -> None:
    server: Server = make_server().start()
    id_ = server.submit("ok")
    result = server.finished(id_)
    assert result["status"] == "succeeded"
    assert result["engine"] == "prompt"
    assert result["output"]["images"] == [result["output"]["image"]]
    answer = httpx.get(result["output"]["image"])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")
    assert server.stop() == 0


def test_the_first_start_shows_a_key_once(make_server) -> None:
    server: Server = make_server(engine="noop")
    server.start()
    shown = server.log.read_text().split("API key, shown this once: ")
    key = shown[1].split()[0]
    assert server.call("GET", key=key, path="/v1/models").status_code == 200
    server.stop()
    server.start()
    assert server.log.read_text().count("API key") == 1
    assert server.call("GET", key=key, path="/v1/models").status_code == 200
    server.stop()


def test_a_second_server_on_the_same_directory_refuses(make_server) -> None:
    first: Server = make_server(engine="noop").start()
    second = Server(first.data_dir)
    second.log = first.data_dir.parent / "second.log"
    process = second.spawn()
    assert process.wait(20) != 0
    assert "another server runs on" in second.log.read_text()
    assert first.result(first.submit("ok"))
    assert first.stop() == 0


def test_sigterm_lets_running_requests_finish(make_server) -> None:
    server: Server = make_server(workers=1, drain_seconds=20).start()
    id_ = server.submit("sleep 1.5")
    server.running(id_)
    waiting = server.submit("ok")
    assert server.stop() == 0
    server.start()
    assert server.finished(id_)["status"] == "succeeded"
    assert server.finished(waiting)["status"] == "succeeded"
    attempts = server.with_store(lambda store: _attempts(store, id_))
    assert attempts == 1
    server.stop()


def test_what_does_not_finish_while_draining_goes_back_uncounted(make_server) -> None:
    server: Server = make_server(drain_seconds=0.3).start()
    id_ = server.submit("sleep 2")
    server.running(id_)
    assert server.stop() == 0
    record = server.with_store(lambda store: store.get(id_))
    assert (record.state, record.attempt) == ("queued", 0)
    server.settings["drain_seconds"] = 20
    server.start()
    assert server.finished(id_)["status"] == "succeeded"


def test_a_restart_goes_on_where_it_was(make_server) -> None:
    server: Server = make_server(workers=0).start()
    ids = [server.submit("ok") for _ in range(5)]
    assert [server.status(id_)["queue_position"] for id_ in ids] == [1, 2, 3, 4, 5]
    server.stop()
    server.settings["workers"] = 2
    server.start()
    assert {server.finished(id_)["status"] for id_ in ids} == {"succeeded"}
    server.stop()


def test_warm_models_are_preferred(make_server, tmp_path) -> None:
    warmed = tmp_path / "warmed"
    server: Server = make_server(workers=0, test_warmed=warmed).start()
    image = "Runcomfy_Example_1290_1.png"
    with server.client() as client:
        for number in range(6):
            if number % 2:
                answer = client.post(f"/v1/models/{T2I}", json={"prompt": "ok"})
            else:
                answer = client.post(
                    "/v1/models/community/wan-2-2/vace-fun", json={"56_text": "ok", "118_image": image}
                )
            last = answer.json()["request_id"]
    server.stop()
    server.settings["workers"] = 1
    server.start()
    server.finished(last)
    eventually(lambda: server.with_store(lambda store: store.counts())["succeeded"] == 6)
    assert warmed.read_text().split() == ["community/wan-2-2/vace-fun", T2I]
    server.stop()


def test_a_worker_of_its_own_joins_and_leaves(make_server, tmp_path) -> None:
    import subprocess
    import sys

    server: Server = make_server(workers=0).start()
    id_ = server.submit("ok")
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "rushes.cli.main", "worker", "--workers", "1", "--models", "wan-ai/*"],
            env=server.environment,
            stderr=log,
        )
    try:
        assert server.finished(id_)["status"] == "succeeded"
        other = server.call(
            "POST",
            "/v1/models/community/wan-2-2/vace-fun",
            json={"56_text": "ok", "118_image": "Runcomfy_Example_1290_1.png"},
        )
        later = server.submit("ok")
        assert server.finished(later)["status"] == "succeeded"
        assert server.status(other.json()["request_id"])["status"] == "in_queue"
        records = server.with_store(lambda store: store.workers())
        assert [record.models for record in records] == [(T2I,)]
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
    assert server.with_store(lambda store: store.workers()) == []
    server.stop()


def test_operator_commands(make_server) -> None:
    server: Server = make_server(workers=0).start()
    key = server.command("keys", "create", "--name", "app").strip()
    assert key.startswith("rsh_")
    assert "app" in server.command("keys", "list")
    assert key not in server.command("keys", "list")
    assert server.call("GET", key=key, path="/v1/models").status_code == 200
    server.command("keys", "revoke", "app")
    assert server.call("GET", key=key, path="/v1/models").status_code == 401
    assert "there is no live key" in server.command("keys", "revoke", "app", status=6).lower()
    id_ = server.submit("ok")
    assert id_ in server.command("requests", "list")
    shown = json.loads(server.command("requests", "show", id_))
    assert (shown["state"], shown["input"]["prompt"]) == ("queued", "ok")
    assert server.command("requests", "cancel", id_).strip() == "cancelled"
    assert server.status(id_)["status"] == "cancelled"
    assert "not running here" not in server.command("doctor")
    assert "answers 200" in server.command("doctor")
    server.stop()
    assert "not running here" in server.command("doctor")


def test_logs_hold_no_keys_and_no_prompts(make_server) -> None:
    server: Server = make_server().start()
    id_ = server.submit("ok verysecretprompt")
    url = server.finished(id_)["output"]["image"]
    httpx.get(url)
    with server.client("rsh_wrongwrongwrong") as client:
        assert client.get(f"/v1/requests/{id_}/status").status_code == 401
    server.stop()
    log = server.log.read_text()
    assert id_ in log
    assert "verysecretprompt" not in log
    assert log.count(server.key) == 1  # shown at the first start, and never again
    assert "rsh_wrongwrongwrong" not in log
    assert "signature" not in log


def test_an_engine_that_does_not_load_uses_up_no_attempts(make_server) -> None:
    server: Server = make_server(engine="support.engines:Missing").start()
    id_ = server.submit("ok")
    eventually(lambda: "engine not started" in server.log.read_text(), 20)
    assert "has no attribute 'Missing'" in server.log.read_text()
    assert "Fatal Python error" not in server.log.read_text()
    assert server.status(id_)["status"] == "in_queue"
    server.stop()
    server.settings["engine"] = "support.engines:PromptEngine"
    server.start()
    assert server.finished(id_)["status"] == "succeeded"
    server.stop()


async def _attempts(store: Store, id_: str) -> int:
    record = await store.get(id_)  # type: ignore[arg-type]
    assert record is not None
    return record.attempt


def test_a_model_folder_is_picked_up_without_a_restart(make_server, tmp_path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    server: Server = make_server(models_dir=folder).start()
    ours = folder / "me" / "mine"
    ours.mkdir(parents=True)
    text = """
name = "Mine"
description = "A model of my own."
categories = ["text-to-image"]
output = "image"
required = ["prompt"]

[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"
"""
    (ours / "model.toml").write_text(text)
    (ours / "sample.json").write_text('{"prompt": "ok"}')

    def known() -> bool:
        return server.call("GET", "/v1/models/me/mine").status_code == 200

    eventually(known, 10)
    id_ = server.submit("ok", model="me/mine")
    assert server.finished(id_)["status"] == "succeeded"
    (ours / "model.toml").write_text(text.replace('type = "string"', 'type = "colour"'))
    eventually(lambda: "model not usable" in server.log.read_text(), 10)
    assert server.call("GET", f"/v1/models/{T2I}").status_code == 200
    assert "colour" in server.command("models", "check", status=1)
    server.stop()


def test_while_it_drains_a_server_answers_polls_and_takes_nothing_new(make_server) -> None:
    server: Server = make_server(drain_seconds=20).start()
    id_ = server.submit("sleep 3")
    server.running(id_)
    waiting = server.submit("ok")
    process = server.process
    process.send_signal(signal.SIGTERM)
    refused = eventually(lambda: refusal(server), 5, "a submit is refused")
    assert 503 == refused.status_code
    assert refused.headers["retry-after"]
    assert "in_progress" == server.status(id_)["status"]
    assert "cancelled" == server.call("POST", f"/v1/requests/{waiting}/cancel").json()["outcome"]
    assert 0 == process.wait(30)
    record = server.with_store(lambda store: store.get(id_))
    assert ("succeeded", 1) == (record.state, record.attempt)


def refusal(server: Server) -> httpx.Response | None:
    answer = server.call("POST", f"/v1/models/{T2I}", json={"prompt": "ok"})
    return None if answer.status_code == 200 else answer


def test_one_database_has_one_storage(make_server, postgres) -> None:
    url = postgres.create_database()
    first: Server = make_server("one", database_url=url, engine="noop").start()
    second: Server = make_server("two", database_url=url, engine="noop")
    assert 0 != second.spawn().wait(30)
    assert "need the same RUSHES_STORAGE_URL" in second.log.read_text()
    assert "Traceback" not in second.log.read_text()
    assert 0 == first.stop()
    first.start()
    assert 0 == first.stop()


@pytest.mark.parametrize(
    ("settings", "text", "status"),
    [
        ({"engine": "nope"}, "module:factory", 2),
        ({"storage_url": "ftp://x"}, "s3://", 2),
        ({"database_url": "mysql://x"}, "postgresql://", 2),
        ({"fetch_allow": "nonsense", "public_url": "foo"}, "RUSHES_FETCH_ALLOW", 2),
    ],
)
def test_wrong_settings_are_one_clear_message(make_server, settings, text, status) -> None:
    server: Server = make_server(**settings)
    assert status == server.spawn().wait(30)
    log = server.log.read_text()
    assert text in log
    assert "Traceback" not in log
    assert len(log.splitlines()) <= 3
