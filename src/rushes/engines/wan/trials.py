"""A trial: what an expert predicts for fixed, made-up inputs, before and after something was done to it."""

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from rushes.engines.wan.prompts import TOKENS

if TYPE_CHECKING:
    from rushes.engines.wan.load import Loaded

Size = tuple[int, int, int]
"""Latent frames, height and width of latents."""
ON_CARD: Final[tuple[Size, ...]] = ((9, 60, 60), (5, 24, 18))
"""The first is large enough that compiled kernels are tuned for real work (8100 tokens; a video has 30,000); the
second shows that another size runs as well. No side and no number of tokens equals a width of the model."""
ELSEWHERE: Final[tuple[Size, ...]] = ((3, 10, 14), (5, 4, 18))
_SEED: Final = 7
_TIME: Final = 900.0
"""Of 1000: of a video most of the noise is left."""
_WORDS: Final = 64
"""Tokens of a prompt of some length; the pipelines fill up with zeros."""
_TEXT_SPREAD: Final = 0.1
"""About that of what UMT5 makes of a prompt; with larger numbers the text would drown what the video says."""
_PICTURE_TOKENS: Final = 257
"""What CLIP's ViT-H makes of a picture."""


def relative(changed: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference; infinite where something is not finite."""
    reference = reference.float()
    difference = torch.linalg.vector_norm(changed.float() - reference)
    found = float(difference / torch.linalg.vector_norm(reference))
    return found if math.isfinite(found) else math.inf


class Trial:
    """Of one expert. Made before anything is changed: that prediction is the reference."""

    def __init__(self, loaded: "Loaded", expert: Any, sizes: tuple[Size, ...] = ()) -> None:
        self._pipe, self._expert = loaded.pipe, expert
        self._device = loaded.device
        sizes = sizes or (ON_CARD if self._device.type == "cuda" else ELSEWHERE)
        try:
            self._references = {size: self._predict(size) for size in sizes}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._references = {sizes[-1]: self._predict(sizes[-1])}

    def deviation(self) -> float:
        """From the reference, at the worst size."""
        return max(relative(self._predict(size), kept) for size, kept in self._references.items())

    def _predict(self, size: Size) -> torch.Tensor:
        given = self._given(size)
        try:
            with torch.no_grad(), self._expert.cache_context("cond"):
                made: torch.Tensor = self._expert(**given, return_dict=False)[0]
        finally:
            self._expert._reset_stateful_cache()  # noqa: SLF001 - as the pipelines do after each run
        return made.float()

    def _given(self, size: Size) -> dict[str, torch.Tensor]:
        """What the pipelines give an expert for one video."""
        config, draw = self._expert.config, torch.Generator().manual_seed(_SEED)

        def noise(*shape: int) -> torch.Tensor:
            made = torch.randn(*shape, generator=draw)
            return made.to(self._device, self._expert.dtype)

        frames, height, width = size
        given = {
            "hidden_states": noise(1, config.in_channels, frames, height, width),
            "encoder_hidden_states": noise(1, TOKENS, config.text_dim) * _TEXT_SPREAD,
        }
        given["encoder_hidden_states"][:, _WORDS:] = 0
        tokens = frames * height * width // (config.patch_size[1] * config.patch_size[2])
        times = (1, tokens) if self._pipe.config.get("expand_timesteps") else (1,)
        given["timestep"] = torch.full(times, _TIME, device=self._device)
        if config.image_dim is not None:
            # two pictures where there are positions for two: WanImageEmbedding
            pictures, each = (
                (2, config.pos_embed_seq_len // 2) if config.pos_embed_seq_len else (1, _PICTURE_TOKENS)
            )
            given["encoder_hidden_states_image"] = noise(pictures, each, config.image_dim)
        if hasattr(config, "vace_layers"):
            given["control_hidden_states"] = noise(1, config.vace_in_channels, frames, height, width)
        return given
