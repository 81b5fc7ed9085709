"""The streamed decoding against the stock VAE's own, on tiny random weights."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import msgspec
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from rushes.engines.wan.decode import frames
from rushes.engines.wan.denoise import Stop
from rushes.engines.wan.plan import Plan, round_up, whole_latents
from rushes.errors import EngineError
from support.wan_running import SMALL

SIZES = [(54, 96, 6), (113, 49, 5), (64, 64, 1)]


@dataclass
class Holder:
    """What of a loaded model the decoding uses."""

    decoder: Any
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def autoencoder(*, residual: bool = False) -> Any:
    """Of Wan 2.1 and the A14B models, or of Wan 2.2 5B, with four-fold patches; random, and always the same."""
    layout: dict[str, Any] = {
        "base_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if not residual:
            return AutoencoderKLWan(z_dim=16, **layout).eval()
        return AutoencoderKLWan(
            z_dim=8,
            latents_mean=[0.1] * 8,
            latents_std=[1.5] * 8,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            **layout,
        ).eval()


def planned(width: int, height: int, number: int, grid: int = 16) -> Plan:
    padded_width, padded_height = (
        round_up(side) if grid == 16 else -(-side // grid) * grid for side in (width, height)
    )
    return msgspec.structs.replace(
        SMALL,
        width=width,
        height=height,
        padded_width=padded_width,
        padded_height=padded_height,
        left=(padded_width - width) // 2,
        top=(padded_height - height) // 2,
        frames=number,
        generated_frames=whole_latents(number),
    )


def drawn(vae: Any, plan: Plan) -> torch.Tensor:
    ratio = vae.spatial_compression_ratio
    size = (1 + (plan.generated_frames - 1) // 4, plan.padded_height // ratio, plan.padded_width // ratio)
    return torch.randn(1, vae.config.z_dim, *size, generator=torch.Generator().manual_seed(5))


def stock(vae: Any, latents: torch.Tensor, plan: Plan) -> np.ndarray[Any, Any]:
    """The end of the pipelines' own ``__call__``, and what was asked for of it."""
    latents = latents.to(vae.dtype)
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1).to(latents.dtype)
    inverse = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1).to(latents.dtype)
    with torch.no_grad():
        video = vae.decode(latents / inverse + mean, return_dict=False)[0]
    pictures = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="pil")[0]
    whole = np.stack([np.asarray(picture) for picture in pictures])
    return whole[: plan.frames, plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]


def ours(vae: Any, latents: torch.Tensor, plan: Plan) -> np.ndarray[Any, Any]:
    return np.stack(list(frames(Holder(vae), latents, plan, Stop())))  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "height", "number"), SIZES)
def test_frames_are_those_of_the_stock_decoder_bit_for_bit(width: int, height: int, number: int) -> None:
    vae, plan = autoencoder(), planned(width, height, number)
    latents = drawn(vae, plan)

    made = ours(vae, latents, plan)

    assert (number, height, width, 3) == made.shape
    assert np.uint8 == made.dtype
    assert made.std() > 1  # there is something to compare
    assert np.array_equal(stock(vae, latents, plan), made)


@pytest.mark.parametrize(
    ("width", "height", "number", "stride"), [(54, 96, 6, 32), (113, 49, 2, 48), (64, 64, 1, 32)]
)
def test_tiles_are_those_of_the_stock_decoder_bit_for_bit(
    width: int, height: int, number: int, stride: int
) -> None:
    vae, plan = autoencoder(), planned(width, height, number)
    latents = drawn(vae, plan)
    whole = ours(vae, latents, plan)
    vae.enable_tiling(64, 64, stride, stride)

    made = ours(vae, latents, plan)

    assert np.array_equal(stock(vae, latents, plan), made)
    assert (max(width, height) <= 64) == np.array_equal(whole, made)  # a picture within one tile has no seams


@pytest.mark.parametrize("tiles", [False, True])
def test_the_other_vae_of_wan_lays_its_patches_out(tiles: bool) -> None:
    vae, plan = autoencoder(residual=True), planned(90, 70, 5, grid=32)
    latents = drawn(vae, plan)
    if tiles:
        vae.enable_tiling(64, 64, 32, 32)

    assert np.array_equal(stock(vae, latents, plan), ours(vae, latents, plan))


@pytest.mark.parametrize("tiles", [False, True])
def test_sixteen_bits_are_rounded_as_stock_rounds_them(tiles: bool) -> None:
    vae, plan = autoencoder().to(torch.bfloat16), planned(72, 40, 5)
    latents = drawn(vae, plan)
    if tiles:
        vae.enable_tiling(64, 64, 32, 32)

    assert np.array_equal(stock(vae, latents, plan), ours(vae, latents, plan))


def test_the_first_frames_come_before_the_last_ones_are_decoded() -> None:
    vae, plan = autoencoder(), planned(32, 48, 17)
    decoded: list[int] = []
    vae.decoder.register_forward_hook(lambda *_: decoded.append(len(decoded)))

    stream = frames(Holder(vae), drawn(vae, plan), plan, Stop())  # type: ignore[arg-type]
    next(stream)

    assert 2 == len(decoded)  # one ahead of what was given
    assert 16 == len(list(stream))
    assert 5 == len(decoded)


def test_latent_frames_that_nobody_asked_for_are_not_decoded() -> None:
    vae = autoencoder()
    plan = msgspec.structs.replace(planned(32, 32, 5), generated_frames=17)
    decoded: list[int] = []
    vae.decoder.register_forward_hook(lambda *_: decoded.append(1))

    made = ours(vae, drawn(vae, plan), plan)

    assert 5 == len(made)
    assert 2 == len(decoded)


def test_two_videos_decoded_in_turns_do_not_meet() -> None:
    vae, plan = autoencoder(), planned(32, 48, 9)
    first, second = drawn(vae, plan), drawn(vae, plan).flip(0, 3)
    alone = ours(vae, first, plan), ours(vae, second, plan)

    one = frames(Holder(vae), first, plan, Stop())  # type: ignore[arg-type]
    other = frames(Holder(vae), second, plan, Stop())  # type: ignore[arg-type]
    pairs = list(zip(one, other, strict=True))

    for number, made in enumerate(alone):
        assert np.array_equal(made, np.stack([pair[number] for pair in pairs]))


@pytest.mark.parametrize("tiles", [False, True])
def test_an_ended_job_stops_before_its_next_latent_frame_and_leaves_nothing(tiles: bool) -> None:
    vae, plan = autoencoder(), planned(80, 32, 9)
    latents = drawn(vae, plan)
    if tiles:
        vae.enable_tiling(64, 64, 32, 32)
    expected = ours(vae, latents, plan)
    stop, decoded = Stop(), []

    def second(*_: Any) -> None:
        decoded.append(1)
        if len(decoded) == 2:
            stop.set()

    handle = vae.decoder.register_forward_hook(second)
    with pytest.raises(EngineError) as ended:
        list(frames(Holder(vae), latents, plan, stop))  # type: ignore[arg-type]
    handle.remove()

    assert "aborted" == ended.value.reason
    assert 2 == len(decoded)
    assert np.array_equal(expected, ours(vae, latents, plan))


def test_gradients_stay_as_the_taker_has_them() -> None:
    vae, plan = autoencoder(), planned(32, 32, 5)
    latents = drawn(vae, plan)

    def taken() -> Iterator[bool]:
        for _ in frames(Holder(vae), latents, plan, Stop()):  # type: ignore[arg-type]
            yield torch.is_grad_enabled()

    assert {True} == set(taken())
