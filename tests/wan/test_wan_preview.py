"""The preview of latents: colours without the decoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import torch

from rushes.engines.wan.preview import LONGEST, Preview
from support.tiny_diffusers import Kind
from support.wan_running import fresh

Tiny = Callable[[Kind], Path]


def latents_of(loaded: Any, picture: np.ndarray[Any, Any]) -> torch.Tensor:
    """As the transformer has them, of a height x width x 3 picture from -1 to 1."""
    vae = loaded.pipe.vae
    with torch.no_grad():
        found = vae.encode(torch.from_numpy(picture).permute(2, 0, 1)[None, :, None]).latent_dist.mode()
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return torch.as_tensor((found - mean) / deviation)


@pytest.mark.parametrize("kind", ["text", "image", "vace"])
def test_it_shows_something_of_the_picture(kind: Kind, tiny: Tiny) -> None:
    """A VAE of random weights keeps little of the colours, but it keeps some of them."""
    loaded = fresh(tiny(kind))
    coarse = np.random.default_rng(5).uniform(-1, 1, (6, 6, 3)).astype(np.float32)
    picture = cv2.resize(coarse, (128, 128), interpolation=cv2.INTER_CUBIC).clip(-1, 1)

    made = Preview(loaded).image(latents_of(loaded, picture))

    assert made is not None
    assert np.uint8 == made.dtype
    assert (128, 128, 3) == made.shape
    shown, wanted = (
        cv2.resize(one.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA) for one in (made, picture)
    )
    assert np.corrcoef(shown.ravel(), wanted.ravel())[0, 1] > 0.3
    assert ((shown / 127.5 - 1 - wanted) ** 2).mean() < ((wanted - wanted.mean(axis=(0, 1))) ** 2).mean()


def test_the_weights_are_those_of_the_models_own_vae(tiny: Tiny) -> None:
    """Where one VAE has the channels of another in reverse, latents in reverse look the same."""
    loaded, other = fresh(tiny("text")), fresh(tiny("text"))
    vae = other.pipe.vae
    with torch.no_grad():
        for parameter in (vae.quant_conv.weight, vae.quant_conv.bias):
            parameter[:16] = parameter[:16].flip(0)
    for name in ("latents_mean", "latents_std"):
        vae.register_to_config(**{name: vae.config[name][::-1]})
    latents = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 0.3

    one, two = Preview(loaded).image(latents), Preview(other).image(latents.flip(1))

    assert one is not None
    assert two is not None
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
    assert one.std() > 1


@pytest.mark.parametrize(
    ("shape", "size"),
    [((6, 8), (48, 64, 3)), ((90, 160), (288, LONGEST, 3)), ((1, 1), (8, 8, 3)), ((600, 6), (LONGEST, 5, 3))],
)
def test_its_size(shape: tuple[int, int], size: tuple[int, int, int], tiny: Tiny) -> None:
    made = Preview(fresh(tiny("text"))).image(torch.randn(1, 16, 5, *shape))
    assert made is not None
    assert size == made.shape


def test_it_is_of_the_middle_frame(tiny: Tiny) -> None:
    preview = Preview(fresh(tiny("text")))
    latents = torch.randn(1, 16, 5, 6, 8)
    whole, middle = preview.image(latents), preview.image(latents[:, :, 2:3])
    assert whole is not None
    assert middle is not None
    assert np.array_equal(middle, whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_latents_out_of_all_bounds_are_a_picture_too(value: float, tiny: Tiny) -> None:
    made = Preview(fresh(tiny("text"))).image(torch.full((1, 16, 1, 6, 8), value, dtype=torch.bfloat16))
    assert made is not None
    assert (48, 64, 3) == made.shape


def test_a_vae_that_gives_no_numbers_gives_no_preview(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    with torch.no_grad():
        loaded.pipe.vae.quant_conv.weight.fill_(float("nan"))
    assert None is Preview(loaded).image(torch.zeros(1, 16, 1, 6, 8))
