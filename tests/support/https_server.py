"""A host on the loopback interface, over TLS with a certificate of its own, that answers as the test says.

It writes raw bytes, so that it can lie as real hosts do: about lengths, by stopping, by never stopping.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    server_name: str | None
    """The name in the TLS handshake."""
    local: str
    """The address of ours that was connected to."""


Write = Callable[[bytes], Awaitable[None]]
Handler = Callable[[Asked, Write], Awaitable[None]]


@dataclass
class Host:
    port: int
    asked: list[Asked] = field(default_factory=list)


@cache
def authority() -> trustme.CA:
    return trustme.CA()


def write_authority(folder: Path) -> str:
    """The CA's certificate as a file, for FetchPolicy.ca_file."""
    path = folder / "ca.pem"
    authority().cert_pem.write_to_path(str(path))
    return str(path)


def _context(names: tuple[str, ...], server_names: dict[int, str | None]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(*names).configure_cert(context)

    def note(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        server_names[id(connection)] = name

    context.sni_callback = note  # type: ignore[assignment]
    return context


@contextlib.asynccontextmanager
async def serve(
    handler: Handler,
    *,
    names: tuple[str, ...] = ("media.test", "127.0.0.1"),
    address: str = "127.0.0.1",
    port: int = 0,
    tls: bool = True,
) -> AsyncIterator[Host]:
    """Serve on ``address`` until the block ends; connections still open are cut then."""
    server_names: dict[int, str | None] = {}
    tasks: set[asyncio.Task[None]] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        asked = Asked(
            first.split(" ")[1],
            headers,
            server_names.get(id(writer.get_extra_info("ssl_object"))),
            writer.get_extra_info("sockname")[0],
        )
        host.asked.append(asked)

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        await handler(asked, write)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await converse(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1)
            tasks.discard(task)

    context = _context(names, server_names) if tls else None
    server = await asyncio.start_server(connected, address, port, ssl=context)
    host = Host(server.sockets[0].getsockname()[1])
    try:
        yield host
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answer(body: bytes, status: str = "200 OK", **headers: str) -> Handler:
    """A handler with one true answer. Underscores in header names stand for hyphens."""

    async def handle(_: Asked, write: Write) -> None:
        lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        if not any(k.lower() == "content_length" for k in headers):
            lines.append(f"Content-Length: {len(body)}")
        await write("\r\n".join([*lines, "", ""]).encode() + body)

    return handle
