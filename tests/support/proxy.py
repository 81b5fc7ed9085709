"""A proxy between a client and PostgreSQL's Unix socket that can lose an answer or freeze, as networks do."""

import asyncio
import contextlib
from pathlib import Path


class Proxy:
    """Listens on ``folder/.s.PGSQL.5432`` and passes everything to ``target``."""

    def __init__(self, folder: Path, target: Path) -> None:
        self._listen_at = folder / ".s.PGSQL.5432"
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lose_answer_to: bytes | None = None
        """The next answer after a message from the client with these bytes in it is not passed on: the
        server has done it, and the connection is cut. Once.
        """
        self.lost = 0
        self.thawed = asyncio.Event()
        self.thawed.set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self._listen_at))

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Cut every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(str(self._target))
        self._writers |= {writer, server_writer}
        armed = asyncio.Event()
        self._tasks.add(upward := asyncio.create_task(self._upward(reader, server_writer, armed)))
        self._tasks.add(downward := asyncio.create_task(self._downward(server_reader, writer, armed)))
        await asyncio.wait({upward, downward}, return_when=asyncio.FIRST_COMPLETED)
        writer.transport.abort()
        server_writer.transport.abort()
        self._writers -= {writer, server_writer}

    async def _upward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, armed: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self.thawed.wait()
                if self.lose_answer_to is not None and self.lose_answer_to in data:
                    self.lose_answer_to = None
                    armed.set()
                writer.write(data)
                await writer.drain()

    async def _downward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, armed: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self.thawed.wait()
                if armed.is_set():
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()
