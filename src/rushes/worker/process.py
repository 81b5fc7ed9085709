"""A child process on two pipes, whose end is known from the process itself.

asyncio's own subprocesses report the end only when all their pipes are closed, too. An engine's library may
have forked helpers that keep these pipes open: their parent's death must not go unnoticed for that, nor may
ending the parent wait for them.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Final

LINE_LIMIT: Final = 16 * 1024 * 1024
_LAST_WORDS_SECONDS: Final = 0.5


class ProcessEnded(Exception):
    """The process has ended, or cannot be spoken with any more."""


class ChildProcess:
    """Made by :meth:`start`, in a process group of its own. Belongs to the event loop that made it."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._exited = asyncio.Event()
        self._reader = asyncio.StreamReader(limit=LINE_LIMIT)
        self._writer: asyncio.StreamWriter | None = None
        self._output: asyncio.ReadTransport | None = None
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, name="rushes-child-watch", daemon=True).start()

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> "ChildProcess":
        """Raises OSError where the process cannot be made."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        child = cls(process)
        loop = asyncio.get_running_loop()
        child._output, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(child._reader), process.stdout
        )
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, process.stdin)
        child._writer = asyncio.StreamWriter(transport, protocol, None, loop)
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.returncode if self._exited.is_set() else None

    async def write(self, data: bytes) -> None:
        """Raises ProcessEnded where nobody reads."""
        assert self._writer is not None
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise ProcessEnded from None

    async def read_line(self) -> bytes:
        """The next line. Raises ProcessEnded at the end of the output, or of the process."""
        reading = asyncio.ensure_future(self._reader.readline())
        ending = asyncio.ensure_future(self._exited.wait())
        try:
            await asyncio.wait([reading, ending], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                # What it said last may still be on its way; a helper that holds the pipe says nothing.
                await asyncio.wait([reading], timeout=_LAST_WORDS_SECONDS)
            if not reading.done():
                raise ProcessEnded
            text = reading.result()
        except (ValueError, OSError):
            raise ProcessEnded from None
        finally:
            ending.cancel()
            if not reading.done():
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
        if not text.endswith(b"\n"):
            raise ProcessEnded
        return text

    async def wait(self, seconds: float) -> int | None:
        """Wait for the end, at most so long; the exit status, or None where it goes on."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._exited.wait()
        return self.status

    def close_input(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def kill(self) -> None:
        """End the process and everything in its group, and let go of the pipes."""
        # Also where the process itself has ended: what it forked may live on.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self.wait(10.0)
        self.close_input()
        if self._output is not None:
            self._output.close()

    def _watch(self) -> None:
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            self._loop.call_soon_threadsafe(self._exited.set)
