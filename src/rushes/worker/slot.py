"""The outside of a slot: starts the child process, hands it jobs, replaces it when it dies."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from rushes.catalog.model import Model
from rushes.engines.base import ABORT_SECONDS, AHEAD_SECONDS, Job, Produced
from rushes.errors import EngineError
from rushes.guard import SUPERVISOR
from rushes.requests.record import Progress
from rushes.worker.messages import (
    ABORTED,
    FAREWELL_SECONDS,
    LOADING,
    Abort,
    Done,
    Failed,
    Ready,
    Run,
    Starting,
    Step,
    Unready,
    line,
    read_message,
)
from rushes.worker.process import ChildProcess

Show = Callable[[Progress, Path | None], None]
"""Told how far a job is, and where its newest preview lies."""
_ABORT_TRIES: Final = 4
"""How often an engine is asked to end a job before its process is ended."""
_FAREWELL_SECONDS: Final = FAREWELL_SECONDS + 0.5
"""How long a child may take to leave that ends its jobs first."""


class ChildLost(Exception):
    """The child process ended without an answer. ``message`` says how, in words for the user. ``counted`` False:
    this job had no part in it, nor had it begun.
    """

    def __init__(self, code: str, message: str, *, counted: bool = True) -> None:
        self.code, self.message, self.counted = code, message, counted
        super().__init__(message)


class Hand:
    """One request's place in a slot, from its claim until the slot is done with it."""

    def __init__(self, ticket: int) -> None:
        self.ticket = ticket
        self.child: ChildProcess | None = None
        """Who works on it, once it was handed in."""
        self.answer: asyncio.Future[Done | Failed | ChildLost] | None = None
        self.model: Model | None = None
        self.show: Show | None = None
        self.eta: float | None = None
        self.ahead = False
        """It does not keep the next one from being handed in any more."""
        self.loading = False
        """Its model is being loaded, and it is heard again when that is done."""
        self.began = False
        self.unwanted = False
        self.late: Literal["begun", "waiting"] | None = None
        """Where its time limit has passed: what it was doing all that time."""
        self.clock: asyncio.TimerHandle | None = None
        """Ends it when its time limit passes; None while it only waits for older jobs."""

    def settle(self, answer: Done | Failed | ChildLost) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(answer)


class Slot:
    """One engine slot. ``number`` counts a worker's slots from 0 and goes to the child as its last argument."""

    def __init__(self, command: Sequence[str], number: int, start_seconds: float) -> None:
        self._command = (*command, str(number))
        self._start_seconds = start_seconds
        self.name = f"slot-{number + 1}"
        self.engine = ""
        self.lanes = 1
        self.models: tuple[str, ...] | None = None
        """The only models that the engine can work on; None: any."""
        self._aborts = False
        self._one_model = False
        self._holds: str | None = None
        """The model that the child is for, where it is for one only."""
        self._child: ChildProcess | None = None
        self._greeting: asyncio.Future[Ready | ChildLost] | None = None
        self._getting_on = False
        """Whether the child, which starts, has said anything of late."""
        self._killed_for: str | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._hands: dict[int, Hand] = {}
        """By ticket, the newest last."""
        self._tickets = 0
        self._last: Model | None = None
        self._news = asyncio.Event()
        self._chores: set[asyncio.Task[None]] = set()

    # -- room -------------------------------------------------------------------------------------------
    @property
    def warm(self) -> Model | None:
        """The model that the engine will have loaded when the next job comes; None where nobody knows."""
        newest = next(reversed(self._hands.values()), None)
        return self._last if newest is None else newest.model

    async def room(self) -> None:
        """Wait until one more job may be handed in: none is in hand, or there is a lane left and the newest says
        that it ends soon.
        """
        while not self._has_room():
            self._news.clear()
            await self._news.wait()

    def _has_room(self) -> bool:
        newest = next(reversed(self._hands.values()), None)
        if newest is None:
            return True
        if self._retiring is not None or len(self._hands) >= self.lanes:
            return False
        return newest.ahead or (newest.eta is not None and newest.eta <= AHEAD_SECONDS)

    @property
    def busy(self) -> bool:
        return bool(self._hands)

    def take(self) -> Hand:
        """A place for the request that was just claimed. :meth:`free` gives it back."""
        self._tickets += 1
        hand = self._hands[self._tickets] = Hand(self._tickets)
        return hand

    def free(self, hand: Hand) -> None:
        """Done with it; a second time is no error."""
        if self._hands.pop(hand.ticket, None) is not None:
            self._look()

    def _look(self) -> None:
        if self._has_room():
            self._news.set()

    # -- the child --------------------------------------------------------------------------------------
    def is_fit(self) -> bool:
        """Whether there is a live child with its engine made."""
        return (
            self._child is not None
            and self._child.status is None
            and self._killed_for is None
            and self._retiring is None
            and self._greeting is None
        )

    async def ensure(self, model: Model | None = None) -> None:
        """Have a fit child, and one that takes jobs of ``model``: :meth:`run` comes directly after. Raises ChildLost
        or OSError where it does not come up.
        """
        if not (self.is_fit() and self._takes(model)):
            async with self._changing:
                if not (self.is_fit() and self._takes(model)):
                    await self._replace()
        if model is not None and self._one_model:
            self._holds = model.id

    def _takes(self, model: Model | None) -> bool:
        return model is None or self._holds in (None, model.id)

    async def _replace(self) -> None:
        if self._retiring is not None:
            await asyncio.wait([self._retiring])
        # Either it has died, and they are about to hear of what, or it is to make room for another model's.
        while pending := [hand.answer for hand in self._in_child() if hand.answer is not None]:
            await asyncio.wait(pending)
        await self.kill("replaced")
        await self._start()

    async def _start(self) -> None:
        self._killed_for = self._retiring = self._holds = None
        greeting = self._greeting = asyncio.get_running_loop().create_future()
        environment = os.environ | {SUPERVISOR: str(os.getpid())}
        self._child = await ChildProcess.start(self._command, environment, self._hear, self._ended)
        self._getting_on = True
        while self._getting_on and not greeting.done():
            self._getting_on = False
            await asyncio.wait([greeting], timeout=self._start_seconds)
        if not greeting.done():
            await self.kill("the engine did not start in time")
            raise ChildLost("engine_start_failed", "The engine did not start in time.")
        ready = greeting.result()
        if isinstance(ready, ChildLost):
            await self.kill("the engine failed to start")
            raise ready
        self._greeting = None
        self.engine, self.lanes, self._aborts = ready.engine, ready.lanes, ready.aborts
        self.models, self._one_model = ready.models, ready.one_model

    async def run(self, hand: Hand, job: Job, show: Show) -> list[Produced]:
        """Run one job to its end. Needs a fit child, so :meth:`ensure` comes directly before.

        Raises EngineError where the engine failed in an orderly way, ChildLost where the child died or was
        killed. Where the model's time limit passed: EngineError ``time_limit``; ``not_begun``, which is worth
        another attempt, where the engine had not begun in all that time.
        """
        if hand.unwanted:
            raise EngineError(ABORTED, "The request was ended before it began.")
        if self._child is None or not self.is_fit():
            raise ChildLost("engine_crashed", "The engine's process was not there.", counted=False)
        hand.child, hand.model, hand.show = self._child, job.model, show
        answer = hand.answer = asyncio.get_running_loop().create_future()
        self._child.write(line(Run(hand.ticket, job)))
        try:
            self._turn()
            await asyncio.wait([answer])
        finally:
            if hand.clock is not None:
                hand.clock.cancel()
        outcome = answer.result()
        if isinstance(outcome, Done):
            return outcome.produced
        limit = f"{job.model.time_limit:g} seconds"
        if hand.late == "begun":
            raise EngineError("time_limit", f"The engine took longer than {limit} and was ended.")
        if hand.late == "waiting":
            text = f"The engine did not begin with the request within {limit}."
            raise EngineError("not_begun", text, retryable=True)
        if isinstance(outcome, ChildLost):
            raise outcome
        raise EngineError(
            outcome.code,
            outcome.message,
            node=outcome.node,
            retryable=outcome.retryable,
            began=outcome.began,
            replace=outcome.replace,
            field=outcome.field,
        )

    def _turn(self) -> None:
        """The time of the oldest job runs: there is nothing of ours any more that it waits for."""
        oldest = next(iter(self._in_child()), None)
        if oldest is not None and oldest.clock is None:
            self._start_clock(oldest)

    def _start_clock(self, hand: Hand) -> None:
        if hand.model is not None and hand.late is None:
            if hand.clock is not None:
                hand.clock.cancel()
            loop = asyncio.get_running_loop()
            hand.clock = loop.call_later(hand.model.time_limit, self._too_late, hand)

    def _too_late(self, hand: Hand) -> None:
        if hand.answer is not None and not hand.answer.done():
            # With one lane there is nothing to wait behind, and not every engine tells that it has begun.
            hand.late = "begun" if hand.began or self.lanes == 1 else "waiting"
            self._do(self._end(hand, "time limit"))

    def abandon(self, hand: Hand, reason: str) -> None:
        """Nobody wants the outcome any more: have the job end, or never begin. Returns at once."""
        hand.unwanted = True
        if hand.answer is not None:
            self._do(self._end(hand, reason))

    async def _end(self, hand: Hand, reason: str) -> None:
        """End one job that was handed in: the engine is asked where it hears that, else its process is ended.
        ``hand.answer`` is there afterwards.
        """
        assert hand.child is not None
        assert hand.answer is not None
        tries = _ABORT_TRIES if self._aborts else 0
        while tries:
            hand.child.write(line(Abort(hand.ticket)))
            await asyncio.wait([hand.answer], timeout=ABORT_SECONDS / _ABORT_TRIES)
            if hand.answer.done():
                return
            # What is loaded for it serves the next one, who would have to wait for it all again.
            if hand.late is not None or not hand.loading:
                tries -= 1
        if not hand.answer.done():
            await self.kill(reason)

    def _hear(self, text: bytes) -> None:
        try:
            message = read_message(text)
        except msgspec.DecodeError:
            self._lost(ChildLost("engine_crashed", "The engine's process sent nonsense and was ended."))
            self._do(self.kill("garbled message"))
            return
        match message:
            case Step():
                self._step(message)
            case Done(ticket) | Failed(ticket):
                self._settle(ticket, message)
            case _ if self._greeting is None or self._greeting.done():
                pass
            case Starting():
                self._getting_on = True
            case Ready():
                self._greeting.set_result(message)
            case Unready(why):
                self._greeting.set_result(ChildLost("engine_start_failed", why))

    def _step(self, step: Step) -> None:
        hand, progress = self._hands.get(step.ticket), step.progress
        if hand is not None:
            hand.eta, hand.ahead, hand.loading = progress.eta, step.ahead, progress.stage == LOADING
            if progress.fraction > 0 and not hand.began:
                hand.began = True
                if self.lanes > 1:
                    self._start_clock(hand)  # anew: somebody else's work may have been before it
            if hand.show is not None:
                hand.show(progress, step.preview)
            self._look()

    def _settle(self, ticket: int, answer: Done | Failed) -> None:
        hand = self._hands.get(ticket)
        if hand is None:
            return
        if isinstance(answer, Failed):
            self._last = None
            if answer.replace and self._retiring is None and hand.child is self._child:
                self._retiring = self._do(self._retire())
            hand.settle(answer)
            self._turn()
            return
        self._last = hand.model
        hand.settle(answer)
        self.free(hand)  # its outcome is stored while the next one runs
        self._turn()

    async def _retire(self) -> None:
        """The engine asked to be replaced. What else is in hand may end by itself first, or say the same."""
        others = [hand.answer for hand in self._in_child() if hand.answer is not None]
        if others:
            await asyncio.wait(others, timeout=ABORT_SECONDS)
        await self.kill("the engine asked to be replaced")

    # -- its end ----------------------------------------------------------------------------------------
    def _ended(self, child: ChildProcess) -> None:
        if child is self._child and self._killed_for is None:
            self._do(self._bury(child))

    async def _bury(self, child: ChildProcess) -> None:
        """What became of the child that ended by itself. It, and whatever it forked, is gone afterwards."""
        status = await child.wait(2.0)
        if self._killed_for is not None:
            return
        self._killed_for = "lost"
        await child.kill()
        if status == -signal.SIGKILL:
            text = "The engine's process was killed, most likely because memory ran out."
            self._lost(ChildLost("engine_killed", text))
            return
        if status is None:
            how = "it closed its output"
        else:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._lost(ChildLost("engine_crashed", f"The engine's process ended unexpectedly ({how})."))

    def _lost(self, how: ChildLost) -> None:
        """The child has no answers any more, through its own fault: the oldest job's, for all that is known, and
        that of those which had begun.
        """
        if self._killed_for is None:
            self._killed_for = "lost"
        self._last = None
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_result(how)
        for place, hand in enumerate(self._in_child()):
            hand.settle(ChildLost(how.code, how.message, counted=place == 0 or hand.began))

    def _in_child(self) -> list[Hand]:
        """The jobs that the child has and has not answered, the oldest first."""
        return [
            hand
            for hand in self._hands.values()
            if hand.child is self._child and hand.answer is not None and not hand.answer.done()
        ]

    async def kill(self, reason: str) -> None:
        """End the child and all it started, at once, with every job in it."""
        self._last = None
        if self._killed_for is None:
            self._killed_for = reason
        child = self._child
        if child is None:
            return
        await child.kill()
        if child is not self._child:
            return
        text = "The engine's process had to be ended while it worked on this request."
        for hand in self._in_child():
            hand.settle(ChildLost("engine_crashed", text, counted=hand.began))
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_result(ChildLost("engine_start_failed", "The engine did not start."))

    async def stop(self, seconds: float = 2.0) -> None:
        """Let the child end by itself, for so long: its input ends. One that drives an engine elsewhere always gets
        the time to end there what it has in hand.
        """
        if self._child is not None:
            self._killed_for = self._killed_for or "stop"
            self._child.close_input()
            await self._child.wait(max(seconds, _FAREWELL_SECONDS if self._aborts else 0.0))
            await self.kill("stop")
        for chore in tuple(self._chores):
            chore.cancel()

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task
