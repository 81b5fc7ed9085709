"""What a job asks of Wan, with what it leaves open filled in from the manifest. Roles decide; a name never does.

Decides, and loads nothing: neither torch nor a file is touched.
"""

import hashlib
import math
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from rushes.catalog.model import Model, Role
from rushes.catalog.wan import BOUNDS, WanModel
from rushes.engines.base import Job
from rushes.errors import EngineError
from rushes.media.encode import MAX_SIDE

GRID: Final = 16
"""Pixels; sides of what is generated are multiples of it: 8 of the VAE times 2 of the transformer's patches."""
FRAMES_PER_LATENT: Final = 4
"""The VAE makes one latent frame of the first frame and one of each four that follow."""
LATENT_FRAMES: Final = 1024
"""The most that the position embedding has: ``rope_max_seq_len`` of ``WanTransformer3DModel``."""

# What holds where neither an input nor the manifest says anything: Wan's own defaults, of the configurations in its
# repository and of the pipelines in diffusers.
VIDEO_SIZE: Final = (832, 480)
IMAGE_SIZE: Final = (1024, 1024)
STEPS: Final = 40
GUIDANCE: Final = 5.0
SHIFT: Final = 5.0
FRAMES: Final = 81
FPS: Final = 16.0

_SEEDS: Final = 2**64


class Plan(msgspec.Struct, frozen=True):
    """One generation. Sizes and offsets in pixels, ``fps`` in frames per second, files by their local paths."""

    width: int
    height: int
    """What was asked for, and what comes out."""
    padded_width: int
    padded_height: int
    """What is generated: the next multiples of :data:`GRID`."""
    left: int
    top: int
    """Where the picture that was asked for begins in the one that is generated."""
    frames: int
    generated_frames: int
    """4n+1, and no fewer than ``frames``."""
    fps: float | None
    """None for an image."""
    seed: int
    """0 to 2**64-1."""
    steps: int
    guidance: float
    """Exactly 1 is without classifier-free guidance; between 0 and 1 is with it."""
    guidance_2: float
    """Of the low-noise expert."""
    shift: float
    scheduler: str
    prompt: str
    negative_prompt: str
    start_image: Path | None
    end_image: Path | None
    reference_images: tuple[Path, ...]
    source_video: Path | None
    kind: Literal["image", "video"]
    loras: tuple[tuple[str, float], ...]
    """Of the request: the file below the operator's folder of LoRAs, and its scale."""


def plan(job: Job, wan: WanModel, turbo: bool) -> Plan:  # noqa: FBT001 - there are but the two
    """What ``job`` asks for, with the profile ``turbo`` or without.

    Raises :class:`EngineError` with the input's name as its ``field`` for what Wan cannot generate, and
    ``profile_unusable`` where the manifest has no ``turbo``.
    """
    roles = {role: value for role, value in job.roles.items() if value is not None}
    read = _Reader(job.model, roles)
    image = job.model.output == "image"
    width, height = read.size(IMAGE_SIZE if image else VIDEO_SIZE)
    padded_width, padded_height = round_up(width), round_up(height)
    frames = 1 if image else read.whole("frames", wan.frames, FRAMES)
    steps = read.whole("steps", wan.steps, STEPS)
    guidance = read.number("guidance", wan.guidance, GUIDANCE)
    guidance_2 = guidance if wan.guidance_2 is None else wan.guidance_2
    shift = read.number("shift", wan.shift, SHIFT)
    scheduler: str = wan.scheduler
    if turbo:
        if wan.turbo is None:
            raise EngineError("profile_unusable", f"{job.model.id} has no profile turbo.")
        steps, guidance, guidance_2 = wan.turbo.steps, wan.turbo.guidance, wan.turbo.guidance
        shift = shift if wan.turbo.shift is None else wan.turbo.shift
        scheduler = wan.turbo.scheduler or scheduler
    references = _references(job)
    generated = whole_latents(frames)
    latents = (generated - 1) // FRAMES_PER_LATENT + 1
    if latents + len(references) > LATENT_FRAMES:
        most = FRAMES_PER_LATENT * (LATENT_FRAMES - len(references) - 1) + 1
        raise read.unusable("frames", f"{frames} frames are too many: Wan generates {most} at most.")
    return Plan(
        width=width,
        height=height,
        padded_width=padded_width,
        padded_height=padded_height,
        left=(padded_width - width) // 2,
        top=(padded_height - height) // 2,
        frames=frames,
        generated_frames=generated,
        fps=None if image else read.number("fps", wan.fps, FPS),
        seed=_seed(job, read),
        steps=steps,
        guidance=guidance,
        guidance_2=guidance_2,
        shift=shift,
        scheduler=scheduler,
        prompt=_text(roles.get("prompt", "")),
        negative_prompt=_text(roles.get("negative_prompt", wan.negative_prompt)),
        start_image=_path(roles, "start_image"),
        end_image=_path(roles, "end_image"),
        reference_images=references,
        source_video=_path(roles, "source_video"),
        kind=job.model.output,
        loras=tuple((str(one["path"]), float(one.get("scale", 1.0))) for one in roles.get("loras") or ()),
    )


def round_up(side: int) -> int:
    """The next multiple of :data:`GRID` that is not below ``side``; both in pixels."""
    return -(-side // GRID) * GRID


def whole_latents(frames: int) -> int:
    """The fewest frames of the form 4n+1 that are no fewer than ``frames``."""
    return -(-(frames - 1) // FRAMES_PER_LATENT) * FRAMES_PER_LATENT + 1


class _Reader:
    """The roles of one job, with the names of the inputs for messages."""

    def __init__(self, model: Model, roles: dict[str, Any]) -> None:
        self._model, self._roles = model, roles

    def unusable(self, role: Role, message: str) -> EngineError:
        field = self._model.field(role)
        name = "size" if role == "resolution" else role
        return EngineError(f"{name}_unusable", message, field=field.name if field else None)

    def size(self, default: tuple[int, int]) -> tuple[int, int]:
        value = self._roles.get("resolution", default)
        try:
            width, height = (int(side) for side in value)
        except (TypeError, ValueError):
            raise self.unusable("resolution", f"{value!r} is no width and height in pixels.") from None
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            message = f"{width}x{height} pixels is no size from 1 to {MAX_SIDE} a side."
            raise self.unusable("resolution", message)
        return width, height

    def number(self, role: Role, given: float | None, default: float) -> float:
        """From the input with this role, else ``given`` by the manifest, else the default; within the bounds."""
        value = self._roles.get(role, default if given is None else given)
        least, most = BOUNDS[role]
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not least <= number <= most:
            raise self.unusable(role, f"{role} is {value!r}; Wan takes {least:g} to {most:g}.")
        return number

    def whole(self, role: Role, given: int | None, default: int) -> int:
        number = self.number(role, given, default)
        if not number.is_integer():
            raise self.unusable(role, f"{role} is {number:g}; it must be a whole number.")
        return int(number)

    def seed(self) -> int | None:
        value = self._roles.get("seed")
        if value is None:
            return None
        if type(value) is not int:
            raise self.unusable("seed", f"seed is {value!r}; it must be a whole number.")
        return value % _SEEDS


def _seed(job: Job, read: _Reader) -> int:
    """The request's own; a model without one draws from the request's id, which a second attempt has as well."""
    given = read.seed()
    if given is not None:
        return given
    return int.from_bytes(hashlib.sha256(job.request_id.encode()).digest()[:8], "big")


def _text(value: object) -> str:
    """As it is, but for half surrogates, which no tokenizer takes."""
    return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _path(roles: dict[str, Any], role: Role) -> Path | None:
    value = roles.get(role)
    return Path(value) if value else None


def _references(job: Job) -> tuple[Path, ...]:
    """All reference images that were given, in the manifest's order: a role by itself names only one of them."""
    named = (field.name for field in job.model.inputs if field.role == "reference_image")
    files = tuple(Path(job.files[name]) for name in named if name in job.files)
    alone = _path(job.roles, "reference_image")
    return files or ((alone,) if alone else ())
