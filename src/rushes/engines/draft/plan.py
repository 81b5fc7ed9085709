"""What a job asks for, with what it leaves open filled in. Roles decide; a model's name never does."""

import math
import random
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from rushes.engines.base import Job
from rushes.errors import EngineError
from rushes.media.encode import MAX_SIDE

Kind = Literal["morph", "camera", "orbit", "footage", "card", "still", "title"]
"""What is drawn:

- morph: video from a start picture to an end picture
- camera: video of a camera moving over a picture
- orbit: the same around the subject of a reference picture
- footage: video cut from a source video
- card: picture of the prompt, typeset
- still: picture of a picture, with the prompt as its caption
- title: video of the prompt, typeset
"""

VIDEO_SIZE: Final = (832, 480)
IMAGE_SIZE: Final = (1024, 1024)
FRAMES: Final = 81
FPS: Final = 16.0
MAX_FRAMES: Final = 100_000


class Plan(msgspec.Struct, frozen=True):
    """Sizes in pixels, ``fps`` in frames per second, files by their local paths."""

    kind: Kind
    width: int
    height: int
    frames: int
    fps: float
    seed: int
    prompt: str
    negative: str
    title: str
    """The model's name, for the small print."""
    picture: Path | None = None
    end: Path | None = None
    footage: Path | None = None

    def random(self, purpose: str) -> random.Random:
        """A stream of its own for ``purpose``; the standard library keeps these the same for ever."""
        return random.Random(f"{purpose}:{self.seed}")


def plan(job: Job) -> Plan:
    """Read the job's roles. Raises :class:`EngineError` for values that no picture can have."""
    roles = {role: value for role, value in job.roles.items() if value is not None}
    start, end = _path(roles, "start_image"), _path(roles, "end_image")
    reference, footage = _path(roles, "reference_image"), _path(roles, "source_video")
    picture = start or reference or end
    video = job.model.output == "video"
    kind: Kind
    if not video:
        kind = "still" if picture else "card"
    elif start and end:
        kind = "morph"
    elif footage:
        kind = "footage"
    elif picture:
        kind = "camera" if start or not reference else "orbit"
    else:
        kind = "title"
    width, height = _size(roles, VIDEO_SIZE if video else IMAGE_SIZE)
    return Plan(
        kind=kind,
        width=width,
        height=height,
        frames=int(_number(roles, "frames", FRAMES, 1, MAX_FRAMES)) if video else 1,
        fps=_number(roles, "fps", FPS, 0.1, 240),
        seed=int(_number(roles, "seed", 0, -math.inf, math.inf)),
        prompt=clean(roles.get("prompt", "")),
        negative=clean(roles.get("negative_prompt", "")),
        title=clean(job.model.name),
        picture=picture,
        end=end,
        footage=footage,
    )


def clean(text: object) -> str:
    """``text`` as one paragraph that can be drawn: no control characters, no half surrogates."""
    whole = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join("".join(c if c.isprintable() or c in _JOINERS else " " for c in whole).split())


_JOINERS: Final = "\u200c\u200d"
"""Invisible, but Indic and Persian words are wrong without them."""


def _path(roles: dict[str, Any], role: str) -> Path | None:
    value = roles.get(role)
    return Path(value) if value else None


def _size(roles: dict[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    value = roles.get("resolution", default)
    try:
        width, height = (int(side) for side in value)
    except (TypeError, ValueError):
        raise EngineError("size_unusable", f"{value!r} is no width and height in pixels.") from None
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise EngineError("size_unusable", f"{width}x{height} pixels is no size from 1 to {MAX_SIDE} a side.")
    return width, height


def _number(roles: dict[str, Any], role: str, default: float, least: float, most: float) -> float:
    value = roles.get(role, default)
    try:
        number = value if isinstance(value, int) else float(value)
        finite = math.isfinite(number) if isinstance(number, float) else True
    except (TypeError, ValueError):
        finite, number = False, 0
    if not finite or not least <= number <= most:
        raise EngineError(f"{role}_unusable", f"{role} is {value!r}; the draft engine takes {least} to {most}.")
    return number
