"""The Wan engine: one model, loaded once, and two jobs at a time: one is denoised while the one before is decoded and
encoded.

It refuses to be more than one model: another one needs a new process, so that no memory of the old one stays. A job
that runs out of memory is tried again, alone and with less, before it fails; a failed or ended job leaves nothing
that the next one would notice.
"""

import contextlib
import math
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import torch
from PIL import Image

from rushes import log
from rushes.catalog.model import Model
from rushes.catalog.wan import WanModel, wan_of
from rushes.engines.base import Job, Produced, Report
from rushes.engines.wan import decode, profiles, ranks
from rushes.engines.wan.denoise import Denoiser, Stop
from rushes.engines.wan.load import Loaded, load
from rushes.engines.wan.loras import added
from rushes.engines.wan.memory import Rung, climb, is_out_of_memory, release
from rushes.engines.wan.pace import Meter, Paces, Shape
from rushes.engines.wan.plan import Plan, plan
from rushes.engines.wan.preview import Preview
from rushes.engines.wan.prompts import Embeddings
from rushes.engines.wan.turns import Turns
from rushes.engines.wan.weights import Local
from rushes.errors import EngineError, ManifestError, MediaError
from rushes.media.encode import Frame, VideoWriter, write_png
from rushes.requests.record import Progress

TURBO: Final = "turbo"
OUT_OF_MEMORY: Final = "out_of_memory"
_NAMES: Final = {"exact": "wan", "fast": "wan-fast", TURBO: "wan-turbo"}
_ROLES: Final = {"size": "resolution"}
_PREVIEW: Final = "preview.jpg"
_PREVIEW_SECONDS: Final = 1.0
_PREVIEW_QUALITY: Final = 85


class WanEngine:
    """See :class:`rushes.engines.base.Engine` and :class:`rushes.engines.base.Overlapping`.

    ``local`` gives a model's folders, fetched before; ``device`` is ``cuda`` or ``cpu``; ``loras_dir`` is where the
    LoRAs of requests are; ``models`` are the ids of the only models to serve, None for any. ``cards`` is how many
    cards make one video, all of which this process sees.
    """

    lanes = 2
    one_model = True

    def __init__(
        self,
        local: Callable[[Model], Local],
        *,
        profile: str,
        device: str,
        loras_dir: Path | None,
        models: tuple[str, ...] | None = None,
        cards: int = 1,
    ) -> None:
        self._cards = cards
        self.name = _NAMES[profile]
        self.models = models
        self._local, self._profile, self._device, self._loras_dir = local, profile, device, loras_dir
        self._loading = threading.Lock()
        self._ready: _Ready | None = None
        self._stops: dict[tuple[str, int], Stop] = {}

    def warm(self, model: Model) -> None:
        """Load ``model``; does nothing where it is loaded. Raises EngineError with ``replace`` where another one is,
        and what :func:`rushes.engines.wan.load.load` raises.
        """
        self._warmed(model)

    def run(self, job: Job, report: Report) -> list[Produced]:
        """Generate one picture or one video into ``job.output_dir``.

        Raises :class:`EngineError`: ``aborted``, ``out_of_memory`` with ``replace`` where no way to save memory was
        enough, and others for inputs that these weights do not take; OSError where the disk is full.
        """
        stop = self._stops[job.request_id, job.attempt] = Stop()
        try:
            ready = self._warmed(job.model)
            wanted = plan(job, ready.wan, self._profile == TURBO)
            return _Attempt(ready, wanted, stop, job, report, self._loras_dir).run()
        except MediaError as error:
            raise EngineError(error.reason, error.message) from error
        except EngineError as error:
            error.field = error.field or _field(error.reason, job.model)
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise _no_memory("go on with this") from error
            if isinstance(error, torch.AcceleratorError):
                traceback.print_exception(error)
                text = "The graphics card failed at this request, or at another one's."
                raise EngineError("engine_error", text, retryable=True, replace=True) from error
            raise
        finally:
            self._stops.pop((job.request_id, job.attempt), None)

    def abort(self, request_id: str, attempt: int) -> None:
        """End this job within a fraction of a second, whatever it does; see :class:`Overlapping`."""
        stop = self._stops.get((request_id, attempt))
        if stop is not None:
            stop.set()

    def _warmed(self, model: Model) -> "_Ready":
        try:
            wan = wan_of(model)
        except ManifestError as error:
            log.event("wan model unusable", model=model.id, problem=error.message)
            text = "This model's manifest cannot be used by the Wan engine. `rushes models check` says why."
            raise EngineError("model_unusable", text) from error
        with self._loading:
            if self._ready is None:
                self._ready = self._load(model, wan)
            elif (self._ready.model, self._ready.wan) != (model.id, wan):
                text = "The engine has another model loaded; it starts anew for this one."
                raise EngineError("other_model", text, retryable=True, began=False, replace=True)
            return self._ready

    def _load(self, model: Model, wan: WanModel) -> "_Ready":
        if self._profile == TURBO and wan.turbo is None:
            raise EngineError("profile_unusable", f"{model.id} has no profile turbo.")
        began, told = time.monotonic(), list[str]()
        local = self._found(model)
        turbo, others = self._profile == TURBO, None
        try:
            others = ranks.start(
                local,
                size=self._cards,
                turbo=turbo,
                profile=self._profile,
                device=self._device,
                loras_dir=self._loras_dir,
            )
            loaded = load(local, wan, turbo=turbo, device=self._device, tell=told.append)
            applied = profiles.apply(loaded, self._profile, tell=told.append, spread=others is not None)
            if others is not None:
                told.append(f"{self._cards} cards, deviation {others.join(loaded, applied):.2g}")
            ready = _Ready(model.id, wan, loaded, applied, others)
        except Exception as error:
            if others is not None:
                others.close()
            traceback.clear_frames(error.__traceback__)  # they would keep what is loaded so far
            if isinstance(error, EngineError) or not is_out_of_memory(error):
                raise
            raise _no_memory("load this model") from None
        log.event(
            "wan model ready",
            model=model.id,
            profile=self._profile,
            seconds=round(time.monotonic() - began, 1),
            done=[*told, *applied],
        )
        return ready

    def _found(self, model: Model) -> Local:
        try:
            return self._local(model)
        except EngineError as error:  # in words for the operator, with folders of this machine
            log.event("weights not usable", model=model.id, error=error.message)
            text = "The weights of this model are not whole on the server. Its operator finds the reason in the log."
            raise EngineError(error.reason, text, retryable=error.retryable) from error


class _Ready:
    """A loaded model with what belongs to it."""

    def __init__(
        self,
        model: str,
        wan: WanModel,
        loaded: Loaded,
        applied: profiles.Applied,
        others: ranks.Ranks | None,
    ) -> None:
        self.model, self.wan, self.loaded, self.applied, self.ranks = model, wan, loaded, applied, others
        self.denoiser = Denoiser(loaded, Embeddings())
        self.preview = Preview(loaded)
        self.paces = Paces()
        self.turns = Turns()
        self.crowds_from = self.encoded_in_tiles_from = self.decoded_in_tiles_from = math.inf
        """Jobs of so many tokens do not share the card with another one; have their pictures, or their frames, in
        tiles. By the size, so that what one job needed changes no bit of a smaller one, and a second request for the
        same gives the same.
        """


class _Attempt:
    """One job's way over the card."""

    def __init__(
        self, ready: _Ready, wanted: Plan, stop: Stop, job: Job, report: Report, loras_dir: Path | None
    ) -> None:
        self._ready, self._plan, self._stop = ready, wanted, stop
        self._job, self._report, self._loras_dir = job, report, loras_dir
        guided = wanted.guidance != 1 or wanted.guidance_2 != 1
        self._shape = Shape(wanted.padded_width, wanted.padded_height, wanted.generated_frames, guided)
        self._meter = Meter(ready.paces, self._shape, wanted.steps, time.monotonic)
        self._turn = ready.turns.turn(stop, lambda: self._tell(self._meter.waiting()))
        self._alone = False
        self._told_ahead = False
        self._previewed = -math.inf
        self._latents: torch.Tensor | None = None
        """What was denoised, as long as it is not decoded."""

    def run(self) -> list[Produced]:
        try:
            while True:
                try:
                    return [self._image() if self._plan.kind == "image" else self._video()]
                except BaseException as error:
                    if not is_out_of_memory(error):
                        raise
                    traceback.clear_frames(error.__traceback__)  # they hold what there was no room for
                self._make_room()
        finally:
            self._turn.leave()

    # -- the files ---------------------------------------------------------------------------------------------
    def _image(self) -> Produced:
        wanted = self._plan
        pictures: list[Frame] = []
        self._generate(pictures.append)
        path = self._job.output_dir / "wan.png"
        write_png(path, pictures[0])
        self._tell(self._meter.ended())
        return Produced(path, "image", "image/png", wanted.width, wanted.height)

    def _video(self) -> Produced:
        wanted = self._plan
        assert wanted.fps is not None
        path = self._job.output_dir / "wan.mp4"
        with VideoWriter(path, wanted.width, wanted.height, wanted.fps) as writer:
            self._generate(writer.write)
        self._tell(self._meter.ended())
        size = (wanted.width, wanted.height)
        return Produced(path, "video", "video/mp4", *size, writer.frames, float(writer.fps))

    # -- the card ----------------------------------------------------------------------------------------------
    def _generate(self, take: Callable[[Frame], None]) -> None:
        """Give every frame to ``take``. The card is the next job's when this returns."""
        ready, turn = self._ready, self._turn
        tokens = self._shape.tokens
        if self._latents is None:
            turn.denoise(alone=self._alone or tokens >= ready.crowds_from)
            ready.loaded.pipe.vae.use_tiling = tokens >= ready.encoded_in_tiles_from
            self._latents = self._denoise()
        denoised = self._meter.denoised()
        turn.denoised()
        self._tell(denoised, free=not turn.alone)
        turn.decode()
        ready.loaded.decoder.use_tiling = tokens >= ready.decoded_in_tiles_from
        with contextlib.closing(decode.frames(ready.loaded, self._latents, self._plan, self._stop)) as frames:
            for number, frame in enumerate(frames, 1):
                take(frame)
                self._tell(self._meter.decoded(number, self._plan.frames))
        self._latents = None
        turn.leave()
        self._tell(self._meter.decoded(self._plan.frames, self._plan.frames), free=True)

    def _denoise(self) -> torch.Tensor:
        self._tell(self._meter.begin())
        self._ready.applied.begin(self._plan.steps)
        with added(self._ready.loaded, self._plan.loras, self._loras_dir), self._spread() as stop:
            return self._ready.denoiser.run(self._plan, stop, self._stepped)

    def _spread(self) -> AbstractContextManager[Stop]:
        """On all cards of the slot; gives what is to be asked whether the job is to end."""
        if self._ready.ranks is None:
            return contextlib.nullcontext(self._stop)
        return self._ready.ranks.spread(self._plan, self._stop, lambda: self._turn.crowded)

    def _stepped(self, step: int, _steps: int, latents: torch.Tensor) -> None:
        self._tell(self._meter.step(step))
        now = time.monotonic()
        if now - self._previewed < _PREVIEW_SECONDS:
            return
        self._previewed = now
        pixels = self._ready.preview.image(latents)
        path = self._job.output_dir.parent / _PREVIEW
        part = path.with_name(f".{_PREVIEW}.part")
        if pixels is not None:
            with contextlib.suppress(OSError):  # a full disk is met again where it matters
                Image.fromarray(pixels).save(part, format="JPEG", quality=_PREVIEW_QUALITY)
                part.replace(path)

    def _make_room(self) -> None:
        """Have the card alone, and where that was so already, save memory. Raises EngineError where nothing is left
        to save.
        """
        ready, tokens, crowded = self._ready, self._shape.tokens, self._turn.crowded
        self._tell(self._meter.again(denoised=self._latents is not None))
        self._turn.leave()
        self._turn.denoise(alone=True)
        self._alone = True
        release()
        ready.crowds_from = min(ready.crowds_from, tokens)
        if not crowded:
            self._save()
        log.event(
            "wan out of memory",
            request=self._job.request_id,
            crowded=crowded,
            denoised=self._latents is not None,
            rung=ready.loaded.rung.name.lower(),
        )

    def _save(self) -> None:
        """One rung more than this try had."""
        ready, tokens = self._ready, self._shape.tokens
        denoised = self._latents is not None
        if tokens < (ready.decoded_in_tiles_from if denoised else ready.encoded_in_tiles_from):
            ready.decoded_in_tiles_from = min(ready.decoded_in_tiles_from, tokens)
            if not denoised:
                ready.encoded_in_tiles_from = tokens
            climb(ready.loaded, Rung.SAVING)
        elif ready.loaded.rung < Rung.OFFLOAD:
            climb(ready.loaded, Rung.OFFLOAD)
        else:
            raise _no_memory("generate this: ask for a smaller size or for fewer frames")

    def _tell(self, progress: Progress, *, free: bool = False) -> None:
        """``free``: the next job may come. That is said but once."""
        ahead = free and not self._told_ahead
        self._told_ahead |= ahead
        self._report(progress, ahead=ahead)


def _field(reason: str, model: Model) -> str | None:
    """The input that is at fault: reasons such as ``frames_unusable`` name its role."""
    role, word, _ = reason.rpartition("_unusable")
    found = (field.name for field in model.inputs if word and field.role == _ROLES.get(role, role))
    return next(found, None)


def _no_memory(what: str) -> EngineError:
    """The process goes, and what it held of the card with it."""
    return EngineError(OUT_OF_MEMORY, f"There is too little memory to {what}.", replace=True)
