"""The draft engine: an animatic on the CPU, of the exact size, length and rate asked for, in seconds.

It refuses to be taken for a generation: it draws from the request's own inputs, says so in the file's comment,
and burns in a mark.
"""

import time
from collections.abc import Iterator
from typing import Final

from rushes.catalog.model import Model
from rushes.engines.base import Job, Produced, Report
from rushes.engines.draft import moves
from rushes.engines.draft.camera import Camera
from rushes.engines.draft.card import card, still, title
from rushes.engines.draft.footage import footage
from rushes.engines.draft.mark import Mark
from rushes.engines.draft.morph import Morph
from rushes.engines.draft.plan import Plan, plan
from rushes.errors import EngineError, MediaError
from rushes.media.encode import Frame, VideoWriter, read_picture, write_png
from rushes.requests.record import Progress

COMMENT: Final = "Made by the Rushes draft engine: an animatic of the inputs, not a generation."


class DraftEngine:
    """Draws every model's output; ``mark`` False leaves the burnt-in mark out."""

    name = "draft"

    def __init__(self, mark: bool = True) -> None:  # noqa: FBT001, FBT002 - it mirrors the setting
        self._mark = mark

    def warm(self, model: Model) -> None:
        """There is nothing to load."""

    def run(self, job: Job, report: Report) -> list[Produced]:
        """Draw one picture or one video into ``job.output_dir``.

        Raises :class:`EngineError` for sizes, lengths or rates that cannot be drawn, and for files that cannot
        be read.
        """
        wanted = plan(job)
        try:
            if job.model.output == "image":
                return [self._image(job, wanted, report)]
            return [self._video(job, wanted, report)]
        except MediaError as error:
            raise EngineError(error.reason, error.message) from error

    def _image(self, job: Job, wanted: Plan, report: Report) -> Produced:
        report(Progress(fraction=0.0, stage="rendering", step=0, steps=1))
        picture = still(wanted, read_picture(wanted.picture)) if wanted.picture else card(wanted)
        if self._mark:
            Mark(wanted.width, wanted.height, None).stamp(picture, 0)
        path = job.output_dir / "draft.png"
        write_png(path, picture, comment=COMMENT)
        report(Progress(fraction=1.0, stage="rendering", step=1, steps=1, eta=0.0))
        return Produced(path, "image", "image/png", wanted.width, wanted.height)

    def _video(self, job: Job, wanted: Plan, report: Report) -> Produced:
        report(Progress(fraction=0.0, stage="preparing", step=0, steps=wanted.frames))
        mark = Mark(wanted.width, wanted.height, wanted.fps) if self._mark else None
        path = job.output_dir / "draft.mp4"
        began = time.monotonic()
        with VideoWriter(path, wanted.width, wanted.height, wanted.fps, comment=COMMENT) as writer:
            for number, frame in enumerate(_frames(wanted)):
                if mark:
                    mark.stamp(frame, number)
                writer.write(frame)
                done = number + 1
                left = (time.monotonic() - began) / done * (wanted.frames - done)
                fraction = done / (wanted.frames + 1)  # the last share is the encoder's: it closes the file
                report(Progress(fraction, "rendering", done, wanted.frames, round(left, 2)))
        report(Progress(1.0, "rendering", wanted.frames, wanted.frames, 0.0))
        return Produced(
            path, "video", "video/mp4", wanted.width, wanted.height, wanted.frames, float(writer.fps)
        )


def _frames(wanted: Plan) -> Iterator[Frame]:
    if wanted.kind == "morph" and wanted.picture and wanted.end:
        return Morph(wanted, read_picture(wanted.picture), read_picture(wanted.end)).views()
    if wanted.kind == "footage" and wanted.footage:
        return footage(wanted, wanted.footage)
    orbit = wanted.kind == "orbit"
    move = moves.read(wanted.prompt, wanted.random("move"), orbit=orbit)
    if wanted.picture:
        return Camera(wanted, read_picture(wanted.picture), move).views()
    return title(wanted, move)
