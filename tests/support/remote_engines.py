"""A remote engine in this process that does what the prompt says, and remembers what it was asked.

Words of the prompt: ok, slow N (polls), stay (until :attr:`ScriptedRemote.gate` is set), refuse, moderate, fail,
retry, throttle, unreachable, poison, unknown, lost-poll, late, garble, silent, expire, at-once.
"""

import asyncio
from collections import Counter
from pathlib import Path

from rushes.catalog.model import Model
from rushes.engines.remote.base import (
    Accepted,
    Finished,
    RemoteFile,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
    Underway,
)
from rushes.media.encode import write_png
from rushes.requests.record import Progress


class ScriptedRemote:
    """See the module. ``serves`` all models unless ``only`` names some."""

    origin = "https://remote.example:443"
    poll_seconds = 0.02

    def __init__(self, name: str = "dashscope", only: tuple[str, ...] = (), kind: str = "dashscope") -> None:
        self.name = name
        self.kind = kind
        self._only = only
        self.submits: Counter[str] = Counter()
        self.polls: Counter[str] = Counter()
        self.cancelled: list[str] = []
        self.gate = asyncio.Event()
        self.submitting = asyncio.Event()
        self.hold = asyncio.Event()
        """A submit with the word "held" waits for it before it answers."""

    def serves(self, model: Model) -> bool:
        return not self._only or model.id in self._only

    def headers(self) -> dict[str, str]:
        return {}

    async def submit(self, job: RemoteJob) -> Accepted | Finished:
        word = str(job.roles["prompt"]).split()[0]
        self.submits[job.request_id] += 1
        self.submitting.set()
        match word:
            case "held":
                await self.hold.wait()
            case "refuse":
                raise RemoteRefused("remote_refused", "The prompt is not to its taste.", field="prompt")
            case "moderate":
                raise RemoteRefused("content_refused", "The prompt was refused by moderation.")
            case "unknown":
                raise SubmitUnknown("no answer came")
            case "unreachable":
                raise RemoteUnavailable("unreachable", "connection refused")
            case "poison":
                raise RemoteUnavailable("fault", "500")
            case "throttle" if self.submits[job.request_id] == 1:
                raise RemoteUnavailable("throttled", "too many", retry_after=0.3)
            case "at-once":
                return self._done(job, cost=0.5)
        return Accepted(f"{word}:{job.request_id}")

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        word = handle.partition(":")[0]
        self.polls[job.request_id] += 1
        times = self.polls[job.request_id]
        match word:
            case "slow" if times < 5:
                return Underway(Progress(fraction=times / 10, stage="generating"))
            case "stay" if not self.gate.is_set():
                return Underway(Progress(stage="waiting there"))
            case "fail":
                raise RemoteRefused("remote_failed", "It broke there.")
            case "retry" if self.submits[job.request_id] == 1:
                raise RemoteRefused("remote_failed", "It broke there; try again.", retryable=True)
            case "late" if times < 4:
                raise RemoteRefused("remote_lost", "It is not known here.", billed=True)
            case "garble" if times < 4:
                raise ValueError("an answer that nobody expected")
            case "silent":
                raise RemoteUnavailable("fault", "500")
            case "lost-poll" if times < 4:
                raise RemoteUnavailable("fault", "502")
            case "expire" if times < 3:
                return Finished((RemoteFile(path=job.folder / "gone.png"),))
        return self._done(job)

    def _done(self, job: RemoteJob, cost: float | None = None) -> Finished:
        return Finished((RemoteFile(path=picture(job.folder / "made.png")),), cost)

    async def cancel(self, handle: str) -> None:
        self.cancelled.append(handle)

    async def close(self) -> None:
        return


def picture(path: Path, width: int = 48, height: int = 32) -> Path:
    """A real PNG of this size in pixels."""
    import numpy as np

    write_png(path, np.full((height, width, 3), 128, dtype=np.uint8))
    return path
