"""Request bodies: small ones in memory, large ones by way of a scratch file, so that memory stays bounded.

A large body arrives at its sender's pace, which can be slow, and from many senders at once; meanwhile it lies
on the disk. It is in memory only while it is worked on, within a budget that all requests share.
"""

import asyncio
import contextlib
import errno
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from starlette.types import Message, Receive

from rushes.errors import BodyTooLarge, MalformedRequest, StoreUnavailable

SMALL_BYTES: Final = 256 * 1024
"""What is kept in memory: nearly every body that carries no file."""
BATCH_BYTES: Final = 1 << 20
"""What is handed to a thread at once, which costs about 0.1 ms."""
LOADED_BYTES: Final = 64 << 20
"""Large bodies in memory together, as they came; parsed and written out they take three times as much. One
that is larger goes alone.
"""


async def chunks(event: Message, receive: Receive, most: int, message: str) -> AsyncIterator[bytes]:
    """The body in pieces, from its first event on. Raises BodyTooLarge with ``message`` past ``most`` bytes,
    and MalformedRequest where the client is gone before the end.
    """
    total = 0
    while event["type"] == "http.request":
        chunk: bytes = event.get("body", b"")
        total += len(chunk)
        if total > most:
            raise BodyTooLarge(message)
        if chunk:
            yield chunk
        if not event.get("more_body", False):
            return
        event = await receive()
    raise MalformedRequest("The connection ended before the body did.")


async def pour(source: AsyncIterable[bytes], write: Callable[[bytes], object]) -> None:
    """Have a thread ``write`` what arrives, in batches."""
    held: list[bytes] = []
    size = 0
    async for chunk in source:
        held.append(chunk)
        size += len(chunk)
        if size >= BATCH_BYTES:
            await asyncio.to_thread(write, b"".join(held))
            held.clear()
            size = 0
    if held:
        await asyncio.to_thread(write, b"".join(held))


@asynccontextmanager
async def scratch_file(folder: Path) -> AsyncIterator[Path]:
    """The name of a new file, of which nothing is left afterwards. An OSError becomes StoreUnavailable."""
    path = folder / f"up-{secrets.token_hex(8)}"
    try:
        yield path
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreUnavailable("The server's disk is full. Nothing was accepted.") from error
        raise StoreUnavailable("The server cannot write to its disk. Nothing was accepted.") from error
    finally:
        with contextlib.suppress(OSError):
            # off the loop: the file system frees a large file's blocks one by one
            await asyncio.to_thread(path.unlink, missing_ok=True)


class Bodies:
    """Reads whole bodies of at most ``most`` bytes; ``scratch`` is the folder for large ones."""

    def __init__(self, scratch: Path, most: int) -> None:
        self._scratch, self._most = scratch, most
        self._message = f"The body may have {most} bytes; upload large files with POST /v1/files."
        self._loaded = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    async def small(self, receive: Receive, length: int) -> bytes | AsyncIterator[bytes]:
        """The whole body, or, of a large one, its pieces, for :meth:`large`.

        Raises BodyTooLarge, before reading where ``length`` (-1: unknown) says so; MalformedRequest where the
        client is gone before the end.
        """
        if length > self._most:
            raise BodyTooLarge(self._message)
        event = await receive()
        if not event.get("more_body") and event["type"] == "http.request":
            body: bytes = event.get("body", b"")
            if len(body) <= min(SMALL_BYTES, self._most):
                return body
        arriving = chunks(event, receive, self._most, self._message)
        held: list[bytes] = []
        size = 0
        async for chunk in arriving:
            held.append(chunk)
            size += len(chunk)
            if size > SMALL_BYTES:
                return _again(held, arriving)
        return b"".join(held)

    @asynccontextmanager
    async def large(self, arriving: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """The whole of a large body, once it has arrived and there is room for it."""
        async with scratch_file(self._scratch) as path:
            with await asyncio.to_thread(path.open, "xb") as file:
                await pour(arriving, file.write)
                size = file.tell()
            async with self._room(size):
                yield await asyncio.to_thread(path.read_bytes)

    @asynccontextmanager
    async def _room(self, size: int) -> AsyncIterator[None]:
        async with self._turn:  # first come, first served: small ones must not keep a large one out
            while self._loaded and self._loaded + size > LOADED_BYTES:
                self._freed.clear()
                await self._freed.wait()
            self._loaded += size
        try:
            yield
        finally:
            self._loaded -= size
            self._freed.set()


async def _again(held: list[bytes], rest: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    while held:
        yield held.pop(0)
    async for chunk in rest:
        yield chunk
