"""The no-op engine that says when it ran: one line `id attempt nanoseconds` per run, appended in one write."""

import os
import time

from rushes.engines.base import Job, Produced, Report
from rushes.engines.noop import NoopEngine


class RecordingEngine(NoopEngine):
    name = "noop"

    def __init__(self) -> None:
        self._log = os.open(os.environ["BENCH_ENGINE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def run(self, job: Job, report: Report) -> list[Produced]:
        os.write(self._log, f"{job.request_id} {job.attempt} {time.time_ns()}\n".encode())
        return super().run(job, report)


def factory() -> RecordingEngine:
    """For RUSHES_ENGINE=recording_engine:factory."""
    return RecordingEngine()
