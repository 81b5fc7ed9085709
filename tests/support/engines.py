"""Engines that do what the prompt says, for tests that start real processes.

``RUSHES_ENGINE=support.engines:PromptEngine`` with ``tests`` on PYTHONPATH. Each run appends
``request attempt`` to the file in ``RUSHES_TEST_RUNS`` before it does anything else.
"""

import os
import signal
import struct
import threading
import time
import zlib
from pathlib import Path

from rushes.catalog.model import Model
from rushes.engines.base import Job, Produced, Report
from rushes.errors import EngineError
from rushes.requests.record import Progress


def _note(job: Job) -> None:
    if os.environ.get("RUSHES_TEST_RUNS"):
        with Path(os.environ["RUSHES_TEST_RUNS"]).open("a") as log:
            log.write(f"{job.request_id} {job.attempt}\n")


class PromptEngine:
    """Words of the prompt, in order: ok, sleep N, until FILE (in RUSHES_TEST_GATES), crash, crash-once, oom, hang,
    fail, raise, retry, big N.
    """

    name = "prompt"

    def warm(self, model: Model) -> None:
        if os.environ.get("RUSHES_TEST_WARMED"):
            with Path(os.environ["RUSHES_TEST_WARMED"]).open("a") as log:
                log.write(f"{model.id}\n")

    def run(self, job: Job, report: Report) -> list[Produced]:
        _note(job)
        words = iter(str(job.roles.get("prompt", "ok")).split())
        size = 8
        for word in words:
            report(Progress(fraction=0.5, stage=word))
            match word:
                case "sleep":
                    time.sleep(float(next(words)))
                case "until":
                    gate = _gate(next(words))
                    while not gate.exists():
                        time.sleep(0.01)
                case "hang":
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                    time.sleep(3600)
                case "crash":
                    os._exit(3)
                case "crash-once" if job.attempt == 1:
                    os.abort()
                case "oom":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "fail":
                    raise EngineError("bad_prompt", "The prompt asks to fail.", node="6 CLIPTextEncode")
                case "retry" if job.attempt == 1:
                    raise EngineError("out_of_memory", "Out of memory.", retryable=True)
                case "raise":
                    raise RuntimeError("/secret/path")
                case "print":
                    print("a library prints to standard output")
                case "big":
                    size = int(next(words))
                case "fork":
                    _helper(away=False)
                case "fork-away":
                    _helper(away=True)
                case "wild":
                    path = job.output_dir / "out.tiff (1)"
                    path.write_bytes(b"II*\0")
                    return [Produced(path, "image", "image/tiff", 1, 1)]
                case "nothing":
                    return []
                case "other-kind":
                    path = job.output_dir / "out.mp4"
                    path.write_bytes(b"x")
                    return [Produced(path, "video", "video/mp4", 8, 8)]
                case "inputs":
                    size = sum(path.stat().st_size for path in job.files.values()) % 64 + 1
        path = job.output_dir / "out.png"
        path.write_bytes(png(size, size))
        # For the queue's tests a video model's output need not be a video; a worker looks at the kind alone.
        return [Produced(path, job.model.output, "image/png", size, size)]


class OverlappingEngine:
    """Two jobs at once, of which one at a time can ``work``. Words of the prompt, in order:

    - ``soon``, ``later``, ``begin``: reports that it ends soon, that it does not, that it has begun.
    - ``ahead``: reports that it takes long yet, and that the next one may come.
    - ``nearly``, ``started``: reports of the stage "later" that it ends soon, and that it has begun.
    - ``work MS``: works so many milliseconds, alone.
    - ``wait NAME``: makes the file ``NAME.here`` in RUSHES_TEST_GATES and waits for ``NAME`` there.
    - ``deaf``: from here on no abort is heard.
    - ``preview``: leaves a preview and reports.
    - ``unbegun NAME``, ``replace NAME``: until there is such a file, make ``NAME.gone`` and end without having
      begun; with ``replace`` the engine cannot go on either.
    - ``fail``, ``crash``, ``exit``.
    """

    name = "overlapping"
    lanes = 2

    def __init__(self) -> None:
        self._alone = threading.Lock()
        self._aborted: dict[tuple[str, int], threading.Event] = {}

    def warm(self, model: Model) -> None:
        gate = _gate("loaded")
        if gate.with_suffix(".wait").exists():
            while not gate.exists():
                time.sleep(0.005)

    def abort(self, request_id: str, attempt: int) -> None:
        if (request_id, attempt) in self._aborted:
            self._aborted[request_id, attempt].set()

    def run(self, job: Job, report: Report) -> list[Produced]:
        _note(job)
        aborted = self._aborted[job.request_id, job.attempt] = threading.Event()
        try:
            self._obey(job, report, aborted)
        finally:
            del self._aborted[job.request_id, job.attempt]
        path = job.output_dir / "out.png"
        path.write_bytes(png(8, 8))
        return [Produced(path, job.model.output, "image/png", 8, 8)]

    def _obey(self, job: Job, report: Report, aborted: threading.Event) -> None:
        words = iter(str(job.roles.get("prompt", "")).split())
        for word in words:
            match word:
                case "soon":
                    report(Progress(stage="soon", eta=0.1))
                case "later":
                    report(Progress(stage="later", eta=100.0))
                case "nearly":
                    report(Progress(stage="later", eta=0.1))
                case "started":
                    report(Progress(fraction=0.1, stage="later", eta=0.1))
                case "ahead":
                    report(Progress(stage="ahead", eta=100.0), ahead=True)
                case "begin":
                    report(Progress(fraction=0.5, stage="begun"))
                case "work":
                    with self._alone:
                        time.sleep(float(next(words)) / 1000)
                case "wait":
                    gate = _gate(next(words))
                    gate.with_suffix(".here").write_text(str(os.getpid()))
                    while not gate.exists():
                        if aborted.wait(0.005):
                            raise EngineError("aborted", "Aborted.")
                case "deaf":
                    aborted = threading.Event()
                case "preview":
                    (job.output_dir.parent / "preview.png").write_bytes(png(4, 4))
                    report(Progress(stage="previewed"))
                case "unbegun" | "replace":
                    gate = _gate(next(words))
                    if not gate.exists():
                        gate.with_suffix(".gone").touch()
                        text = "Not begun."
                        raise EngineError("gone", text, retryable=True, began=False, replace=word == "replace")
                case "fail":
                    raise EngineError("bad_prompt", "The prompt asks to fail.")
                case "crash":
                    os._exit(3)
                case "exit":
                    raise SystemExit(3)


class OneModelEngine(OverlappingEngine):
    """One whose process is for one model."""

    one_model = True


class ChoosyEngine(OverlappingEngine):
    """One that can tell what it can work on."""

    models = ("me/long",)


class SharingEngine(OverlappingEngine):
    """One that keeps weights from one workflow to the next."""

    name = "comfyui"


def never() -> OverlappingEngine:
    """An engine that does not come up."""
    time.sleep(3600)
    return OverlappingEngine()


def _gate(name: str) -> Path:
    return Path(os.environ["RUSHES_TEST_GATES"]) / name


def _helper(*, away: bool) -> None:
    """Fork, as libraries do for their workers: the helper keeps our pipes open and outlives us."""
    pid = os.fork()
    if pid:
        with Path(os.environ["RUSHES_TEST_HELPERS"]).open("a") as log:
            log.write(f"{pid}\n")
        return
    if away:
        os.setsid()
    time.sleep(60)
    os._exit(0)


def png(width: int, height: int) -> bytes:
    """A real PNG of one colour, stored without compression so that large ones are large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x40\x80\xc0" * width for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows, 0))
        + chunk(b"IEND", b"")
    )
