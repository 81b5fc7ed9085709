"""One slot's life: make sure of the child, wait for room, claim, have it worked on, again.

An engine with several lanes gets its next job while it still works on the last one: as late as leaves no gap, so
that a request does not wait here while another slot is free (:meth:`rushes.worker.slot.Slot.room`).
"""

import asyncio
import contextlib
import threading
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from rushes import log
from rushes.requests.record import Lease
from rushes.worker.attempt import Attempts, GivenBack, NotStarted
from rushes.worker.slot import ChildLost, Hand, Slot

RETRY_SECONDS: Final = 1.0
LONGEST_PAUSE: Final = 30.0
GIVEN_BACK_LIMIT: Final = 20
"""How many requests in a row an engine may give back without having begun, until its slot takes pauses."""

DELIVERIES: Final = 4
"""How many attempts of a slot may be on their way to storage at once, while it works on others. A short job's
files take longer to get onto the disk than the job itself."""


class Room:
    """How many requests a worker may have between their claim and the end of their delivery, so that a lease need
    not wait for storage. ``limit`` may change.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._taken = 0
        self._freed = asyncio.Event()

    async def acquire(self) -> None:
        while self._taken >= self._limit():
            self._freed.clear()
            await self._freed.wait()
        self._taken += 1

    def release(self) -> None:
        self._taken -= 1
        self._freed.set()


class Serving:
    """``claim`` asks the store for a request for the slot; it may wait, and answers None where there is none."""

    def __init__(
        self,
        slot: Slot,
        *,
        attempts: Attempts,
        claim: Callable[[], Awaitable[Lease | None]],
        room: Room,
        scratch: Path,
        stopping: asyncio.Event,
    ) -> None:
        self._slot = slot
        self._attempts = attempts
        self._claim = claim
        self._room = room
        self._scratch = scratch
        self._stopping = stopping
        self._troubles = 0
        self._given_back = 0
        self._stubborn = 0
        """How many requests went back at the cost of an attempt since the engine last did anything."""
        self._pause = 0.0
        """Seconds of rest that are due before the next claim."""
        self.working: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until ``stopping`` is set. What was begun goes on in ``working``."""
        while not self._stopping.is_set():
            try:
                # Before a claim: an engine that cannot start must not use up anybody's attempts, and a worker
                # whose disk is full must not take requests only to give them back.
                await self._slot.room()
                if self._pause:
                    await self._rest()
                    continue
                if not self._slot.is_fit() and not await self._started():
                    return
                if self._troubles:
                    await asyncio.to_thread(self._probe)
                await self._serve_one()
            except (ChildLost, OSError) as error:
                log.event("engine not started", slot=self._slot.name, error=str(error))
                self._troubled()
            except Exception:
                log.event("slot failed", slot=self._slot.name, traceback=traceback.format_exc())
                self._troubled()

    async def _started(self) -> bool:
        """Make the child fit; False where the worker stops meanwhile, which an engine's start must not hold up."""
        starting = asyncio.create_task(self._slot.ensure())
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                return True
            return False
        finally:
            for task in (starting, stopped):
                task.cancel()
            await asyncio.gather(starting, stopped, return_exceptions=True)

    async def _serve_one(self) -> None:
        """Claim one request and begin with it, where there is one."""
        # Room to deliver comes before the claim: a lease must not wait for it.
        await self._room.acquire()
        lease = None
        try:
            if not self._stopping.is_set():
                lease = await self._claim()
        finally:
            if lease is None:
                self._room.release()
        if lease is not None and self._stopping.is_set():  # it was asked for before that
            await self._attempts.release(lease)
            self._room.release()
        elif lease is not None:
            task = asyncio.create_task(self._work(self._slot.take(), lease))
            self.working.add(task)
            task.add_done_callback(self.working.discard)

    async def _work(self, hand: Hand, lease: Lease) -> None:
        """One attempt, and the delivery of what it made while the slot takes the next."""
        try:
            try:
                deliver = await self._attempts.run(self._slot, hand, lease)
                self._troubles = self._given_back = self._stubborn = 0
            finally:
                self._slot.free(hand)
            if deliver is not None:
                await deliver()
        except NotStarted:
            self._troubled()  # logged where it happened
        except GivenBack as back:
            # Where nothing else goes well in between, the engine may be at fault, and every attempt that this
            # costs takes longer than the one before.
            self._given_back += 1
            rest = pause_after(self._stubborn) if back.counted else 0.0
            self._stubborn += back.counted
            self._pause = max(self._pause, rest, pause_after(self._given_back - GIVEN_BACK_LIMIT))
        except Exception:
            log.event("slot failed", slot=self._slot.name, traceback=traceback.format_exc())
            self._troubled()
        finally:
            self._room.release()

    def _troubled(self) -> None:
        self._troubles += 1
        self._pause = max(self._pause, pause_after(self._troubles))

    async def _rest(self) -> None:
        seconds, self._pause = self._pause, 0.0
        log.event("slot pauses", slot=self._slot.name, seconds=seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _probe(self) -> None:
        """Raises OSError where the scratch folder cannot be written to."""
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = self._scratch / f"probe-{threading.get_ident()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()


def pause_after(times: int) -> float:
    """Seconds to pause after so many troubles in a row."""
    return min(LONGEST_PAUSE, RETRY_SECONDS * 2 ** min(times - 1, 10)) if times > 0 else 0.0
