"""Two real servers, one behind the other: what one cannot do itself it has done by the other, once."""

import json
import time
from pathlib import Path
from typing import Any

import av
import httpx
import pytest

from rushes.requests.record import Request
from support.server import T2I, Server, eventually, free_port

FLF = "community/wan-2-2/first-last-frame"


@pytest.fixture
def far(make_server, tmp_path: Path) -> Server:
    """The server that has the engine. Its runs are written down, and "until gate" waits for a file."""
    settings = {"test_runs": tmp_path / "far-runs", "test_gates": tmp_path, "workers": 2}
    server: Server = make_server("far", **settings)
    return server.start()


def behind(far: Server, **more: object) -> dict[str, Any]:
    """Settings of a server that may use ``far``."""
    return {"remotes": f"far=runcomfy@{far.url}", "remote_far_key": far.key} | more


def record(server: Server, id_: str) -> Request:
    found: Request | None = server.with_store(lambda store: store.get(id_))
    assert found is not None
    return found


def handed_over(server: Server, id_: str) -> Request:
    """The request, once ``far`` has it and that is written down."""

    def there() -> Request | None:
        one = record(server, id_)
        return one if one.remote_task is not None and one.remote_task.phase == "accepted" else None

    found: Request = eventually(there, 30, f"{id_} is handed over")
    return found


def runs(tmp_path: Path, name: str = "far-runs") -> list[str]:
    return [line.split()[0] for line in (tmp_path / name).read_text().splitlines()]


def test_a_picture_comes_through_both(make_server) -> None:
    far: Server = make_server("far", engine="draft").start()
    near: Server = make_server("near", workers=0, **behind(far)).start()
    body = {"prompt": "a red kite over the sea", "aspect_ratio": "1024:1365 (3:4)"}
    answer = near.call("POST", f"/v1/models/{T2I}", json=body)
    result = near.finished(answer.json()["request_id"])
    assert ("succeeded", "far", "draft") == (result["status"], result["engine"], result["remote_engine"])
    assert [(1024, 1365)] == [(file["width"], file["height"]) for file in result["files"]]
    picture = httpx.get(result["output"]["image"])
    assert picture.content.startswith(b"\x89PNG")
    # It lies here now: the other server may forget it.
    far.stop()
    assert picture.content == httpx.get(result["output"]["image"]).content


def test_a_video_with_its_two_pictures_comes_through_both(make_server, tmp_path) -> None:
    far: Server = make_server("far", engine="draft").start()
    near: Server = make_server("near", workers=0, **behind(far)).start()
    sample = near.get(f"/v1/models/{FLF}")["sample"]
    id_ = near.call("POST", f"/v1/models/{FLF}", json=sample).json()["request_id"]
    result = near.finished(id_, 90)
    assert "succeeded" == result["status"], result
    (file,) = result["files"]
    task = record(near, id_).remote_task
    assert task is not None
    (made,) = far.result(json.loads(task.handle)["id"])["files"]
    assert made["content_type"] == file["content_type"]
    for name in ("width", "height", "frames", "fps", "size"):
        assert made[name] == file[name], name
    path = tmp_path / "video.mp4"
    path.write_bytes(httpx.get(file["url"]).content)
    with av.open(str(path)) as container:
        assert file["frames"] == sum(1 for _ in container.decode(video=0))


def test_what_the_other_refuses_is_told(make_server, far) -> None:
    near: Server = make_server("near", workers=0, **behind(far)).start()
    result = near.finished(near.submit("fail"))
    assert "failed" == result["status"]
    assert "remote_failed" == result["error"]["code"]
    assert "The prompt asks to fail." in result["error"]["message"]


def test_kill_9_of_everything_while_the_other_works(make_server, far, database, tmp_path) -> None:
    near: Server = make_server("near", workers=0, **behind(far), **database).start()
    id_ = near.submit("until gate")
    handed_over(near, id_)
    near.kill_everything()
    near.start()
    (tmp_path / "gate").touch()
    result = near.finished(id_)
    assert ("succeeded", "far") == (result["status"], result["engine"])
    assert 1 == len(runs(tmp_path))


def test_a_stop_does_not_wait_for_the_other(make_server, far, tmp_path) -> None:
    near: Server = make_server("near", workers=0, drain_seconds=60, **behind(far)).start()
    id_ = near.submit("until gate")
    handed_over(near, id_)
    assert 0 == near.stop()
    assert "queued" == record(near, id_).state
    (tmp_path / "gate").touch()
    near.start()
    assert "succeeded" == near.finished(id_)["status"]
    assert (1, 1) == (len(runs(tmp_path)), record(near, id_).attempt)


def test_kill_9_of_the_other_loses_nothing(make_server, tmp_path) -> None:
    settings = {"test_runs": tmp_path / "far-runs", "test_gates": tmp_path, "port": 0}
    far: Server = make_server("far", **settings).start()
    address = far.url.rpartition(":")[2]
    near: Server = make_server("near", workers=0, **behind(far)).start()
    id_ = near.submit("until gate")
    handed_over(near, id_)
    far.kill_everything()
    later = near.submit("ok")
    tried = f'"event":"remote took nothing","request":"{later}"'
    eventually(lambda: tried in near.log.read_text(), 30, "it was tried, and not taken")
    eventually(lambda: near.status(later)["status"] == "in_queue", 10, "it waits")
    far._arguments = ("--port", address)
    (tmp_path / "gate").touch()
    far.start()
    assert ["succeeded"] * 2 == [near.finished(one, 60)["status"] for one in (id_, later)]
    assert {1} == {record(near, one).attempt for one in (id_, later)}


def test_full_slots_overflow_to_the_other_and_nothing_runs_twice(make_server, far, tmp_path) -> None:
    near: Server = make_server(
        "near", overflow_seconds=1, test_runs=tmp_path / "near-runs", **behind(far)
    ).start()
    ids = [near.submit("sleep 0.4") for _ in range(24)]
    results = [near.finished(id_, 60) for id_ in ids]
    assert {"succeeded"} == {result["status"] for result in results}
    engines = [result["engine"] for result in results]
    assert {"prompt", "far"} == set(engines)
    here = runs(tmp_path, "near-runs")
    assert (engines.count("prompt"), engines.count("far")) == (len(here), len(runs(tmp_path)))
    assert sorted(here) == sorted({id_ for id_, engine in zip(ids, engines, strict=True) if engine == "prompt"})


def test_two_that_pass_on_to_each_other_come_to_an_end(make_server) -> None:
    ports = [free_port(), free_port()]
    made: list[Server] = []
    for port, other in zip(ports, reversed(ports), strict=True):
        place = f"other=runcomfy@http://127.0.0.1:{other}"
        made.append(
            make_server(f"at-{port}", workers=0, remotes=place, arguments=("--port", str(port))).start()
        )
    one, two = made
    for server, other_server in ((one, two), (two, one)):
        server.stop()
        server.settings["remote_other_key"] = other_server.key
    one.start()
    two.start()
    id_ = one.submit("ok")
    counts = [lambda server=server: server.with_store(lambda store: store.counts()) for server in made]
    eventually(lambda: all(sum(count().values()) == 2 for count in counts), 40, "three hops")
    time.sleep(1.5)  # a fourth would come at once
    assert [2, 2] == [sum(count().values()) for count in counts]
    assert "in_progress" == one.status(id_)["status"]


def test_a_wrong_key_fails_nobody_and_says_so(make_server, far) -> None:
    near: Server = make_server(
        "near", workers=0, **(behind(far) | {"remote_far_key": "wrong-and-secret"})
    ).start()
    id_ = near.submit("ok")
    eventually(lambda: "refuses the key" in near.log.read_text(), 30, "the log says what is wrong")
    eventually(lambda: near.status(id_)["status"] == "in_queue", 10, "it waits again")
    # The worker tells of it within some seconds.
    eventually(lambda: "refuses the key" in near.command("models", "route", T2I), 20, "the command says it too")
    assert "wrong-and-secret" not in near.command("models", "route", T2I) + near.log.read_text()


def test_a_slot_is_not_given_the_keys(make_server, far) -> None:
    near: Server = make_server("near", **behind(far)).start()
    (line,) = [one for one in near.one("worker").environ().items() if one[0] == "RUSHES_REMOTE_FAR_KEY"]
    assert far.key == line[1]
    assert "RUSHES_REMOTE_FAR_KEY" not in near.one("slot").environ()


def test_a_server_without_its_key_does_not_start(make_server) -> None:
    near: Server = make_server("near", workers=0, remotes="fal")
    process = near.spawn()
    assert 0 != process.wait(30)
    assert "FAL_KEY" in near.log.read_text()
