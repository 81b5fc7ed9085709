"""A pipeline from its files, with its LoRAs fused and each part where memory allows. Imports torch.

``exact`` means what the model card does: transformers and text encoder in bfloat16 on a card, VAE and image encoder
in float32. On a processor all is as it is stored.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import diffusers
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from rushes import log
from rushes.catalog.wan import WanLora, WanModel
from rushes.engines.wan import main_memory, memory, parts
from rushes.engines.wan.memory import Need, Placement, Rung
from rushes.engines.wan.parts import Kind, unusable
from rushes.errors import EngineError

if TYPE_CHECKING:
    from rushes.engines.wan.weights import Local

_ADAPTER: Final = "rushes"
_STEPS: Final = (8, 4)
"""Pixels and frames that one number of the VAE's latents stands for, in space and in time."""
_TOLD: Final = {
    "text_encoder": "the text encoder",
    "image_encoder": "the image encoder",
    "vae": "the VAE",
    "transformer": "the transformer",
    "transformer_2": "the second transformer",
}


@dataclass
class Loaded:
    """A model that is ready to generate. One thread denoises with it at a time; another may decode meanwhile."""

    pipe: Any
    device: torch.device
    dtype: torch.dtype
    """Of the transformers."""
    experts: tuple[Any, ...]
    """The transformers: high-noise expert first, low-noise expert second where there are two."""
    kind: Kind
    decoder: Any
    """The VAE once more, with the same weights and its own state: encoding for one job and decoding for another
    must not meet.
    """
    placement: Placement = Placement.RESIDENT
    rung: Rung = Rung.PLAIN

    @cached_property
    def decoding(self) -> torch.cuda.Stream:
        """The card's line of work for decoding, before that of the denoising. One for all jobs: memory that was used
        in one line is not given to the work of another.
        """
        return torch.cuda.Stream(self.device, priority=-1)

    @contextmanager
    def text_on_card(self) -> Iterator[None]:
        """The text encoder can be used on :attr:`device` in this block."""
        with memory.text_on_card(self):
            yield


def load(
    local: "Local",
    wan: WanModel,
    *,
    turbo: bool,
    device: str,
    tell: Callable[[str], None],
    free: int | None = None,
) -> Loaded:
    """Load the pipeline in ``local.folder`` for ``device`` (``cuda``, ``cuda:1``, ``cpu``). Takes minutes for a
    large one; ``tell`` hears what is being loaded.

    ``free`` is how many bytes the weights and the work may take there; None leaves it to what is free on the card.
    Where that proves too little, the next placement is tried. Raises EngineError ``weights_unusable``, which names
    the file, and ``out_of_memory``, for what is to wait in main memory and does not fit there before it is read.
    """
    _quieten()
    place = torch.device(device)
    log.event("loading weights", folder=str(local.folder), device=device, turbo=turbo)
    tell("checking the weights")
    kind, found = parts.check(local.folder)
    card = place.type == "cuda"
    dtype = torch.bfloat16 if card else parts.stored_dtype(local.folder / parts.TRANSFORMERS[0])
    text_dtype = torch.bfloat16 if card else parts.stored_dtype(local.folder / "text_encoder")
    dtypes = {"text_encoder": text_dtype, **dict.fromkeys(parts.TRANSFORMERS, dtype)}
    plan = {
        name: (class_, dtypes.get(name, torch.float32))
        for name, class_ in parts.classes(kind).items()
        if name in found
    }
    free = memory.free_on(place) if free is None else free
    need = _need(local.folder, plan)
    first = Placement.RESIDENT if free is None else memory.place(need, free)
    ladder = [step for step in Placement if step >= first] if free is not None else [first]
    loras = [*local.loras, *(local.turbo_loras if turbo else ())]
    for placement in ladder:
        main_memory.check(memory.waiting(need, placement))
        try:
            return _load(local.folder, kind, plan, place, placement, loras, tell)
        except Exception as error:
            if isinstance(error, EngineError) or not memory.is_out_of_memory(error):
                raise
            log.event("out of memory while loading", weights=wan.weights, placement=placement.name.lower())
        memory.release()  # not before the exception is gone, whose frames hold what was loaded
    raise EngineError(
        "out_of_memory",
        "This model does not fit into the memory of the card that the server has for it.",
        replace=True,
    )


def load_experts(local: "Local", *, turbo: bool, device: str) -> Loaded:
    """The transformers alone, for a card that has a share of the denoising and nothing else: the other parts of the
    pipeline are None, and nothing ever leaves the card.

    Raises EngineError ``weights_unusable`` and torch's errors for lack of memory.
    """
    _quieten()
    place = torch.device(device)
    kind, found = parts.check(local.folder)
    dtype = torch.bfloat16 if place.type == "cuda" else parts.stored_dtype(local.folder / parts.TRANSFORMERS[0])
    modules: dict[str, Any] = dict.fromkeys(found)
    for name in ("tokenizer", "scheduler"):  # small files, which every pipeline asks for
        del modules[name]
    for name in parts.TRANSFORMERS:
        if name in found:
            modules[name] = parts.load(local.folder, name, parts.classes(kind)[name], dtype, place)
    with parts.reading("the pipeline's small files"):
        pipe = _pipeline(kind).from_pretrained(local.folder, local_files_only=True, **modules)
    for file, lora in [*local.loras, *(local.turbo_loras if turbo else ())]:
        _fuse(pipe, file, lora)
    experts = tuple(modules[name] for name in parts.TRANSFORMERS if modules.get(name) is not None)
    log.event("experts loaded", kind=kind, device=device, experts=len(experts))
    return Loaded(pipe, place, dtype, experts, kind, decoder=None)


def _pipeline(kind: Kind) -> Any:
    """The class of diffusers."""
    return getattr(diffusers, next(name for name, known in parts.PIPELINES.items() if known == kind))


def _need(folder: Path, plan: dict[str, tuple[str, torch.dtype]]) -> Need:
    sizes = {name: parts.size_of(folder / name, dtype) for name, (_, dtype) in plan.items()}
    transformers_ = sum(sizes.pop(name, 0) for name in parts.TRANSFORMERS)
    return Need(transformers_, sizes.pop("text_encoder"), sum(sizes.values()))


def _load(
    folder: Path,
    kind: Kind,
    plan: dict[str, tuple[str, torch.dtype]],
    device: torch.device,
    placement: Placement,
    loras: list[tuple[Path, WanLora]],
    tell: Callable[[str], None],
) -> Loaded:
    waiting = {"text_encoder"} if placement >= Placement.TEXT_WAITS else set()
    if placement >= Placement.OFFLOAD:
        waiting |= set(parts.TRANSFORMERS)
    modules = {}
    for name, (class_, dtype) in plan.items():
        tell(f"loading {_TOLD[name]}")
        where = torch.device("cpu") if name in waiting else device
        modules[name] = parts.load(folder, name, class_, dtype, where)
    tell("putting the pipeline together")
    pipe = _assemble(folder, kind, modules)
    for file, lora in loras:
        tell(f"fusing {file.name}")
        _fuse(pipe, file, lora)
    experts = tuple(modules[name] for name in parts.TRANSFORMERS if name in modules)
    decoder = copy.copy(pipe.vae)
    decoder.clear_cache()  # lists of its own
    loaded = Loaded(pipe, device, experts[0].dtype, experts, kind, decoder)
    memory.settle(loaded, placement)
    log.event("model loaded", kind=kind, placement=placement.name.lower(), loras=len(loras))
    return loaded


def _assemble(folder: Path, kind: Kind, modules: dict[str, Any]) -> Any:
    with parts.reading("the pipeline's small files"):
        pipe = _pipeline(kind).from_pretrained(folder, local_files_only=True, **modules)
        parts.restore_byte_fallback(pipe.tokenizer)
    if (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) != _STEPS:
        raise unusable("vae/config.json", "is of another family of Wan models, which this engine does not know")
    config = modules["transformer"].config
    if kind == "image" and config.image_dim is not None and "image_encoder" not in modules:
        raise unusable("model_index.json", "names no image_encoder, and the transformer asks for one")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _fuse(pipe: Any, file: Path, lora: WanLora) -> None:
    """Add a LoRA to the weights for good, by the pipeline's own code: the high-noise expert is ``transformer``."""
    there = [name for name in parts.TRANSFORMERS if getattr(pipe, name, None) is not None]
    wanted = {"both": there, "high": there[:1], "low": there[1:]}[lora.experts]
    where = f"the LoRA {file.name}"
    if not wanted:
        raise unusable(where, "is for the low-noise expert, and this model has but one transformer")
    with parts.reading(where):
        with safe_open(file, "pt") as opened:
            pairs = sum(".lora_A." in name or ".lora_down." in name for name in sorted(opened.keys()))
        for name in wanted:
            pipe.load_lora_weights(
                file.parent,
                weight_name=file.name,
                adapter_name=_ADAPTER,
                use_safetensors=True,
                local_files_only=True,
                load_into_transformer_2=name == parts.TRANSFORMERS[1],
            )
            modules = getattr(pipe, name).modules()
            fitting = sum(
                isinstance(one, BaseTunerLayer) and _ADAPTER in one.active_adapters for one in modules
            )
            if not fitting:
                raise unusable(where, "fits none of the model's layers")
            if fitting < pairs:
                log.event("LoRA fits in part", lora=file.name, expert=name, layers=fitting, of=pairs)
            pipe.fuse_lora(components=[name], lora_scale=lora.scale, adapter_names=[_ADAPTER])
            pipe.unload_lora_weights()


def _quieten() -> None:
    """Progress is told by us, and what the libraries say goes the way of all records."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.disable_default_handler()
        logging.enable_propagation()
