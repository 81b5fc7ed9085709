"""What an engine is: the one thing that turns a job into files.

An engine runs inside a slot's child process, one job at a time, synchronously. It knows nothing of HTTP, of
the queue or of storage, and no other engine. It may be killed at any moment.
"""

from pathlib import Path
from typing import Any, Final, Literal, Protocol, runtime_checkable

import msgspec

from rushes.catalog.model import Model
from rushes.requests.record import Progress


class Report(Protocol):
    """Called by an engine as often as it likes; the worker thins it out."""

    def __call__(self, progress: Progress, *, ahead: bool = False) -> None:
        """Tell how far a job is. ``ahead`` says that the next one may come now, though this one takes longer than
        :data:`AHEAD_SECONDS` yet: what must be exclusive is over.
        """


class Job(msgspec.Struct, frozen=True):
    """One attempt at one request.

    ``roles`` maps each role of the model's inputs to its value; the role "resolution" is already
    ``(width, height)`` in pixels, and image and video roles are local paths of checked files (images: RGB PNG
    or a sample's PNG, upright, without alpha). ``input`` holds the raw values by field name.
    """

    request_id: str
    attempt: int
    model: Model
    input: dict[str, Any]
    roles: dict[str, Any]
    files: dict[str, Path]
    """Local paths of the input files by field name."""
    output_dir: Path
    """An empty folder for the engine; the worker stores what the engine returns and removes it."""


class Produced(msgspec.Struct, frozen=True):
    """One file that the engine made, with what is in it: sizes in pixels, fps in frames per second."""

    path: Path
    kind: Literal["image", "video"]
    content_type: str
    width: int
    height: int
    frames: int = 1
    fps: float | None = None


class Engine(Protocol):
    """Implementations raise :class:`rushes.errors.EngineError` for failures that a user should read."""

    name: str
    """The word by which results, logs and tables name the engine."""

    def warm(self, model: Model) -> None:
        """Load what ``model`` needs; called before the first job of a model. May take minutes."""

    def run(self, job: Job, report: Report) -> list[Produced]:
        """Generate. Blocks until the files are complete on disk."""


@runtime_checkable
class Overlapping(Protocol):
    """What an engine has besides, where fetching and storing of one job can overlap the generating of another.

    Such an engine's :meth:`Engine.run` is called in threads, up to ``lanes`` at once; it sees to it by itself
    that what must be exclusive is. The worker hands the next job in when the last one handed in has reported a
    ``Progress.eta`` of at most :data:`AHEAD_SECONDS` or that it is ``ahead``, or has ended: early enough to leave no
    gap, late enough that a request does not wait here while another slot is free.

    An engine whose ``one_model`` is True gets jobs of one model only, in its whole life: for another model the
    process is replaced, so that no memory of the old one stays.
    """

    lanes: int

    def abort(self, request_id: str, attempt: int) -> None:
        """End this job soon: its ``run`` raises EngineError ``aborted``. Called from another thread; returns at
        once; unknown jobs are no error. A job that does not end within :data:`ABORT_SECONDS` costs the process.
        """


AHEAD_SECONDS: Final = 1.0
ABORT_SECONDS: Final = 10.0
