"""The websocket of a ComfyUI: who is told what, and what happens when it goes."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientWebSocketResponse, WSMsgType, web

from rushes.engines.comfyui.events import Events, ImageType
from rushes.engines.comfyui.server import Server
from support.server import free_port


class Told:
    """A follower that notes what it is told."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.previews: list[tuple[str, bytes]] = []
        self.misses = 0
        self.news = asyncio.Event()

    def message(self, type_: str, data: dict[str, Any]) -> None:
        self.messages.append((type_, data))
        self.news.set()

    def preview(self, type_: ImageType, image: bytes) -> None:
        self.previews.append((type_, image))
        self.news.set()

    def missed(self) -> None:
        self.misses += 1
        self.news.set()

    async def until(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        while len(self.messages) < count:
            self.news.clear()
            await self.news.wait()
        return self.messages


class Speaker:
    """A server whose socket says what the test wants it to, and nothing else."""

    def __init__(self) -> None:
        self.clients: list[str] = []
        self.heard: list[Any] = []
        self.sockets: asyncio.Queue[web.WebSocketResponse] = asyncio.Queue()
        self.url = ""

    async def ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.clients.append(request.query["clientId"])
        self.sockets.put_nowait(socket)
        async for frame in socket:
            if frame.type is WSMsgType.TEXT:
                self.heard.append(json.loads(frame.data))
        return socket

    async def socket(self) -> web.WebSocketResponse:
        return await asyncio.wait_for(self.sockets.get(), 10)


@pytest.fixture
async def speaker() -> AsyncIterator[Speaker]:
    made = Speaker()
    app = web.Application()
    app.router.add_get("/ws", made.ws)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield made
    finally:
        await runner.cleanup()


@asynccontextmanager
async def listening(url: str, **more: Any) -> AsyncIterator[Events]:
    server = Server(url, client_id="the-client")
    await server.open()
    events = Events(server, **more)
    events.start()
    try:
        yield events
    finally:
        await events.close()
        await server.close()


def about(prompt_id: str, type_: str = "progress", **data: Any) -> str:
    return json.dumps({"type": type_, "data": {"prompt_id": prompt_id, **data}})


async def test_each_prompt_s_messages_go_to_its_follower(speaker: Speaker) -> None:
    one, two = Told(), Told()
    async with listening(speaker.url) as events:
        events.follow("1", one)
        events.follow("2", two)
        socket = await speaker.socket()
        await socket.send_str(about("1", value=1))
        await socket.send_str(about("3", value=3))
        await socket.send_str(about("2", "executing", node=None))
        assert [("executing", {"prompt_id": "2", "node": None})] == await two.until(1)
        assert [("progress", {"prompt_id": "1", "value": 1})] == one.messages
        events.unfollow("1")
        await socket.send_str(about("1", value=2))
        await socket.send_str(about("2", value=2))
        await two.until(2)
        assert 1 == len(one.messages)
    assert ["the-client"] == speaker.clients
    assert {"supports_preview_metadata": True} == speaker.heard[0]["data"]


async def test_odd_messages_end_nothing(speaker: Speaker) -> None:
    told = Told()
    async with listening(speaker.url) as events:
        events.follow("1", told)
        socket = await speaker.socket()
        odd = ("no json", "[]", '"x"', '{"type": "status"}', '{"type": "x", "data": [1]}', '{"data": {}}')
        for text in (*odd, about("[]"), json.dumps({"type": "y", "data": {"prompt_id": ["1"]}})):
            await socket.send_str(text)
        for frame in (b"", b"\0\0\0\1", b"\0\0\0\4\xff\xff\xff\xff", b"\0\0\0\4\0\0\0\2[]x", b"\0\0\0\3abc"):
            await socket.send_bytes(frame)
        await socket.send_str('{"type": "executed", "data": {"prompt_id": "1", "output": {"x": [NaN]}}}')
        ((type_, data),) = await told.until(1)
        assert ("executed", "1") == (type_, data["prompt_id"])


def preview_of(prompt_id: Any, image: bytes = b"image") -> bytes:
    metadata = json.dumps({"prompt_id": prompt_id, "image_type": "image/png"}).encode()
    return struct.pack(">II", 4, len(metadata)) + metadata + image


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "odd",
    [
        preview_of(["1"]),
        preview_of({"1": 1}),
        b"\0\0\0\4" + len(DEEP).to_bytes(4, "big") + DEEP.encode() + b"image",
        DEEP,
        '{"type": "executing", "data": ' + DEEP + "}",
        '{"type": "execution_start", "data": {"prompt_id": ["1"]}}',
        '{"type": "\\ud800", "data": {"prompt_id": "fails"}}',
    ],
)
async def test_no_message_ends_the_socket(speaker: Speaker, odd: str | bytes) -> None:
    class Fails(Told):
        def message(self, type_: str, data: dict[str, Any]) -> None:
            raise KeyError(type_)

    told, lost = Told(), list[bool]()
    async with listening(speaker.url, lost=lambda: lost.append(True)) as events:
        events.follow("1", told)
        events.follow("fails", Fails())
        socket = await speaker.socket()
        await (socket.send_str(odd) if isinstance(odd, str) else socket.send_bytes(odd))
        await socket.send_bytes(struct.pack(">II", 1, 1) + b"of nobody")
        await socket.send_bytes(preview_of("1"))
        await socket.send_str(about("1"))
        async with asyncio.timeout(20):
            await told.until(1)
        assert events.open.is_set()
    assert [("png", b"image")] == told.previews
    assert (["the-client"], []) == (speaker.clients, lost)


async def test_followers_that_fail_do_not_end_the_socket_s_coming_back(speaker: Speaker) -> None:
    class Fails(Told):
        def missed(self) -> None:
            raise RuntimeError("missed")

        def preview(self, type_: ImageType, image: bytes) -> None:
            raise OSError("no space left")

    def looks() -> None:
        raise RuntimeError("lost")

    told = Told()
    async with listening(speaker.url, lost=looks) as events:
        events.follow("0", Fails())
        events.follow("1", told)
        async with asyncio.timeout(20):
            for count in (1, 2, 3):
                socket = await speaker.socket()
                await socket.send_bytes(preview_of("0"))
                await socket.send_str(about("1"))
                await told.until(count)
                assert events.open.is_set()
                await socket.close()
    assert 3 == len(speaker.clients)


async def test_a_connection_that_fails_in_a_new_way_is_tried_again(speaker: Speaker) -> None:
    class Odd(Server):
        failures = 0

        @asynccontextmanager
        async def socket(self, *, seconds: float) -> AsyncIterator[ClientWebSocketResponse]:
            if self.failures < 2:
                self.failures += 1
                raise LookupError("of a kind that nobody thought of")
            async with super().socket(seconds=seconds) as socket:
                yield socket
                raise LookupError("at the end, too")

    told = Told()
    server = Odd(speaker.url, client_id="the-client")
    await server.open()
    events = Events(server)
    events.start()
    try:
        events.follow("1", told)
        async with asyncio.timeout(20):
            for count in (1, 2):
                socket = await speaker.socket()
                await socket.send_str(about("1"))
                await told.until(count)
                before = told.misses
                await socket.close()
                while told.misses == before:
                    told.news.clear()
                    await told.news.wait()
    finally:
        await events.close()
        await server.close()
    assert 2 == server.failures


async def test_a_follower_that_fails_ends_nothing(speaker: Speaker, capfd: pytest.CaptureFixture[str]) -> None:
    class Fails(Told):
        def message(self, type_: str, data: dict[str, Any]) -> None:
            raise KeyError("value")

    told = Told()
    async with listening(speaker.url) as events:
        events.follow("1", Fails())
        events.follow("2", told)
        socket = await speaker.socket()
        await socket.send_str(about("1"))
        await socket.send_str(about("2"))
        assert 1 == len(await told.until(1))
    assert "comfyui_message_not_understood" in capfd.readouterr().err


async def test_messages_without_an_id_are_about_the_prompt_that_began_last(speaker: Speaker) -> None:
    one, two = Told(), Told()
    async with listening(speaker.url) as events:
        events.follow("1", one)
        events.follow("2", two)
        socket = await speaker.socket()
        await socket.send_str(about("1", "execution_start"))
        await socket.send_str('{"type": "progress", "data": {"value": 1, "max": 4}}')
        await socket.send_str('{"type": "crystools.monitor", "data": {"cpu": 9}}')
        await socket.send_str('{"type": "executing", "data": {"node": null}}')
        await socket.send_str(about("2", "execution_start"))
        await socket.send_str('{"type": "executing", "data": {"node": "7"}}')
        assert ["execution_start", "executing"] == [type_ for type_, _ in await two.until(2)]
        assert ["execution_start", "progress", "executing"] == [type_ for type_, _ in one.messages]


async def test_previews_of_both_forms(speaker: Speaker) -> None:
    one, two = Told(), Told()
    async with listening(speaker.url) as events:
        events.follow("1", one)
        events.follow("2", two)
        socket = await speaker.socket()
        await socket.send_str(about("1", "execution_start"))
        await socket.send_bytes(struct.pack(">II", 1, 1) + b"jpeg")
        await socket.send_bytes(struct.pack(">II", 1, 2) + b"png")
        await socket.send_bytes(struct.pack(">II", 1, 9) + b"else")
        for type_ in ("image/png", "image/jpeg", "image/tiff"):
            metadata = json.dumps({"prompt_id": "2", "node_id": "3", "image_type": type_}).encode()
            await socket.send_bytes(struct.pack(">II", 4, len(metadata)) + metadata + b"two")
        await socket.send_str(about("2"))
        await two.until(1)
    assert [("jpeg", b"jpeg"), ("png", b"png")] == one.previews
    assert [("png", b"two"), ("jpeg", b"two")] == two.previews


async def test_it_comes_back_and_says_that_it_was_away(speaker: Speaker) -> None:
    told = Told()
    lost: list[bool] = []
    async with listening(speaker.url, lost=lambda: lost.append(True)) as events:
        socket = await speaker.socket()
        events.follow("1", told)
        await socket.send_str(about("1"))
        await told.until(1)
        before = told.misses
        await socket.close()
        socket = await speaker.socket()
        await socket.send_str(about("1"))
        await told.until(2)
        assert (before + 2, [True]) == (told.misses, lost)
        assert events.open.is_set()
    assert ["the-client", "the-client"] == speaker.clients


async def test_a_deaf_socket_is_opened_again(speaker: Speaker) -> None:
    told = Told()
    async with listening(speaker.url) as events:
        await speaker.socket()
        await asyncio.wait_for(events.open.wait(), 10)
        events.follow("1", told)
        events.is_deaf()
        socket = await speaker.socket()
        await socket.send_str(about("1"))
        await told.until(1)


async def test_it_waits_for_a_server_that_is_not_there_yet() -> None:
    port, made, told = free_port(), Speaker(), Told()
    async with listening(f"http://127.0.0.1:{port}") as events:
        events.follow("1", told)
        await asyncio.sleep(0)
        assert not events.open.is_set()
        app = web.Application()
        app.router.add_get("/ws", made.ws)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            await (await made.socket()).send_str(about("1"))
            await told.until(1)
        finally:
            await runner.cleanup()
