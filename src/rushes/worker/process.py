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
from collections.abc import Callable, Mapping, Sequence
from typing import Final

LINE_LIMIT: Final = 16 * 1024 * 1024
_LAST_WORDS_SECONDS: Final = 0.5


class ChildProcess:
    """Made by :meth:`start`, in a process group of its own. Belongs to the event loop that made it."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        on_line: Callable[[bytes], None],
        on_end: Callable[["ChildProcess"], None],
    ) -> None:
        self._process = process
        self._on_line = on_line
        self._on_end = on_end
        self._told_end = False
        self._killed = False
        self._exited = asyncio.Event()
        self._input: asyncio.WriteTransport | None = None
        self._output: asyncio.ReadTransport | None = None
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, name="rushes-child-watch", daemon=True).start()

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_line: Callable[[bytes], None],
        on_end: Callable[["ChildProcess"], None],
    ) -> "ChildProcess":
        """``on_line`` is called with each line that the child says, and ``on_end`` once, when it has ended or
        cannot be spoken with any more; nothing is heard of it after that. Raises OSError where the process
        cannot be made.
        """
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        child = cls(process, on_line, on_end)
        try:
            await child._connect()
        except BaseException:  # nobody would have it otherwise
            child._signal_group()
            child._let_go()
            raise
        return child

    async def _connect(self) -> None:
        output, _ = await self._loop.connect_read_pipe(
            lambda: _Lines(self._hear, self._end), self._process.stdout
        )
        self._output = output
        self._input, _ = await self._loop.connect_write_pipe(lambda: _Orders(self._end), self._process.stdin)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.returncode if self._exited.is_set() else None

    def write(self, data: bytes) -> None:
        """Send, as soon as it is read. Where nobody reads any more, the end is told."""
        if self._input is not None and not self._input.is_closing():
            self._input.write(data)

    async def wait(self, seconds: float) -> int | None:
        """Wait for the end, at most so long; the exit status, or None where it goes on."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._exited.wait()
        return self.status

    def close_input(self) -> None:
        if self._input is not None:
            self._input.close()

    async def kill(self) -> None:
        """End the process and everything in its group, and let go of the pipes."""
        self._signal_group()
        try:
            await self.wait(10.0)
        finally:
            self._let_go()

    def _signal_group(self) -> None:
        # Also where the process itself has ended: what it forked may live on. But once: the number of a group that
        # is gone may be another's.
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _let_go(self) -> None:
        """Close the pipes, whether the loop has them yet or not."""
        for transport, pipe in ((self._input, self._process.stdin), (self._output, self._process.stdout)):
            if transport is not None:
                transport.close()
            elif pipe is not None:
                pipe.close()

    def _watch(self) -> None:
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            self._loop.call_soon_threadsafe(self._on_exit)

    def _on_exit(self) -> None:
        self._exited.set()
        # What it said last may still be on its way; a helper that holds the pipe says nothing.
        self._loop.call_later(_LAST_WORDS_SECONDS, self._end)

    def _hear(self, text: bytes) -> None:
        if not self._told_end:
            self._on_line(text)

    def _end(self) -> None:
        if not self._told_end:
            self._told_end = True
            self._on_end(self)


class _Lines(asyncio.Protocol):
    """The child's output. What comes behind its last line break is no message."""

    def __init__(self, on_line: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._on_line, self._on_end = on_line, on_end
        self._part = bytearray()
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._part:
            self._part += data
            if b"\n" not in data:
                if len(self._part) > LINE_LIMIT and self._transport is not None:
                    self._transport.close()
                return
            data = bytes(self._part)
        *lines, rest = data.split(b"\n")
        self._part = bytearray(rest)
        for text in lines:
            self._on_line(text)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._on_end()


class _Orders(asyncio.BaseProtocol):
    """The child's input."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:  # nobody reads it any more; None where we have closed it
            self._on_end()
