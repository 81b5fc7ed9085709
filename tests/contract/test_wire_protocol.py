"""What a client can do on a bare connection: the bounds of the gateway's HTTP protocol, on real sockets."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn

from rushes.api.protocol import GatewayProtocol, serving_protocol
from support.app import T2I, App


class Short(GatewayProtocol):
    """The same with less patience, so that the tests need none."""

    tick_seconds = 0.05
    head_ticks = 2
    body_ticks = 2
    most_pipelined = 60


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(app: App, protocol: type[GatewayProtocol] = Short) -> AsyncIterator[int]:
    """The port of the application on a socket."""
    transport = app.http._transport
    assert isinstance(transport, httpx.ASGITransport)
    options = {"loop": "none", "ws": "none", "lifespan": "off", "log_config": None, "timeout_keep_alive": 1}
    server = Server(uvicorn.Config(transport.app, http=protocol, **options))  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await running


async def talk(port: int, *parts: bytes) -> bytes:
    """Send, and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        with contextlib.suppress(ConnectionResetError):
            return await reader.read()
        return b""
    finally:
        writer.close()


def body_of(answer: bytes) -> dict:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 100_000,
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: a\r\n" * 20_000,
        b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
    ids=["one-header", "address", "many-headers", "complete"],
)
async def test_headers_have_an_end(app: App, head: bytes) -> None:
    async with serving(app, GatewayProtocol) as port:
        answer = await talk(port, head)
    assert b"HTTP/1.1 431 Request Header Fields Too Large" == answer.partition(b"\r\n")[0]
    assert b"x-request-id: " in answer
    assert 431001 == body_of(answer)["error_code"]


async def test_large_headers_below_the_limit_are_served(app: App) -> None:
    async with serving(app, GatewayProtocol) as port:
        head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-A: " + b"a" * 60_000 + b"\r\n\r\n"
        assert (await talk(port, head[:30_000], head[30_000:])).startswith(b"HTTP/1.1 200 ")


async def test_a_body_is_no_header(app: App) -> None:
    """Header and body in one piece, the body larger than a header may be."""
    key = app.http.headers["authorization"].encode()
    body = b'{"prompt": "x"' + b" " * 300_000 + b"}"
    head = b"POST /v1/models/%s HTTP/1.1\r\nHost: a\r\nAuthorization: %s\r\n" % (T2I.encode(), key)
    async with serving(app, GatewayProtocol) as port:
        length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert (await talk(port, head + length + body)).startswith(b"HTTP/1.1 200 ")


async def test_trailers_have_an_end(app: App) -> None:
    key = app.http.headers["authorization"].encode()
    head = b"POST /v1/models/%s HTTP/1.1\r\nHost: a\r\nAuthorization: %s\r\n" % (T2I.encode(), key)
    body = b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    async with serving(app, GatewayProtocol) as port:
        answer = await talk(port, head + body, *[b"X-A: a\r\n" * 5_000] * 4)
    assert 431001 == body_of(answer)["error_code"]


async def test_trailers_are_no_headers(app: App) -> None:
    key = app.http.headers["authorization"].encode()
    head = b"POST /v1/models/%s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" % T2I.encode()
    body = b'Transfer-Encoding: chunked\r\n\r\nf\r\n{"prompt": "x"}\r\n0\r\nAuthorization: %s\r\n\r\n' % key
    async with serving(app) as port:
        assert (await talk(port, head + body)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\n", b"\r\n"])
async def test_a_header_that_does_not_come(app: App, sent: bytes) -> None:
    async with serving(app) as port:
        assert b"" == await talk(port, sent)


async def test_a_header_that_does_not_come_after_an_answer(app: App) -> None:
    async with serving(app) as port:
        whole = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        for rest in (b"GET / HT", b"\r\n"):
            assert (await talk(port, whole + rest)).startswith(b"HTTP/1.1 200 ")


async def test_a_body_that_stops(app: App) -> None:
    key = app.http.headers["authorization"].encode()
    head = b"POST /v1/models/%s HTTP/1.1\r\nHost: a\r\nAuthorization: %s\r\n" % (T2I.encode(), key)
    async with serving(app) as port:
        assert b"" == await talk(port, head + b"Content-Length: 100\r\n\r\n{")
        assert b"" == await talk(port, head + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    assert 0 == sum((await app.store.counts()).values())


async def test_what_is_no_http(app: App) -> None:
    async with serving(app) as port:
        for sent in (b"nonsense\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"):
            answer = await talk(port, sent)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"\r\nx-request-id: " in answer
            assert 400003 == body_of(answer)["error_code"]


async def test_nonsense_behind_a_request_takes_no_ones_answer(app: App) -> None:
    async with serving(app) as port:
        answer = await talk(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\nnonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert 1 == answer.count(b"HTTP/1.1 ")


async def test_pipelines(app: App) -> None:
    one = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    async with serving(app) as port:
        assert 50 == (await talk(port, one * 50)).count(b"HTTP/1.1 200 ")
        assert (await talk(port, one * 2000)).count(b"HTTP/1.1 200 ") < 2000


async def test_connections_have_a_limit(app: App) -> None:
    class Two(GatewayProtocol):
        most_connections = 2

    async with serving(app, Two) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        answer = await talk(port)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer
        assert 503001 == body_of(answer)["error_code"]
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        again = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        while not (await talk(port, again)).startswith(b"HTTP/1.1 200 "):
            await asyncio.sleep(0.01)


def test_the_limit_leaves_room_for_files() -> None:
    import resource

    most = serving_protocol().most_connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 256 <= most <= 10_000
    assert most + 256 <= soft or most == 256
