"""What the tests of the whole Wan engine share: tiny models with a manifest, jobs, and what is told of them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final

import av
import numpy as np

from rushes.catalog.model import Input, Model
from rushes.engines.base import Job, Produced
from rushes.engines.wan.weights import Local
from rushes.requests.record import Progress
from support.tiny_diffusers import Kind

SECONDS: Final = 60.0
"""Until something that should happen in a moment is given up."""
_numbers = count()


def model(kind: Kind, weights: Path, *, output: str = "video", **changed: Any) -> Model:
    """A model of the catalog with the table of this engine."""
    table = {"weights": str(weights), "steps": 2, "guidance": 3.0, "shift": 3.0, **changed}
    inputs = (
        Input(name="text", title="Text", type="string", role="prompt"),
        Input(name="length", title="Length", type="integer", role="frames"),
        Input(name="styles", title="Styles", type="loras", role="loras"),
    )
    return Model(
        id=f"tiny/{kind}",
        name=kind,
        description="",
        categories=(),
        output="image" if output == "image" else "video",
        inputs=inputs,
        required=(),
        folder=weights,
        options={"wan": table},
    )


def local(model_: Model) -> Local:
    return Local(folder=Path(model_.options["wan"]["weights"]))


def job(model_: Model, folder: Path, **roles: Any) -> Job:
    """A request of its own; a small video where ``roles`` say nothing else."""
    name = f"request-{next(_numbers)}"
    output = folder / name / "outputs"
    output.mkdir(parents=True)
    given = {"prompt": "a cat", "resolution": (32, 48), "frames": 5, "fps": 12, "seed": 3, **roles}
    return Job(name, 1, model_, {}, given, {}, output)


class Heard:
    """Everything that an engine reports of one job; ``on`` is called with each in the job's own thread."""

    def __init__(self, on: Callable[[Progress], None] = lambda _: None) -> None:
        self.told: list[Progress] = []
        self.ahead: list[int] = []
        """Which of them said that the next job may come."""
        self._on = on
        self._news = threading.Condition()

    def __call__(self, progress: Progress, *, ahead: bool = False) -> None:
        with self._news:
            if ahead:
                self.ahead.append(len(self.told))
            self.told.append(progress)
            self._news.notify_all()
        self._on(progress)

    @property
    def stages(self) -> list[str]:
        """In their order, each once for as long as it lasts."""
        names = [progress.stage for progress in self.told]
        return [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]

    def wait(self, stage: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: stage in self.stages, SECONDS), f"never came to {stage}"


class Running:
    """A job in a thread, as a lane of the slot's process works on it."""

    def __init__(self, engine: Any, job_: Job, heard: Heard | None = None) -> None:
        self.job, self.heard = job_, heard or Heard()
        self._engine = engine
        self._made: list[Produced] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=job_.request_id)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made = self._engine.run(self.job, self.heard)
        except BaseException as error:
            self._error = error

    def abort(self) -> None:
        self._engine.abort(self.job.request_id, self.job.attempt)

    def ended(self) -> BaseException | None:
        """Wait for its end; with which error."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), f"{self.job.request_id} has not ended: {self.heard.stages}"
        return self._error

    def made(self) -> bytes:
        """The bytes of its one file."""
        error = self.ended()
        if error is not None:
            raise error
        (file,) = self._made
        return file.path.read_bytes()


def made(engine: Any, job_: Job) -> bytes:
    (file,) = engine.run(job_, Heard())
    return bytes(file.path.read_bytes())


def video(path: Path) -> tuple[tuple[int, int, int, int], float]:
    """Frames, height, width and colours of a video, decoded, and its frames per second."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return np.stack(frames).shape, float(stream.average_rate)  # type: ignore[return-value]


@contextmanager
def before(module: Any, call: Callable[[], None]) -> Iterator[None]:
    """Within, ``call`` comes before every pass of a part of the model, in the thread that works; it may raise."""
    handle = module.register_forward_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        handle.remove()
