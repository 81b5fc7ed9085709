"""The outside of a slot: starts the child process, hands it jobs, replaces it when it dies."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from rushes.engines.base import Job, Produced
from rushes.errors import EngineError
from rushes.guard import SUPERVISOR
from rushes.requests.record import Progress
from rushes.worker.messages import Done, Failed, Message, Ready, Step, line, read_message
from rushes.worker.process import ChildProcess, ProcessEnded

START_SECONDS: Final = 120.0


class ChildLost(Exception):
    """The child process ended without an answer. ``message`` says how, in words for the user."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


class Slot:
    """One engine slot. ``warm`` names the model that its child has loaded."""

    def __init__(self, command: Sequence[str], name: str) -> None:
        self._command = tuple(command)
        self._child: ChildProcess | None = None
        self._killed_for: str | None = None
        self.name = name
        self.engine = ""
        self.warm: str | None = None

    async def ensure(self) -> None:
        """Have a live child with its engine made. Raises ChildLost or OSError where it does not come up."""
        if self._child is not None and self._child.status is None:
            return
        await self.kill("replaced")
        self._killed_for = None
        environment = os.environ | {SUPERVISOR: str(os.getpid())}
        self._child = await ChildProcess.start(self._command, environment)
        try:
            async with asyncio.timeout(START_SECONDS):
                message = await self._read()
        except TimeoutError:
            await self.kill("the engine did not start in time")
            raise ChildLost("engine_start_failed", "The engine did not start in time.") from None
        if isinstance(message, Failed):
            await self.kill("the engine failed to start")
            raise ChildLost(message.code, message.message)
        if not isinstance(message, Ready):
            await self.kill("the engine answered out of turn")
            raise ChildLost("engine_start_failed", "The engine did not start.")
        self.engine = message.engine

    async def run(self, job: Job, report: Callable[[Progress], None]) -> list[Produced]:
        """Run one job to its end.

        Raises EngineError where the engine failed in an orderly way, ChildLost where the child died or was
        killed, EngineError ``time_limit`` where the model's time limit passed.
        """
        await self.ensure()
        deadline = time.monotonic() + job.model.time_limit
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + job.model.time_limit):
                message = await self._converse(job, report)
        except TimeoutError:
            if time.monotonic() < deadline:
                raise
            await self.kill("time limit")
            limit = f"{job.model.time_limit:g} seconds"
            raise EngineError("time_limit", f"The engine took longer than {limit} and was ended.") from None
        if isinstance(message, Failed):
            self.warm = None
            raise EngineError(message.code, message.message, node=message.node, retryable=message.retryable)
        self.warm = job.model.id
        return message.produced

    async def _converse(self, job: Job, report: Callable[[Progress], None]) -> Done | Failed:
        assert self._child is not None
        try:
            await self._child.write(line(job))
        except ProcessEnded:
            raise await self._lost() from None
        while True:
            message = await self._read()
            if isinstance(message, Step):
                report(message.progress)
            elif not isinstance(message, Ready):
                return message

    async def _read(self) -> Message:
        assert self._child is not None
        try:
            return read_message(await self._child.read_line())
        except ProcessEnded:
            raise await self._lost() from None
        except msgspec.DecodeError:
            await self.kill("garbled message")
            raise ChildLost("engine_crashed", "The engine's process sent nonsense and was ended.") from None

    async def _lost(self) -> ChildLost:
        """What became of the child. It, and whatever it forked, is gone afterwards."""
        assert self._child is not None
        status = await self._child.wait(2.0)
        await self.kill("lost")
        if status == -signal.SIGKILL and self._killed_for == "lost":
            return ChildLost(
                "engine_killed", "The engine's process was killed, most likely because memory ran out."
            )
        if status is None:
            how = "it closed its output"
        else:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return ChildLost("engine_crashed", f"The engine's process ended unexpectedly ({how}).")

    async def kill(self, reason: str) -> None:
        """End the child and all it started, at once."""
        self.warm = None
        if self._killed_for is None:
            self._killed_for = reason
        if self._child is not None:
            await self._child.kill()

    async def stop(self, seconds: float = 2.0) -> None:
        """Let the child end by itself: its input ends."""
        if self._child is not None:
            self._child.close_input()
            await self._child.wait(seconds)
            await self.kill("stop")
