"""From latents to frames, one latent frame at a time: the encoder works on the first ones while the next ones are
decoded, and no more than a few whole frames are on the card at once.

The arithmetic is ``AutoencoderKLWan.decode``'s own, in its own order, so the frames are those of the stock pipeline
bit for bit, in tiles too. What differs is who keeps the decoder's state: here each job has its own, and the module
none, so that two jobs, or a job that was ended, never meet. Where the stock code lets the whole video grow on
the card, whole frames leave it as they come, and tiles leave it for main memory to be joined there.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

from rushes.engines.wan.denoise import Stop
from rushes.engines.wan.load import Loaded
from rushes.engines.wan.plan import Plan
from rushes.media.encode import Frame


def frames(loaded: Loaded, latents: torch.Tensor, plan: Plan, stop: Stop) -> Generator[Frame, None, None]:
    """The ``plan.frames`` pictures in ``latents`` (1 x channels x latent frames x height x width, normalised as the
    transformer has them), cut to the size asked for. Tiled where the decoder is set to be. Each frame is the taker's.

    Raises what ``stop`` raises, between two latent frames, and torch's own errors for lack of memory. Close it, as
    with :func:`contextlib.closing`, where not every frame is taken.
    """
    decoder = loaded.decoder
    with _beside(loaded, latents) as card:
        with torch.no_grad(), card():
            scaled = _scaled(decoder, latents.to(loaded.device))
        if decoder.use_tiling and _larger_than_a_tile(decoder, scaled):
            yield from _in_tiles(decoder, scaled, plan, stop, card)
        else:
            yield from _whole(decoder, scaled, plan, stop, card)


Card = Callable[[], AbstractContextManager[Any]]
"""Where work is put in line: entered around the work only, never across a yield, since it is the thread's."""


@contextmanager
def _beside(loaded: Loaded, latents: torch.Tensor) -> Iterator[Card]:
    """A line of work of our own, before that of the denoising, which runs at the same time: who waits longest is the
    request that is nearly ready.
    """
    if not latents.is_cuda:
        yield nullcontext
        return
    stream = loaded.decoding
    stream.wait_stream(torch.cuda.current_stream(latents.device))
    latents.record_stream(stream)
    try:
        yield lambda: torch.cuda.stream(stream)
    finally:
        stream.synchronize()  # of an ended job too: whoever moves the weights next must not meet it


def _scaled(decoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """As the pipelines do it: the division by the inverse gives other last bits than a multiplication would."""
    latents = latents.to(decoder.dtype)
    config = decoder.config

    def channels(values: list[float]) -> torch.Tensor:
        return torch.tensor(values).view(1, config.z_dim, 1, 1, 1)

    mean = channels(config.latents_mean).to(latents.device, latents.dtype)
    inverse = 1.0 / channels(config.latents_std).to(latents.device, latents.dtype)
    return latents / inverse + mean


class _Decoder:
    """The decoder with the state of one video, or of one tile of it."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder.decoder
        convolutions = sum(isinstance(module, WanCausalConv3d) for module in self._decoder.modules())
        self._kept: list[Any] = [None] * convolutions
        self._began = False

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        """The frames of the next latent frame, not yet clamped."""
        first, self._began = not self._began, True
        made: torch.Tensor = self._decoder(latent, feat_cache=self._kept, feat_idx=[0], first_chunk=first)
        return made


# -- whole frames ------------------------------------------------------------------------------------------------
def _whole(decoder: Any, latents: torch.Tensor, plan: Plan, stop: Stop, card: Card) -> Iterator[Frame]:
    one = _Decoder(decoder)
    with torch.no_grad(), card():
        latents = decoder.post_quant_conv(latents)
    left = plan.frames
    ready: _Leaving | None = None
    for number in range(latents.shape[2]):
        stop.check()
        if left <= 0:
            break
        with torch.no_grad(), card():
            made = one(latents[:, :, number : number + 1])
            if decoder.config.patch_size is not None:
                made = unpatchify(made, patch_size=decoder.config.patch_size)
            leaving = _Leaving(_shown(_cut(made, plan)[:, :left]))
        left -= len(leaving)
        # The card works on what was asked of it just now while the frames before go to the encoder.
        if ready is not None:
            yield from ready.frames()
        ready = leaving
    if ready is not None:
        yield from ready.frames()


def _cut(made: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Colours x frames x height x width of what was asked for."""
    return made[0, :, :, plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]


def _shown(cut: torch.Tensor) -> torch.Tensor:
    """Frames x height x width x RGB, 8 bits, where they are: as the stock pipeline's postprocessing rounds them."""
    unit = (torch.clamp(cut, min=-1.0, max=1.0) * 0.5 + 0.5).clamp(0, 1).float()
    return (unit * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


class _Leaving:
    """Frames on their way from the card to main memory."""

    def __init__(self, pixels: torch.Tensor) -> None:
        if pixels.is_cuda:
            self._here = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            self._here.copy_(pixels, non_blocking=True)
            self._there: torch.cuda.Event | None = torch.cuda.Event()
            self._there.record()
        else:
            self._here, self._there = pixels, None

    def __len__(self) -> int:
        return len(self._here)

    def frames(self) -> Iterator[Frame]:
        if self._there is not None:
            self._there.synchronize()
        yield from self._here.numpy()


# -- tiles -------------------------------------------------------------------------------------------------------
class _Tiles:
    """Sizes of the tiles: of latents, and of what the decoder makes of them (before its patches are laid out)."""

    def __init__(self, decoder: Any) -> None:
        ratio, patch = decoder.spatial_compression_ratio, decoder.config.patch_size or 1
        self.high, self.wide = decoder.tile_sample_min_height // ratio, decoder.tile_sample_min_width // ratio
        self.down = decoder.tile_sample_stride_height // ratio
        self.across = decoder.tile_sample_stride_width // ratio
        self.made_down = decoder.tile_sample_stride_height // patch
        self.made_across = decoder.tile_sample_stride_width // patch
        self.blend_down = decoder.tile_sample_min_height // patch - self.made_down
        self.blend_across = decoder.tile_sample_min_width // patch - self.made_across
        self.scale = ratio // patch


def _larger_than_a_tile(decoder: Any, latents: torch.Tensor) -> bool:
    tiles = _Tiles(decoder)
    return bool(latents.shape[4] > tiles.wide or latents.shape[3] > tiles.high)


def _in_tiles(decoder: Any, latents: torch.Tensor, plan: Plan, stop: Stop, card: Card) -> Iterator[Frame]:
    """The whole video in main memory, 8 bits, before the first frame leaves: a tile is decoded to its last frame
    before the next one begins, since the state of all of them at once would take more of the card than it saves.
    """
    tiles = _Tiles(decoder)
    video = np.empty((plan.frames, plan.height, plan.width, 3), np.uint8)
    above: list[torch.Tensor] = []
    for place, top in enumerate(range(0, latents.shape[3], tiles.down)):
        row: list[torch.Tensor] = []
        strip: list[torch.Tensor] = []
        for column, left in enumerate(range(0, latents.shape[4], tiles.across)):
            part = latents[:, :, :, top : top + tiles.high, left : left + tiles.wide]
            tile = _tile(decoder, part, stop, card)
            with torch.no_grad():
                if above:
                    tile = decoder.blend_v(above[column], tile, tiles.blend_down)
                if row:
                    tile = decoder.blend_h(row[-1], tile, tiles.blend_across)
            row.append(tile)
            strip.append(tile[:, :, :, : tiles.made_down, : tiles.made_across])
        above = row
        whole = torch.cat(strip, dim=-1)[..., : latents.shape[4] * tiles.scale]
        _lay(decoder, whole, place * tiles.made_down, plan, video)
    yield from video


def _tile(decoder: Any, latents: torch.Tensor, stop: Stop, card: Card) -> torch.Tensor:
    """All frames of one tile, in main memory."""
    one = _Decoder(decoder)
    made = []
    for number in range(latents.shape[2]):
        stop.check()
        with torch.no_grad(), card():
            made.append(one(decoder.post_quant_conv(latents[:, :, number : number + 1])).cpu())
    return torch.cat(made, dim=2)


def _lay(decoder: Any, strip: torch.Tensor, above: int, plan: Plan, video: Frame) -> None:
    """Put a strip of all frames, ``above`` of whose rows lie over it, into the video."""
    patch = decoder.config.patch_size
    if patch is not None:
        strip, above = unpatchify(strip, patch_size=patch), above * patch
    first = max(above, plan.top)
    last = min(above + strip.shape[3], plan.top + plan.height)
    if first >= last:
        return
    there = slice(first - plan.top, last - plan.top)
    inner = strip[0, :, :, first - above : last - above, plan.left : plan.left + plan.width]
    for number in range(plan.frames):
        video[number, there] = _shown(inner[:, number : number + 1])[0].numpy()
