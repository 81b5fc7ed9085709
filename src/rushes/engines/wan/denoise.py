"""From a plan to the latents of its video: the stock pipeline's own loop, with the means to end it at once.

The loop, the arithmetic and the order of random numbers are those of diffusers' ``__call__``, bit for bit. A job
runs on a shallow copy of the pipeline, which shares the models and nothing else: the sampler, the guidance and what
else the loop writes down belong to one job and go with it. What the models themselves remember, caches and traces, is
forgotten after every failure, so that a job is the same after an ended one as on models that were just loaded.
"""

import functools
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from rushes.engines.wan import memory, pictures
from rushes.engines.wan.plan import Plan
from rushes.engines.wan.prompts import TOKENS, Embeddings
from rushes.engines.wan.schedules import schedule
from rushes.errors import EngineError

if TYPE_CHECKING:
    from rushes.engines.wan.load import Loaded

OnStep = Callable[[int, int, torch.Tensor], None]
"""Told after each step: the step from 1, how many there are, and the clean latents that the step aimed at. Those are
cut like the result, and a preview's to read: nothing else uses them."""
RUN_AHEAD: Final = 4
"""Blocks. A card works through a line of what it was asked for, in which a whole step may wait; held this short, an
ended job leaves it free within a few blocks, and it never runs dry."""
_BLOCKS: Final = ("blocks", "vace_blocks")
"""The lists of layers of Wan's transformers, by their names in diffusers."""


class Stop:
    """The wish that a job end, from any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raise EngineError ``aborted`` where the job is to end."""
        if self._event.is_set():
            raise EngineError("aborted", "The request was ended before it was done.")


class Denoiser:
    """Runs one job at a time; the caller sees to that."""

    def __init__(self, loaded: "Loaded", embeddings: Embeddings) -> None:
        self._loaded, self._embeddings = loaded, embeddings

    def run(self, plan: Plan, stop: Stop, on_step: OnStep) -> torch.Tensor:
        """The latents of the video, 1 x channels x latent frames x height / 8 x width / 8, ready for the decoder.

        Ends within one block of a transformer, an encoder's chunk of four frames or a layer of the text encoder once
        ``stop`` is set. Raises EngineError for that, MediaError for a picture that cannot be decoded, EngineError for
        inputs that these weights do not take, torch's own errors, and what ``on_step`` raises; all of them leave
        nothing behind.
        """
        stop.check()
        generator = torch.Generator().manual_seed(plan.seed)  # of the CPU: the same noise on every card
        call = _copy(self._loaded, schedule(self._loaded.pipe.scheduler.config, plan, generator))
        _check(call, self._loaded.kind, plan)
        try:
            with _watched(self._loaded, stop):
                return self._run(call, plan, generator, stop, on_step)
        except BaseException as error:
            _forget(self._loaded, call)
            # The tensors in the frames that the error came through would live as long as it does, on the card.
            traceback.clear_frames(error.__traceback__)
            raise

    def _run(
        self, call: Any, plan: Plan, generator: torch.Generator, stop: Stop, on_step: OnStep
    ) -> torch.Tensor:
        two_experts = call.config.boundary_ratio is not None
        guided = plan.guidance != 1 or (two_experts and plan.guidance_2 != 1)
        prompt, negative = self._embeddings.get(
            self._loaded, plan.prompt, plan.negative_prompt if guided else None
        )
        references = len(plan.reference_images)

        def step_ended(_pipe: Any, index: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            stop.check()
            on_step(index + 1, plan.steps, call.scheduler.clean[:, :, references:])
            stop.check()
            return {}

        made = call(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            height=plan.padded_height,
            width=plan.padded_width,
            num_frames=plan.generated_frames,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            guidance_scale_2=plan.guidance_2 if two_experts else None,
            generator=generator,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=step_ended,
            max_sequence_length=TOKENS,
            **_given(self._loaded.kind, plan),
        )
        # A reference picture is a latent frame of its own, in front; the pipeline cuts it off when it decodes.
        latents: torch.Tensor = made[0][:, :, references:]
        return latents


# -- what is ours in the pipeline -----------------------------------------------------------------------------
class _Own:
    """Mixed in before a pipeline of diffusers: guidance that means what it says."""

    config: Any
    scheduler: Any
    card: torch.device
    _guidance_scale: float
    _guidance_scale_2: float | None
    _current_timestep: torch.Tensor | None

    @property
    def do_classifier_free_guidance(self) -> bool:
        """The stock pipelines say yes above 1 and so make 1 of everything below it. Exactly 1 is the prediction for
        the prompt alone, for which nothing else need be computed; of two experts this goes for each by itself.
        """
        time, scales = self._current_timestep, (self._guidance_scale, self._guidance_scale_2)
        if scales[1] is None:
            return scales[0] != 1
        if time is None:  # before the loop: for either
            return scales != (1, 1)
        boundary = self.config.boundary_ratio * self.scheduler.config.num_train_timesteps
        return bool(scales[0 if time >= boundary else 1] != 1)

    @property
    def _execution_device(self) -> torch.device:
        """The stock one asks the parts where they are, of which some wait in main memory."""
        return self.card


class _OwnVace(_Own):
    def prepare_masks(self, mask: torch.Tensor, reference_images: Any = None, generator: Any = None) -> Any:
        """The stock one finds too little to copy where there are more references than latent frames."""
        stock: Any = super()
        made = stock.prepare_masks(mask, [[] for _ in range(mask.shape[0])], generator)
        references = len(reference_images[0]) if reference_images else 0
        before = made.new_zeros(*made.shape[:2], references, *made.shape[3:])
        return torch.cat([before, made], dim=2)


@functools.cache
def _own(stock: Any) -> type:
    """``stock`` is the class of a pipeline."""
    return type(stock.__name__, (_OwnVace if hasattr(stock, "prepare_masks") else _Own, stock), {})


def _copy(loaded: "Loaded", scheduler: Any) -> Any:
    """The pipeline for one job."""
    stock: Any = type(loaded.pipe)
    made: Any = object.__new__(_own(stock))
    made.__dict__.update(loaded.pipe.__dict__)
    made.card = loaded.device
    made.scheduler = scheduler
    made.set_progress_bar_config(disable=True)
    return made


def _forget(loaded: "Loaded", call: Any) -> None:
    """What the models remember of an unfinished run."""
    call.maybe_free_model_hooks()
    call.vae.clear_cache()
    memory.mend(loaded)


# -- the inputs -----------------------------------------------------------------------------------------------
def _check(call: Any, kind: str, plan: Plan) -> None:
    """Refuse what the pipeline would round, ignore or fail at without saying so."""
    expert = call.transformer if call.transformer is not None else call.transformer_2
    grid = call.vae_scale_factor_spatial * expert.config.patch_size[-1]
    if plan.padded_width % grid or plan.padded_height % grid:
        size = f"{plan.padded_width}x{plan.padded_height}"
        raise _unusable("size", f"These weights generate multiples of {grid} pixels, not {size}.")
    if (plan.generated_frames - 1) % call.vae_scale_factor_temporal:
        text = f"{call.vae_scale_factor_temporal}n+1 frames, not {plan.generated_frames}"
        raise _unusable("frames", f"These weights generate {text}.")
    given = {
        "start_image": plan.start_image is not None,
        "end_image": plan.end_image is not None,
        "reference_image": bool(plan.reference_images),
        "source_video": plan.source_video is not None,
    }
    taken = {"text": (), "image": ("start_image", "end_image"), "vace": tuple(given)}[kind]
    for role in (role for role, is_given in given.items() if is_given and role not in taken):
        raise _unusable(role, f"These weights take no {role.replace('_', ' ')}.")
    if kind == "image" and not given["start_image"]:
        raise _unusable("start_image", "These weights need a start image.")
    if given["end_image"] and plan.generated_frames == 1:
        raise _unusable("end_image", "One frame has no other end.")
    if kind == "image":
        _check_ends(call, expert.config, end=given["end_image"])


def _check_ends(call: Any, config: Any, *, end: bool) -> None:
    """Wan 2.1 sees its pictures through CLIP too, and its weights are for one of them or for two, not for either.
    Wan 2.2 5B ("expand_timesteps") begins with a picture and knows of no other.
    """
    two = config.image_dim is not None and config.pos_embed_seq_len is not None
    if end and (call.config.expand_timesteps or (config.image_dim is not None and not two)):
        raise _unusable("end_image", "These weights take no end image.")
    if two and not end:
        raise _unusable("end_image", "These weights need an end image.")


def _unusable(what: str, message: str) -> EngineError:
    return EngineError(f"{what}_unusable", message)


def _given(kind: str, plan: Plan) -> dict[str, Any]:
    """The arguments that only some of the pipelines have."""
    if kind == "image":
        assert plan.start_image is not None
        end = None if plan.end_image is None else pictures.fitted(plan.end_image, plan)
        return {"image": pictures.fitted(plan.start_image, plan), "last_image": end}
    if kind == "vace":
        references = [pictures.reference(path) for path in plan.reference_images]
        return {"reference_images": references or None, **pictures.conditions(plan)}
    return {}


# -- ending in the middle -------------------------------------------------------------------------------------
@contextmanager
def _watched(loaded: "Loaded", stop: Stop) -> Iterator[None]:
    """Within, ``stop`` ends the work of this thread before every block of the experts and the encoders."""
    look = _Look(stop, loaded.device)
    with ExitStack() as watching:
        for module in _parts(loaded):
            watching.enter_context(_before(module, look))
        yield


class _Look:
    def __init__(self, stop: Stop, device: torch.device) -> None:
        self._stop, self._device = stop, device
        self._thread = threading.get_ident()
        self._asked: deque[Any] = deque()

    def __call__(self, *_: Any) -> None:
        if threading.get_ident() != self._thread:  # another job's, which reads its prompt or decodes
            return
        self._stop.check()
        if self._device.type == "cuda":
            self._asked.append(torch.cuda.Event(blocking=True))
            self._asked[-1].record()
            if len(self._asked) > RUN_AHEAD:
                self._asked.popleft().synchronize()


def _parts(loaded: "Loaded") -> Iterator[Any]:
    for expert in loaded.experts:
        if _is_compiled(expert):  # as a whole: its blocks are no longer called one by one
            yield expert
        else:
            for name in _BLOCKS:
                yield from getattr(expert, name, ())
    yield from loaded.pipe.text_encoder.encoder.block
    yield loaded.pipe.vae.encoder


def _is_compiled(module: Any) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _before(module: Any, look: _Look) -> Iterator[None]:
    """Call ``look`` whenever ``module`` is about to be called, on the outside of what was compiled: a hook of torch's
    would become part of the compiled code, which would be compiled anew for each job.
    """
    if not _is_compiled(module):
        handle = module.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()
        return
    compiled = module._compiled_call_impl  # noqa: SLF001

    def looked(*args: Any, **kwargs: Any) -> Any:
        look()
        return compiled(*args, **kwargs)

    module._compiled_call_impl = looked  # noqa: SLF001
    try:
        yield
    finally:
        module._compiled_call_impl = compiled  # noqa: SLF001
