"""The outside of a slot: starts the child process, hands it jobs, replaces it when it dies."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from rushes.engines.base import Job, Produced
from rushes.errors import EngineError
from rushes.requests.record import Progress
from rushes.worker.guard import SUPERVISOR
from rushes.worker.messages import Done, Failed, Ready, Step, line, read_message

START_SECONDS: Final = 120.0
_LINE_LIMIT: Final = 16 * 1024 * 1024


class ChildLost(Exception):
    """The child process ended without an answer. ``message`` says how, in words for the user."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


class Slot:
    """One engine slot. ``warm`` names the model that its child has loaded."""

    def __init__(self, command: Sequence[str], name: str) -> None:
        self._command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None
        self._killed_for: str | None = None
        self.name = name
        self.engine = ""
        self.warm: str | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def ensure(self) -> None:
        """Have a live child with its engine made. Raises ChildLost where it does not come up."""
        if self._process is not None and self._process.returncode is None:
            return
        self.warm = None
        self._killed_for = None
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {SUPERVISOR: str(os.getpid())},
            limit=_LINE_LIMIT,
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                message = await self._read()
        except TimeoutError:
            await self.kill("the engine did not start in time")
            raise ChildLost("engine_start_failed", "The engine did not start in time.") from None
        if not isinstance(message, Ready):
            await self.kill("the engine answered out of turn")
            raise ChildLost("engine_start_failed", "The engine did not start.")
        self.engine = message.engine

    async def run(
        self, job: Job, report: Callable[[Progress], None], started: Callable[[], None] | None = None
    ) -> list[Produced]:
        """Run one job to its end.

        Raises EngineError where the engine failed in an orderly way, ChildLost where the child died or was
        killed, EngineError ``time_limit`` where the model's time limit passed.
        """
        await self.ensure()
        assert self._process is not None
        assert self._process.stdin is not None
        deadline = time.monotonic() + job.model.time_limit
        try:
            self._process.stdin.write(line(job))
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise await self._lost() from None
        if started is not None:
            started()
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await self._read()
            except TimeoutError:
                await self.kill("time limit")
                limit = f"{job.model.time_limit:g} seconds"
                raise EngineError("time_limit", f"The engine took longer than {limit} and was ended.") from None
            match message:
                case Step(progress):
                    report(progress)
                case Done(produced):
                    self.warm = job.model.id
                    return produced
                case Failed():
                    self.warm = None
                    raise EngineError(
                        message.code, message.message, node=message.node, retryable=message.retryable
                    )
                case Ready():
                    continue

    async def _read(self) -> Ready | Step | Done | Failed:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            text = await self._process.stdout.readline()
        except ValueError:
            text = b""
        if not text.endswith(b"\n"):
            raise await self._lost()
        try:
            return read_message(text)
        except msgspec.DecodeError:
            await self.kill("garbled message")
            raise await self._lost() from None

    async def _lost(self) -> ChildLost:
        assert self._process is not None
        try:
            async with asyncio.timeout(2.0):
                status = await self._process.wait()
        except TimeoutError:
            await self.kill("closed its output")
            status = await self._process.wait()
        if status == -signal.SIGKILL and self._killed_for is None:
            return ChildLost(
                "engine_killed", "The engine's process was killed, most likely because memory ran out."
            )
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return ChildLost("engine_crashed", f"The engine's process ended unexpectedly ({how}).")

    async def kill(self, reason: str) -> None:
        """End the child and all it started, at once."""
        process = self._process
        if process is None:
            return
        self._killed_for = reason
        self.warm = None
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def stop(self, seconds: float = 2.0) -> None:
        """Let the child end by itself: its input ends."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            await self.kill("stop")
