"""Where the parts of a model lie, and the ladder that is climbed where the card's memory runs out.

A part is on the card, waits in main memory until it is used, or is brought to the card block by block while it
works. None of these changes a number; only tiles of the VAE do, where they overlap. Imports torch.
"""

import errno
import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

from rushes import log
from rushes.engines.wan import main_memory

if TYPE_CHECKING:
    from rushes.engines.wan.load import Loaded

WORKSPACE: Final = 20 * 2**30
"""Bytes that are to stay free besides the weights. By the sizes of the tensors, and so without what cuDNN takes to
work in, 81 frames of 720p need up to 16.7 GiB to be decoded, 12.2 to be encoded, and 8.0 for a pass of a 14B model
that is not compiled; 480p needs 7.2, 5.3 and 3.5. What needs more, such as decoding one video at 720p while another
one is denoised, climbs the ladder: its first step is to have the card alone.
"""
_MAIN_SPARE: Final = 4 * 2**30
"""Bytes of main memory that nothing is locked into for the sake of speed alone."""
_SIGNS: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
"""What the messages of torch's RuntimeErrors hold where it has no class of its own for it. cuBLAS cannot begin, and
cuDNN finds no way to do a convolution, where there is no memory left for them to work in."""


class Placement(IntEnum):
    """Where the parts lie; each step needs less of the card."""

    RESIDENT = 0
    """All on the card."""
    TEXT_WAITS = 1
    """The text encoder comes only to read a prompt."""
    OFFLOAD = 2
    """Transformers and text encoder come block by block."""


class Rung(IntEnum):
    """How far the ladder was climbed."""

    PLAIN = 0
    SAVING = 1
    """The VAE works in tiles and the text encoder waits; whoever runs jobs overlaps nothing."""
    OFFLOAD = 2
    """The transformers come block by block too."""


class Need(msgspec.Struct, frozen=True):
    """Bytes of a model's weights as they will lie in memory."""

    transformers: int
    text_encoder: int
    rest: int
    """VAE and image encoder, which are on the card always."""


def place(need: Need, free: int) -> Placement:
    """The first placement with :data:`WORKSPACE` to spare in ``free`` bytes; the last one where none has."""
    spare = free - WORKSPACE - need.rest - need.transformers
    if spare >= need.text_encoder:
        return Placement.RESIDENT
    return Placement.TEXT_WAITS if spare >= 0 else Placement.OFFLOAD


def waiting(need: Need, placement: Placement) -> int:
    """Bytes that lie in main memory with ``placement``."""
    text = need.text_encoder if placement >= Placement.TEXT_WAITS else 0
    return text + (need.transformers if placement >= Placement.OFFLOAD else 0)


def settle(loaded: "Loaded", placement: Placement) -> None:
    """Bring the parts to where ``placement`` says; never back up. Raises torch's errors for lack of memory, and
    EngineError ``out_of_memory`` where main memory cannot take what leaves the card.
    """
    if placement <= loaded.placement:
        return
    text = loaded.pipe.text_encoder
    if placement is Placement.OFFLOAD:
        _offload(loaded)
    else:
        if text.device.type != "cpu":
            main_memory.check(bytes_of(text))
            text.to("cpu")
        if loaded.device.type == "cuda":
            _lock(text)
    loaded.placement = placement
    release()


def climb(loaded: "Loaded", rung: Rung) -> None:
    """Take this rung and those below it; a rung that was taken stays taken as long as the model is loaded.

    Nothing of the model may be at work meanwhile. Raises as :func:`settle` does.
    """
    if rung >= Rung.SAVING:
        for vae in (loaded.pipe.vae, loaded.decoder):
            vae.enable_tiling()
        settle(loaded, Placement.TEXT_WAITS)
    if rung >= Rung.OFFLOAD:
        settle(loaded, Placement.OFFLOAD)
    if rung > loaded.rung:
        log.event("memory ladder climbed", rung=rung.name.lower())
        loaded.rung = rung


@contextmanager
def text_on_card(loaded: "Loaded") -> Iterator[None]:
    """The text encoder is on the device in this block, or comes there by itself."""
    if loaded.placement is not Placement.TEXT_WAITS:
        yield
        return
    encoder = loaded.pipe.text_encoder
    # Weights do not change, so what waits in main memory is kept there rather than copied back.
    kept = [
        (module, name, parameter, parameter.data)
        for module in encoder.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    try:
        encoder.to(loaded.device)
        yield
    finally:
        for module, name, parameter, data in kept:
            parameter.data = data
            setattr(module, name, parameter)  # some moves make a new parameter
        encoder.to("cpu")  # the buffers
        # Giving memory back stops the card for all who work on it: only where another one could need it.
        free = free_on(loaded.device)
        if free is not None and free < WORKSPACE:
            torch.cuda.empty_cache()


def mend(loaded: "Loaded") -> None:
    """Make good what an exception in the middle of a model's work left half done: blocks that came and were not
    taken away, and the order of their coming, which is learnt in the first whole pass. To be called after any.
    """
    if loaded.placement is not Placement.OFFLOAD:
        return
    if loaded.device.type == "cuda":
        # The next block may still be on its way, into memory that is given back now.
        torch.cuda.synchronize(loaded.device)
    for part in (*loaded.experts, loaded.pipe.text_encoder):
        _maybe_remove_and_reapply_group_offloading(part)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, says that memory ran out: the card's or the machine's."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return True
        if isinstance(one, RuntimeError) and any(sign in str(one) for sign in _SIGNS):
            return True
        one = one.__cause__
    return False


def release() -> None:
    """Give back what nothing refers to any more; what a caught exception's frames hold is still referred to."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_on(device: torch.device) -> int | None:
    """Free bytes on a card; None for the processor, whose memory no placement spares."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def bytes_of(module: Any) -> int:
    """What the weights of a module take, wherever they are."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def locked_bytes_of(module: Any) -> int:
    """What the weights of a module take in pages that are locked in main memory: torch's allocator of these gives
    each tensor the next power of two (``ATen/core/CachingHostAllocator.h``), for Wan's half as much again.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    sizes = (tensor.numel() * tensor.element_size() for tensor in tensors)
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def bytes_to_stream(experts: tuple[Any, ...]) -> int:
    """What has to be free in main memory for the blocks of these to leave the card and come back from locked pages.
    Those of an expert are all made before the pages in which it lay, where it was in main memory, are given back.
    """
    taken = most = 0
    for expert in experts:
        taken += locked_bytes_of(expert)
        most = max(most, taken)
        taken -= bytes_of(expert) if expert.device.type == "cpu" else 0
    return most


def _lock(module: Any) -> None:
    """Lock weights that wait in main memory there, where it has the room: a card fetches such pages
    faster. Where it does not, they wait as they are.
    """
    available = main_memory.available()
    if available is not None and available < locked_bytes_of(module) + _MAIN_SPARE:
        return
    try:
        for parameter in module.parameters():
            parameter.data = parameter.data.pin_memory()
    except RuntimeError as error:  # what is locked by then stays so
        log.event("weights not locked in memory", error=str(error))


def _offload(loaded: "Loaded") -> None:
    text = loaded.pipe.text_encoder
    leaving = [part for part in (*loaded.experts, text) if part.device.type != "cpu"]
    available = main_memory.check(sum(bytes_of(part) for part in leaving))
    # With a stream the next block comes while one works, from pages that are locked in memory.
    needed = bytes_to_stream(loaded.experts) + (bytes_of(text) if text in leaving else 0) + _MAIN_SPARE
    stream = loaded.device.type == "cuda" and (available is None or available >= needed)
    for expert in loaded.experts:
        expert.enable_group_offload(
            onload_device=loaded.device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=stream,
            record_stream=stream,
        )
    apply_group_offloading(text, onload_device=loaded.device, offload_type="leaf_level")
    log.event("weights leave the card between uses", streamed=stream, available=available, to_stream=needed)
