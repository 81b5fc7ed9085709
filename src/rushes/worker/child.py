"""The inside of a slot's child process: one engine, and the jobs that it works on.

A process of its own, because engines crash, hang, leak and are killed by the kernel, and none of that may take
the worker, its leases or another slot's job with it.

An engine has as many lanes as it says (:class:`rushes.engines.base.Overlapping`), each a thread that works on one
job at a time. The first lane is the main thread, and for most engines the only one: some libraries want it.
"""

import contextlib
import itertools
import math
import os
import queue
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from rushes.engines.base import AHEAD_SECONDS, Engine, Job, Overlapping, Produced, Report
from rushes.errors import EngineError, RushesError
from rushes.guard import die_with_parent
from rushes.requests.record import Progress
from rushes.worker.messages import (
    ABORTED,
    FAREWELL_SECONDS,
    LOADING,
    Abort,
    Done,
    Failed,
    Message,
    Ready,
    Run,
    Starting,
    Step,
    Unready,
    line,
    read_order,
)

Tell = Callable[[str], None]
"""Told, while an engine is made, what it is at."""
_PROGRESS_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 0.1
_PREVIEWS: Final = ("preview.jpg", "preview.png")
"""What the newest preview of a job is called, next to its ``output_dir``."""


def main(make_engine: Callable[[Tell], Engine]) -> None:
    """Serve jobs from standard input until it ends. Whatever is printed goes to standard error.

    ``make_engine`` may take long where it tells now and then that it gets on.
    """
    outgoing = _Outgoing(_private_output())
    die_with_parent()
    _offer_to_the_oom_killer()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the supervisor's to handle
    incoming = _Incoming(sys.stdin.buffer)
    try:
        engine = make_engine(lambda text: outgoing.send(Starting(text)))
    except Exception as error:
        if not isinstance(error, RushesError):  # those say all there is to say
            traceback.print_exc()
        outgoing.send(Unready(str(error) or repr(error)))
        os._exit(3)  # without a farewell: the reading thread may hold a lock that a farewell would want
    crew = incoming.crew = _Crew(engine, outgoing)
    lanes = max(1, engine.lanes) if isinstance(engine, Overlapping) else 1
    outgoing.send(
        Ready(
            engine.name,
            lanes,
            aborts=isinstance(engine, Overlapping),
            one_model=getattr(engine, "one_model", False),
            models=getattr(engine, "models", None),
        )
    )
    for number in range(1, lanes):
        threading.Thread(target=crew.work, name=f"rushes-lane-{number + 1}", daemon=True).start()
    crew.work()


class _Outgoing:
    """The pipe to the worker, for messages of several threads."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        text = line(message)
        # Without the worker there is nobody to tell, and the input's end sees to the rest.
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._pipe.write(text)
            self._pipe.flush()


class _Crew:
    """The lanes of one engine, and what is said to all of them."""

    def __init__(self, engine: Engine, outgoing: _Outgoing) -> None:
        self._engine = engine
        self._outgoing = outgoing
        self._jobs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._warm: str | None = None
        """The model whose job was begun last, as long as nothing failed since."""
        self._in_hand: dict[int, Job] = {}
        self._aborted: set[int] = set()

    def take(self, order: Run | Abort) -> None:
        """Called by the reading thread; returns at once."""
        if isinstance(order, Run):
            self._in_hand[order.ticket] = order.job
            self._jobs.put(order)
            return
        self._abort(order.ticket)

    def _abort(self, ticket: int) -> None:
        job = self._in_hand.get(ticket)
        if job is not None and isinstance(self._engine, Overlapping):
            self._aborted.add(ticket)  # in case the engine has not seen the job yet
            try:
                self._engine.abort(job.request_id, job.attempt)
            except Exception:
                traceback.print_exc()  # the worker asks again, and then ends us

    def leave(self) -> None:
        """The worker is gone or goes: what the engine has running elsewhere should not run on for nobody. Called by
        the reading thread; takes :data:`FAREWELL_SECONDS` at most, and no time for an engine that hears no abort.
        """
        until = time.monotonic() + FAREWELL_SECONDS
        while self._in_hand and isinstance(self._engine, Overlapping) and time.monotonic() < until:
            for ticket in tuple(self._in_hand):
                self._abort(ticket)
            time.sleep(_LOOK_SECONDS)

    def work(self) -> None:
        """One lane: a job at a time, for ever."""
        try:
            while True:
                run = self._jobs.get()
                answer = self._run(run)
                del self._in_hand[run.ticket]
                self._aborted.discard(run.ticket)
                self._outgoing.send(answer)
        except BaseException:
            # An engine that asks for the end of the process gets it, from any thread: a lane that ends alone
            # would leave its job without an answer.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(4)

    def _run(self, run: Run) -> Done | Failed:
        answer = self._answer(run)
        if isinstance(answer, Failed):
            self._warm = None
        return answer

    def _answer(self, run: Run) -> Done | Failed:
        ticket, job = run.ticket, run.job
        report = _thinned(self._outgoing, run)
        try:
            if self._warm != job.model.id:
                report(Progress(stage=LOADING))
                self._engine.warm(job.model)
                self._warm = job.model.id
            if ticket in self._aborted:
                raise EngineError(ABORTED, "The request was ended before it began.")
            produced = self._engine.run(job, report)
            _check(produced, job, may_be_none=not getattr(self._engine, "makes_files", True))
            return Done(ticket, produced)
        except Exception as problem:
            error = _in_words(problem, job)
            return Failed(
                ticket,
                error.reason,
                error.message,
                node=error.node,
                retryable=error.retryable,
                began=error.began,
                replace=error.replace,
                field=error.field,
            )


def _in_words(problem: Exception, job: Job) -> EngineError:
    """What a user may read of what an engine raised; the operator finds the rest in the log."""
    match problem:
        case EngineError():
            return problem
        case MemoryError():
            return EngineError("out_of_memory", "The engine ran out of memory on this request.")
        case OSError():
            print(f"request {job.request_id}: {problem}", file=sys.stderr)
            text = "The worker could not read or write the request's files."
            return EngineError("worker_storage", text, retryable=True)
    print(f"request {job.request_id}: the engine raised", file=sys.stderr)
    traceback.print_exception(problem)
    return EngineError(
        "engine_error",
        "The engine failed on this request. The operator finds the reason in the worker's log.",
    )


def _check(produced: list[Produced], job: Job, *, may_be_none: bool) -> None:
    """An engine's word is not enough: the files must be there, and of the kind that the model makes."""
    for file in produced:
        try:
            os.fspath(file.path).encode()
        except UnicodeEncodeError:
            text = "The engine made a file whose name is not UTF-8."
            raise EngineError("engine_error", text) from None
        if not _is_made(file.path, job.output_dir):
            raise EngineError("engine_error", "The engine named an output that it did not make.")
    if not may_be_none and job.model.output not in [file.kind for file in produced]:
        made = ", ".join(file.kind for file in produced) or "nothing"
        raise EngineError(
            "engine_error",
            f"The model should give {_article(job.model.output)}; what the engine gave is: {made}.",
        )


def _is_made(path: Path, folder: Path) -> bool:
    """Whether this is a file within the folder, also after every link."""
    if path.parent == folder:  # nearly always, and cheaper
        with contextlib.suppress(OSError):
            if stat.S_ISREG(path.lstat().st_mode):
                return True
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _article(kind: str) -> str:
    return f"an {kind}" if kind == "image" else f"a {kind}"


def _thinned(outgoing: _Outgoing, run: Run) -> Report:
    """A report for one job: so many a second, and those at once that the worker acts on."""
    last = 0.0
    may_follow = False
    shown: tuple[str, bool, bool] | None = None
    previews = itertools.cycle(run.job.output_dir.parent / name for name in _PREVIEWS)
    preview: Path | None = None

    def report(progress: Progress, *, ahead: bool = False) -> None:
        nonlocal last, shown, preview, may_follow
        may_follow = may_follow or ahead
        if not math.isfinite(progress.fraction):
            return  # says nothing, and has no JSON
        now = time.monotonic()
        ends = progress.eta is not None and progress.eta <= AHEAD_SECONDS
        soon = ends or may_follow
        # Near the end stages pass by faster than anybody reads them.
        news = ("" if ends else progress.stage, progress.fraction > 0, soon)
        if now - last >= _PROGRESS_SECONDS or news != shown:
            last, shown = now, news
            if preview is None and not ends and (path := next(previews)).exists():
                preview = path
            outgoing.send(Step(run.ticket, progress, preview, may_follow))

    return report


def _private_output() -> BinaryIO:
    """Keep the pipe to the worker for messages alone: libraries that print must not break the protocol."""
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return private


class _Incoming:
    """Reads what the worker says, from the start: the end of the input is the end of the worker, and then this
    process leaves, in mid-job too.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.crew: _Crew | None = None
        """Who hears it; there before we say that we are ready, and before that nothing is said."""
        threading.Thread(target=self._read, name="rushes-slot-input", daemon=True).start()

    def _read(self) -> None:
        try:
            for text in self._source:
                assert self.crew is not None
                self.crew.take(read_order(text))
        except OSError:
            pass
        except BaseException:
            # Another version's words: a job may be among what we did not understand.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(4)
        if self.crew is not None:
            self.crew.leave()
        os._exit(0)


def _offer_to_the_oom_killer() -> None:
    """Where memory runs out, one request should end, not the worker or the gateway."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", "ascii")
