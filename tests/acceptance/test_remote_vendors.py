"""A whole server in front of each vendor's stub: what a user sees of a request that ran there, and of one that could
not.
"""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.remote_dashscope import DashScopeStub
from support.remote_fal import FalStub
from support.remote_openai import NAME, OpenAIStub
from support.remote_replicate import ReplicateStub
from support.remote_stub import KEY, Fault, RemoteStub, Reply, Seen, running
from support.server import T2I, Server, eventually

OWN = "me/film"
MANIFEST = """
name = "Film"
output = "{output}"
required = ["prompt"]

[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"

{tables}
"""
TABLES = {
    "replicate": '[engines.replicate]\nmodel = "black-forest-labs/flux-schnell"\nprice_usd = 0.25',
    "openai-video": f'[engines.openai-video]\nmodel = "{NAME}"\nprice_usd = 0.125',
}


def serving(make_server: Any, stub: RemoteStub, kind: str, folder: Path, **more: Any) -> Server:
    """A server without slots of its own, before the stub."""
    model = folder / "models" / "me" / "film"
    model.mkdir(parents=True, exist_ok=True)
    output = "video" if kind == "openai-video" else "image"
    (model / "model.toml").write_text(MANIFEST.format(output=output, tables=TABLES.get(kind, "")))
    (model / "sample.json").write_text('{"prompt": "a red kite"}')
    place = f"{stub.url}/v1" if kind == "openai-video" else stub.url
    settings = {"remotes": f"there={kind}@{place}", "remote_there_key": KEY, "models_dir": folder / "models"}
    server: Server = make_server("near", workers=0, **settings, **more)
    return server.start()


def downloaded(result: dict[str, Any]) -> bytes:
    (file,) = result["files"]
    content = httpx.get(file["url"]).content
    assert len(content) == file["size"]
    return content


@pytest.mark.parametrize(
    ("kind", "stub", "model", "magic", "cost"),
    [
        ("dashscope", DashScopeStub, T2I, b"\x89PNG", None),
        ("fal", FalStub, T2I, b"\x89PNG", 0.05),
        ("replicate", ReplicateStub, OWN, b"\x89PNG", 0.25),
        ("openai-video", OpenAIStub, OWN, b"ftyp", 0.125),
    ],
)
def test_a_request_runs_there_and_its_file_lies_here(
    kind: str, stub: Any, model: str, magic: bytes, cost: float | None, make_server, tmp_path
) -> None:
    with running(stub()) as vendor:
        if kind == "fal":
            vendor.models["fal-ai/wan-25-preview/text-to-image"] = "image"
        server = serving(make_server, vendor, kind, tmp_path)
        result = server.finished(server.submit("a red kite over the sea", model))
        assert ("succeeded", "there") == (result["status"], result["engine"]), result
        assert cost == result.get("engine_cost_usd")
        assert magic in downloaded(result)[:12]
        assert KEY not in server.log.read_text()


def test_every_size_of_the_seed_comes_back_exactly(make_server, tmp_path) -> None:
    with running(DashScopeStub(), once=False) as vendor:
        server = serving(make_server, vendor, "dashscope", tmp_path)
        schema = server.get(f"/v1/models/{T2I}")["input_schema"]
        sizes = schema["properties"]["aspect_ratio"]["enum"]
        ids = [
            server.call("POST", f"/v1/models/{T2I}", json={"prompt": "a kite", "aspect_ratio": size}).json()
            for size in sizes
        ]
        results = [server.finished(one["request_id"]) for one in ids]
        wanted = [tuple(map(int, size.split()[0].split(":"))) for size in sizes]
        assert 13 == len(wanted)
        assert wanted == [(one["files"][0]["width"], one["files"][0]["height"]) for one in results]


def test_what_the_vendor_refuses_the_user_reads(make_server, tmp_path) -> None:
    with running(DashScopeStub()) as vendor:
        server = serving(make_server, vendor, "dashscope", tmp_path)
        refused = server.finished(server.submit("something forbidden"))
        assert ("failed", "content_refused") == (refused["status"], refused["error"]["code"])
        assert "succeeded" == server.finished(server.submit("a red kite"))["status"]


def test_throttled_broken_expired_and_yet_once(make_server, tmp_path) -> None:
    with running(DashScopeStub()) as vendor:
        server = serving(make_server, vendor, "dashscope", tmp_path)
        throttled = {"code": "Throttling.RateQuota", "message": "Requests rate limit exceeded"}
        vendor.fail("POST", "image-synthesis", Fault(429, throttled, {"Retry-After": "1"}))
        vendor.fail("GET", "/tasks/", Fault(502, "<html>bad gateway</html>"), times=2)
        vendor.expired_outputs = 2
        result = server.finished(server.submit("a red kite"), 60)
        assert "succeeded" == result["status"], result
        assert 2 == len(vendor.calls("POST", "image-synthesis"))


def test_an_answer_that_was_lost_is_not_asked_for_again(make_server, tmp_path) -> None:
    with running(DashScopeStub()) as vendor:
        server = serving(make_server, vendor, "dashscope", tmp_path)
        vendor.fail("POST", "image-synthesis", Fault(lost=True))
        result = server.finished(server.submit("a red kite"))
        assert ("failed", "remote_unknown") == (result["status"], result["error"]["code"])
        assert "It was not sent again" in result["error"]["message"]
        assert 1 == len(vendor.calls("POST", "image-synthesis"))


class SlowToAnswer(DashScopeStub):
    """Takes a task, and says so only when ``answers`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.answers = threading.Event(), threading.Event()

    def reply(self, call: Seen) -> Reply:
        reply = super().reply(call)
        if call.method == "POST":
            self.taken.set()
            self.answers.wait(60)
        return reply


def test_kill_9_between_the_submit_and_the_stored_id(make_server, database, tmp_path) -> None:
    with running(SlowToAnswer()) as vendor:
        server = serving(make_server, vendor, "dashscope", tmp_path, **database)
        id_ = server.submit("a red kite")
        assert vendor.taken.wait(30)
        server.kill_everything()
        vendor.answers.set()
        server.start()
        result = server.finished(id_)
        assert ("failed", "remote_unknown") == (result["status"], result["error"]["code"])
        assert 1 == len(vendor.calls("POST", "image-synthesis"))
        assert "succeeded" == server.finished(server.submit("a blue kite"))["status"]


def test_kill_9_of_the_worker_alone_while_the_vendor_works(make_server, tmp_path) -> None:
    with running(DashScopeStub()) as vendor:
        vendor.gate.clear()
        server = serving(make_server, vendor, "dashscope", tmp_path)
        id_ = server.submit("a red kite")
        eventually(lambda: vendor.calls("GET", "/tasks/"), 30, "it is polled")
        server.one("worker").kill()
        vendor.gate.set()
        assert "succeeded" == server.finished(id_)["status"]
        assert 1 == len(vendor.calls("POST", "image-synthesis"))
