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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

from rushes import log
from rushes.errors import EngineError

if TYPE_CHECKING:
    from rushes.engines.wan.load import Loaded

WORKSPACE: Final = 14 * 2**30
"""Bytes that are to stay free besides the weights: the activations of a 14B model at 81 frames of 720p (hidden
states of 75,600 tokens by 5120, several in 32 bits), and beside them the VAE's whole frames of another video. What
needs more climbs the ladder.
"""
_SIGNS: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What the messages of torch's RuntimeErrors hold where it has no class of its own for it."""


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


def settle(loaded: "Loaded", placement: Placement) -> None:
    """Bring the parts to where ``placement`` says; never back up. Raises torch's errors for lack of memory, and
    EngineError ``out_of_memory`` where main memory cannot take what leaves the card.
    """
    if placement <= loaded.placement:
        return
    if placement is Placement.OFFLOAD:
        _offload(loaded)
    elif loaded.pipe.text_encoder.device.type != "cpu":
        _check_main_memory(bytes_of(loaded.pipe.text_encoder))
        loaded.pipe.text_encoder.to("cpu")
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
        if loaded.device.type == "cuda":
            torch.cuda.empty_cache()


def mend(loaded: "Loaded") -> None:
    """Make good what an exception in the middle of a model's work left half done: blocks that came and were not
    taken away, and the order of their coming, which is learnt in the first whole pass. To be called after any.
    """
    if loaded.placement is not Placement.OFFLOAD:
        return
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


def _offload(loaded: "Loaded") -> None:
    text = loaded.pipe.text_encoder
    bytes_ = sum(bytes_of(part) for part in loaded.experts)
    leaving = [part for part in (*loaded.experts, text) if part.device.type != "cpu"]
    available = _check_main_memory(sum(bytes_of(part) for part in leaving))
    # With a stream the next block comes while one works, from pages that are locked in memory: a second copy of all.
    stream = loaded.device.type == "cuda" and (available is None or available > 1.2 * bytes_)
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
    log.event("weights leave the card between uses", streamed=stream)


def _check_main_memory(bytes_: int) -> int | None:
    """Bytes available in main memory, where the system tells; EngineError rather than a process killed for it."""
    available = _available()
    if available is not None and available < bytes_:
        text = (
            f"The weights need {bytes_ / 2**30:.0f} GiB of main memory besides the card's, and there are "
            f"{available / 2**30:.0f} GiB."
        )
        log.event("main memory is too small", needed=bytes_, available=available)
        raise EngineError("out_of_memory", text, replace=True)
    return available


def _available(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Linux's own estimate of what can be taken without swapping, in bytes; None elsewhere."""
    try:
        lines = meminfo.read_text("ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    value = fields.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value and value[0].isdecimal() else None
