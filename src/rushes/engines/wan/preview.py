"""A rough picture of latents without the decoder: each colour as a weighted sum of the channels.

The weights are fitted to the model's own VAE when it is loaded, by encoding one picture of many colours: no table of
numbers to keep for each VAE, and a fifth Wan model has its preview too. A preview costs a fraction of a millisecond,
where the decoder would take seconds.
"""

from typing import TYPE_CHECKING, Final

import cv2
import numpy as np
import numpy.typing as npt
import torch

from rushes import log

if TYPE_CHECKING:
    from rushes.engines.wan.load import Loaded

SIDE: Final = 256
"""Pixels of the picture that the weights are fitted to; a thousand latent pixels for 17 unknowns of each colour."""
LONGEST: Final = 512
"""Pixels of a preview's longer side, at most."""
_RIDGE: Final = 1e-3
"""Keeps the weights small where channels are nearly the same, against the noise of early steps."""


class Preview:
    def __init__(self, loaded: "Loaded") -> None:
        self._scale = int(loaded.pipe.vae_scale_factor_spatial)
        self._weights: torch.Tensor | None = None
        try:
            self._weights = _fitted(loaded)
        except Exception as error:  # a model without a preview is a model all the same
            log.event("wan_no_preview", error=f"{type(error).__name__}: {error}")

    def image(self, latents: torch.Tensor) -> npt.NDArray[np.uint8] | None:
        """The middle frame of ``latents`` (1 x channels x frames x height x width) as height x width x 3, RGB, at
        most :data:`LONGEST` pixels a side. None where there is none to show.
        """
        if self._weights is None:
            return None
        with torch.no_grad():
            channels = latents[0, :, latents.shape[2] // 2].float()
            colours = _with_one(channels.flatten(1).T) @ self._weights.to(channels.device)
            # Moved once, and in 8 bits.
            shown = ((colours + 1) * 127.5).nan_to_num(127.5).clamp(0, 255).round().to(torch.uint8)
            pixels = shown.reshape(*channels.shape[1:], 3).cpu().numpy()
        height, width = pixels.shape[:2]
        larger = min(self._scale, LONGEST / max(height, width))
        size = (max(1, round(width * larger)), max(1, round(height * larger)))
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def _fitted(loaded: "Loaded") -> torch.Tensor:
    """Channels + 1 x 3: the least squares from latents as the transformer has them to colours from -1 to 1."""
    from diffusers.utils.torch_utils import get_module_execution_device

    vae = loaded.pipe.vae
    picture = _chart()
    with torch.no_grad():
        given = picture[None, :, None].to(get_module_execution_device(vae), vae.dtype)
        found = vae.encode(given).latent_dist.mode()[0, :, 0].float().cpu()
    mean, deviation = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    rows = _with_one((found.flatten(1).T - mean) / deviation).double()
    small = torch.nn.functional.adaptive_avg_pool2d(picture[None], found.shape[1:])[0]
    colours = small.flatten(1).T.double()
    square = rows.T @ rows
    ridge = _RIDGE * len(rows) * torch.eye(len(square), dtype=torch.float64)
    ridge[-1, -1] = 0  # the last unknown is the constant, which may be what it likes
    weights: torch.Tensor = torch.linalg.solve(square + ridge, rows.T @ colours).float()
    if not weights.isfinite().all():
        raise ValueError("the VAE does not give finite latents")
    return weights


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _chart() -> torch.Tensor:
    """3 x :data:`SIDE` x :data:`SIDE` from -1 to 1: smooth waves through all colours, with edges between them."""
    drawn = np.random.default_rng(0)
    coarse = drawn.uniform(-1, 1, (8, 8, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    patches = drawn.uniform(-1, 1, (8, 8, 3)).astype(np.float32)
    hard = cv2.resize(patches, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    half = SIDE // 2
    picture = np.concatenate([smooth[:half], hard[half:]]).clip(-1, 1)
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()
