"""The network between an engine and its ComfyUI, with what networks do: cuts, silence, lost answers."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any

from support.server import free_port

HOST = "127.0.0.2"


class Wire:
    """Passes everything on to ``target`` (a port of this machine); runs in a thread of its own.

    It listens at an address that does not look like this machine's: what stands behind it is far away, and its
    disk is out of reach.

    The troubles are armed with the first bytes of a request, such as ``b"POST /prompt"``, and happen once.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.requests: list[str] = []
        """Method and path of every request, in order."""
        self.lose_answer_to: bytes | None = None
        """The server gets it; its answer never comes: the connection is cut."""
        self.lose_request: bytes | None = None
        """The server never gets it: the connection is cut."""
        self.cut_answer_to: bytes | None = None
        """The connection is cut in the middle of the answer, after :attr:`cut_after` bytes."""
        self.cut_after = 400
        self._writers: set[asyncio.StreamWriter] = set()
        self._thawed = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._open())
        self._loop.call_soon_threadsafe(self._thawed.set)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self.port)

    def close(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._cut()

    def cut(self) -> None:
        """Cut every connection; new ones are taken."""
        self._call(self._cut())

    async def _cut(self) -> None:
        for writer in tuple(self._writers):
            writer.transport.abort()

    def freeze(self) -> None:
        """Nothing passes any more; connections stay."""
        self._loop.call_soon_threadsafe(self._thawed.clear)

    def thaw(self) -> None:
        self._loop.call_soon_threadsafe(self._thawed.set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        other = None
        try:
            from_server, other = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(other)
            trouble: list[int] = []
            passing = [
                asyncio.create_task(self._up(reader, other, trouble)),
                asyncio.create_task(self._down(from_server, writer, trouble)),
            ]
            await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            for task in passing:
                task.cancel()
            await asyncio.gather(*passing, return_exceptions=True)
        except OSError:
            pass  # nobody listens there: so it is for who asks here
        finally:
            for one in filter(None, (writer, other)):
                one.transport.abort()
                self._writers.discard(one)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trouble: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                await self._thawed.wait()
                first = data.split(b"\r\n", 1)[0]
                if first.endswith(b" HTTP/1.1"):
                    self.requests.append(first.decode().rpartition(" ")[0])
                if self.lose_request is not None and data.startswith(self.lose_request):
                    self.lose_request = None
                    return
                if self.lose_answer_to is not None and data.startswith(self.lose_answer_to):
                    self.lose_answer_to = None
                    trouble.append(0)
                if self.cut_answer_to is not None and data.startswith(self.cut_answer_to):
                    self.cut_answer_to = None
                    trouble.append(self.cut_after)
                writer.write(data)
                await writer.drain()

    async def _down(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trouble: list[int]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                await self._thawed.wait()
                if trouble:
                    writer.write(data[: trouble[0]])
                    await writer.drain()
                    return
                writer.write(data)
                await writer.drain()
