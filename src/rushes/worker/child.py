"""The inside of a slot's child process: one engine, one job at a time.

A process of its own, because engines crash, hang, leak and are killed by the kernel, and none of that may take
the worker, its leases or another slot's job with it.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from rushes.engines.base import Engine, Job, Produced
from rushes.errors import EngineError
from rushes.guard import die_with_parent
from rushes.requests.record import Progress
from rushes.worker.messages import Done, Failed, Message, Ready, Step, line, read_job

_PROGRESS_SECONDS: Final = 0.05


def main(make_engine: Callable[[], Engine]) -> None:
    """Serve jobs from standard input until it ends. Whatever is printed goes to standard error."""
    out = _private_output()
    die_with_parent()
    _offer_to_the_oom_killer()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the supervisor's to handle
    jobs = _read_in_background(sys.stdin.buffer)
    try:
        engine = make_engine()
    except Exception as error:
        traceback.print_exc()
        _send(out, Failed("engine", "engine_start_failed", str(error) or repr(error)))
        os._exit(3)  # without a farewell: the reading thread may hold a lock that a farewell would want
    _send(out, Ready(engine.name))
    warm: str | None = None
    while True:
        job = read_job(jobs.get())
        message, warm = _run(engine, job, warm, _thinned(out))
        _send(out, message)


def _run(
    engine: Engine, job: Job, warm: str | None, report: Callable[[Progress], None]
) -> tuple[Message, str | None]:
    try:
        if warm != job.model.id:
            report(Progress(stage="loading"))
            engine.warm(job.model)
        produced = engine.run(job, report)
        _check(produced, job, may_be_none=not getattr(engine, "makes_files", True))
        return Done(produced), job.model.id
    except EngineError as error:
        return Failed("engine", error.reason, error.message, error.node, error.retryable), None
    except MemoryError:
        return Failed("engine", "out_of_memory", "The engine ran out of memory on this request."), None
    except OSError as error:
        print(f"request {job.request_id}: {error}", file=sys.stderr)
        text = "The worker could not read or write the request's files."
        return Failed("engine", "worker_storage", text, retryable=True), None
    except Exception:
        print(f"request {job.request_id}: the engine raised", file=sys.stderr)
        traceback.print_exc()
        text = "The engine failed on this request. The operator finds the reason in the worker's log."
        return Failed("unexpected", "engine_error", text), None


def _check(produced: list[Produced], job: Job, *, may_be_none: bool) -> None:
    """An engine's word is not enough: the files must be there, and of the kind that the model makes."""
    for file in produced:
        if not file.path.resolve().is_relative_to(job.output_dir.resolve()) or not file.path.is_file():
            raise EngineError("engine_error", "The engine named an output that it did not make.")
    if not may_be_none and job.model.output not in [file.kind for file in produced]:
        made = ", ".join(file.kind for file in produced) or "nothing"
        raise EngineError(
            "engine_error", f"The engine made {made}; the output of this model is: {job.model.output}."
        )


def _thinned(out: BinaryIO) -> Callable[[Progress], None]:
    last = 0.0
    stage = ""

    def report(progress: Progress) -> None:
        nonlocal last, stage
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS or progress.stage != stage:
            last, stage = now, progress.stage
            _send(out, Step(progress))

    return report


def _send(out: BinaryIO, message: Message) -> None:
    out.write(line(message))
    out.flush()


def _private_output() -> BinaryIO:
    """Keep the pipe to the worker for messages alone: libraries that print must not break the protocol."""
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return private


def _read_in_background(source: BinaryIO) -> "queue.SimpleQueue[bytes]":
    """Jobs as they come. The end of the input is the end of the worker: leave at once, in mid-job too."""
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(OSError):
            for text in source:
                jobs.put(text)
        os._exit(0)

    threading.Thread(target=read, name="rushes-slot-input", daemon=True).start()
    return jobs


def _offer_to_the_oom_killer() -> None:
    """Where memory runs out, one request should end, not the worker or the gateway."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", "ascii")
