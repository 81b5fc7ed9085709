"""The calls to a ComfyUI: against the stub, and against servers that answer badly."""

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rushes.engines.comfyui.server import Queued, Refusal, Rejected, Server, Unreachable, read_json
from support.comfyui import Comfy, kinds
from support.server import free_port

IMAGE: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 8, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "server/empty"}},
}


@pytest.fixture(scope="module", params=kinds())
def comfy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    made = Comfy(request.param, tmp_path_factory.mktemp("comfyui"))
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
async def server(comfy: Comfy) -> AsyncIterator[Server]:
    async with opened(comfy.url) as made:
        yield made


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Server]:
    made = Server(url, client_id="tests")
    await made.open()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[str]:
    """A server with these routes alone; its address."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def answering(status: int = 200, text: str = "") -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text=text, content_type="application/json")

    return answer


async def ended(server: Server, prompt_id: str) -> dict[str, Any]:
    while (entry := await server.history(prompt_id)) is None:
        await asyncio.sleep(0.02)
    return entry


async def test_a_prompt_and_its_file(server: Server, tmp_path: Path) -> None:
    extra = {"rushes": {"slot": "here", "request": "r", "attempt": 1}}
    assert "p-1" == await server.submit(IMAGE, "p-1", extra)
    entry = await ended(server, "p-1")
    assert extra["rushes"] == entry["prompt"][3]["rushes"]
    assert "tests" == entry["prompt"][3]["client_id"]
    (file,) = entry["outputs"]["2"]["images"]
    await server.view(file, tmp_path / "out.png")
    assert b"\x89PNG" == (tmp_path / "out.png").read_bytes()[:4]
    assert extra["rushes"] == dict(await server.recent())["p-1"]["rushes"]
    await server.forget("p-1", "and-another")
    assert None is await server.history("p-1")


async def test_the_queue_says_what_runs_waits_and_is_not_there(server: Server) -> None:
    sleep = {"image": ["1", 0], "seconds": 30.0, "steps": 3000}
    long = {
        "1": IMAGE["1"],
        "2": {"class_type": "RushesTestSleep", "inputs": sleep},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    await server.submit(long, "first", {"rushes": {"slot": "a"}})
    await server.submit(IMAGE, "second", {"rushes": {"slot": "b"}})
    while await server.place("first") != "running":
        await asyncio.sleep(0.02)
    assert "pending" == await server.place("second")
    entries = {entry.prompt_id: entry for entry in await server.queue_entries()}
    assert ("running", {"slot": "a"}) == (entries["first"].place, entries["first"].extra_data["rushes"])
    assert ("pending", {"slot": "b"}) == (entries["second"].place, entries["second"].extra_data["rushes"])
    await server.delete("second")
    assert None is await server.place("second")
    await server.interrupt("first")
    while await server.place("first") is not None:
        await asyncio.sleep(0.02)
    assert "error" == (await ended(server, "first"))["status"]["status_str"]
    await server.free()


async def test_a_file_of_the_same_name_gets_another(server: Server, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"a" * 300_000)
    second.write_bytes(b"b")
    assert "rushes/upload/in.png" == await server.upload(first, "in.png", "rushes/upload")
    assert "rushes/upload/in (1).png" == await server.upload(second, "in.png", "rushes/upload")
    there = {"filename": "in.png", "subfolder": "rushes/upload", "type": "input"}
    await server.view(there, tmp_path / "back")
    assert first.read_bytes() == (tmp_path / "back").read_bytes()


async def test_a_folder_outside_is_rejected(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(Rejected) as rejected:
        await server.upload(tmp_path / "a", "in.png", "../../elsewhere")
    assert 400 == rejected.value.status


async def test_a_graph_that_is_refused(server: Server) -> None:
    wrong = {**IMAGE, "1": {"class_type": "EmptyImage", "inputs": {**IMAGE["1"]["inputs"], "width": -5}}}
    refusal = await server.submit(wrong, "wrong", {})
    assert isinstance(refusal, Refusal)
    assert 400 == refusal.status
    assert "value_smaller_than_min" == refusal.body["node_errors"]["1"]["errors"][0]["type"]


async def test_a_graph_that_is_taken_in_part_is_refused(server: Server) -> None:
    wrong = {
        **IMAGE,
        "3": {"class_type": "EmptyImage", "inputs": {**IMAGE["1"]["inputs"], "width": -5}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "server/wrong"}},
    }
    refusal = await server.submit(wrong, "in-part", {})
    assert isinstance(refusal, Refusal)
    assert 200 == refusal.status
    assert {"3"} == set(refusal.body["node_errors"])


async def test_what_is_not_there_is_rejected(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Rejected) as rejected:
        await server.view({"filename": "no.png", "subfolder": "", "type": "output"}, tmp_path / "no")
    assert 404 == rejected.value.status


async def test_it_says_what_it_is(server: Server) -> None:
    assert "system" in await server.system_stats()
    assert "SaveImage" in await server.object_info()
    assert 0.0 < server.heard


async def test_python_s_own_json_is_read() -> None:
    marked = (
        '{"p": {"prompt": [0, "p", {"1": {"is_changed": NaN}}, {}, []], "outputs": {"2": {"x": [Infinity]}}}}'
    )
    async with serving(web.get("/history/p", answering(text=marked))) as url, opened(url) as server:
        entry = await server.history("p")
    assert entry is not None
    assert float("inf") == entry["outputs"]["2"]["x"][0]
    for text in ("{", "[" * 100_000, b"\xff"):
        with pytest.raises(ValueError):
            read_json(text)


def test_what_cannot_be_written_is_replaced() -> None:
    read = read_json('{"\\ud800": ["\\udc80 and \\ud83d\\ude00", NaN, 1], "error": {"message": "a\\udfff"}}')
    assert ["?", "error"] == list(read)
    assert "? and \U0001f600" == read["?"][0]
    assert {"message": "a?"} == read["error"]


async def test_an_older_server_s_own_id_is_taken() -> None:
    answer = json.dumps({"prompt_id": "theirs", "number": 1})
    async with serving(web.post("/prompt", answering(text=answer))) as url, opened(url) as server:
        assert "theirs" == await server.submit(IMAGE, "ours", {})


async def test_odd_queues_are_read_as_far_as_they_go() -> None:
    queue = {"queue_running": [[0, "a"], "?", []], "queue_pending": [[1, "b", {}, None, []]]}
    async with serving(web.get("/queue", answering(text=json.dumps(queue)))) as url, opened(url) as server:
        assert [Queued("a", "running", {}), Queued("b", "pending", {})] == await server.queue_entries()
    text = '{"queue_running": 3, "queue_pending": null}'
    async with serving(web.get("/queue", answering(text=text))) as url, opened(url) as server:
        assert [] == await server.queue_entries()


async def test_odd_histories_are_read_as_far_as_they_go() -> None:
    history = {"a": {"prompt": [0, "a", {}, {"x": 1}]}, "b": {"prompt": "?"}, "c": None, "d": {"prompt": [1]}}
    async with serving(web.get("/history", answering(text=json.dumps(history)))) as url, opened(url) as server:
        assert [("a", {"x": 1}), ("d", {})] == await server.recent()


NOT_COMFYUI = [
    *((status, "") for status in (302, 304, 401, 403, 404, 429, 500, 502, 504, 530)),
    (400, "{}"),
    (503, "{}"),
    (200, "<html>"),
    (200, "[]"),
]


@pytest.mark.parametrize(("status", "text"), NOT_COMFYUI)
async def test_what_answers_in_comfyui_s_place_is_not_it(status: int, text: str) -> None:
    async with serving(web.get("/queue", answering(status, text))) as url, opened(url) as server:
        with pytest.raises(Unreachable) as unreachable:
            await server.place("a")
        assert 0.0 == server.heard or status == 200
    assert unreachable.value.sent


@pytest.mark.parametrize(
    ("status", "text"),
    [
        *((status, '{"error": "no"}') for status in (302, 401, 403, 404, 405, 429, 500, 502, 503, 530)),
        (400, "<html>Bad Request</html>"),
        (400, "{}"),
        (400, "[]"),
        (400, '{"error": null, "node_errors": {}}'),
    ],
)
async def test_only_comfyui_refuses_a_prompt(status: int, text: str) -> None:
    async with serving(web.post("/prompt", answering(status, text))) as url, opened(url) as server:
        with pytest.raises(Unreachable) as unreachable:
            await server.submit(IMAGE, "p", {})
    assert unreachable.value.sent


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"type": "x"}, "node_errors": {}}),
        (400, {"node_errors": {"1": {}}}),
        (400, {"error": "no"}),
        (200, {"error": "no"}),
        (200, {"prompt_id": "p", "node_errors": {"1": {}}}),
        (413, "too large"),
    ],
)
async def test_what_a_refusal_is(status: int, body: Any) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    async with serving(web.post("/prompt", answering(status, text))) as url, opened(url) as server:
        assert Refusal(status, body) == await server.submit(IMAGE, "p", {})


async def test_redirects_are_followed_nowhere(tmp_path: Path) -> None:
    asked: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({})

    (tmp_path / "a").write_bytes(b"a")
    async with serving(web.route("*", "/{path:.*}", elsewhere)) as other:

        async def redirect(request: web.Request) -> web.Response:
            await request.read()
            return web.Response(status=307, headers={"Location": other + request.path})

        async with serving(web.route("*", "/{path:.*}", redirect)) as url, opened(url) as server:
            for call in (
                server.submit(IMAGE, "p", {}),
                server.place("p"),
                server.history("p"),
                server.system_stats(),
                server.upload(tmp_path / "a", "a.png", "rushes"),
                server.view({"filename": "a.png"}, tmp_path / "b"),
                server.interrupt("p"),
            ):
                with pytest.raises(Unreachable):
                    await call
            with pytest.raises(Unreachable):
                async with server.socket(seconds=5):
                    pass
    assert [] == asked


async def test_a_password_goes_to_comfyui_and_nowhere_else() -> None:
    given: list[str] = []

    async def ask(request: web.Request) -> web.StreamResponse:
        given.append(request.headers.get("Authorization", ""))
        if request.path != "/at/ws":
            return web.json_response({})
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        return socket

    async with serving(web.route("*", "/{path:.*}", ask)) as url:
        address = url.replace("//", "//user:h%C3%BCnter%3A2@") + "/at/"
        async with opened(address) as server:
            assert f"{url}/at" == server.url
            assert [] == await server.queue_entries()
            async with server.socket(seconds=5):
                pass
    assert 2 * ["Basic " + base64.b64encode("user:hünter:2".encode()).decode()] == given


def test_an_address_that_is_none_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="address") as raised:
        Server("http://user:hunter2@[::1", client_id="tests")
    assert "hunter2" not in str(raised.value)
    assert raised.value.__suppress_context__


async def test_nobody_listens() -> None:
    async with opened(f"http://127.0.0.1:{free_port()}") as server:
        with pytest.raises(Unreachable) as unreachable:
            await server.submit(IMAGE, "p", {})
        assert not unreachable.value.sent
        with pytest.raises(Unreachable):
            async with server.socket(seconds=5):
                pass


async def test_a_server_that_hangs_up_may_have_heard(tmp_path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.close()

    listener = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with listener, opened(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}") as server:
        with pytest.raises(Unreachable) as unreachable:
            await server.submit(IMAGE, "p", {})
    assert unreachable.value.sent


async def test_silence_ends_after_the_time_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with opened(f"http://127.0.0.1:{silent.getsockname()[1]}") as server:
            with pytest.raises(Unreachable) as unreachable:
                await server.system_stats(seconds=0.1)
            assert unreachable.value.sent
            with pytest.raises(Unreachable):
                async with server.socket(seconds=0.1):
                    pass


async def test_half_an_output_is_none(tmp_path: Path) -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x" * 400)
        assert request.transport is not None
        request.transport.close()
        return response

    async with serving(web.get("/view", half)) as url, opened(url) as server:
        with pytest.raises(Unreachable):
            await server.view({"filename": "a.png"}, tmp_path / "a.png")


async def test_a_disk_that_cannot_be_written_is_not_the_server_s_fault(tmp_path: Path) -> None:
    async with serving(web.get("/view", answering(text="{}"))) as url, opened(url) as server:
        with pytest.raises(FileNotFoundError):
            await server.view({"filename": "a.png"}, tmp_path / "no" / "folder" / "a.png")


async def test_an_address_with_a_path_keeps_it() -> None:
    async with (
        serving(web.get("/at/comfy/queue", answering(text="{}"))) as url,
        opened(f"{url}/at/comfy/") as server,
    ):
        assert [] == await server.queue_entries()
