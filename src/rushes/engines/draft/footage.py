"""A source video, cut to the size, length and frame rate asked for, one frame at a time."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from rushes.engines.draft.camera import cover
from rushes.engines.draft.plan import Plan
from rushes.errors import EngineError
from rushes.media.encode import Frame


def footage(plan: Plan, path: Path) -> Iterator[Frame]:
    """``plan.frames`` views of the video at ``path`` at its own speed; the last one is held at its end.

    Raises :class:`EngineError` for a file without a picture.
    """
    given = 0
    shown: Frame | None = None
    try:
        with av.open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            first: float | None = None
            for frame in container.decode(video=0):
                time = frame.time or 0.0
                first = time if first is None else first
                while shown is not None and given < plan.frames and given / plan.fps < time - first:
                    yield shown.copy()
                    given += 1
                if given >= plan.frames:
                    return
                shown = cover(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8), plan.width, plan.height)
    except (av.FFmpegError, IndexError) as error:
        if shown is None:
            raise EngineError("input_not_media", "The source video cannot be decoded.") from error
    if shown is None:
        raise EngineError("input_not_media", "The source video has no frames.")
    for _ in range(given, plan.frames):
        yield shown.copy()
