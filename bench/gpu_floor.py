"""How fast a card could run Wan's transformers at best: the multiplications of one prediction over the card's speed.

Counted is what is multiplied in matrices, two operations for each product and its sum: the linear layers, attention's
two products, the convolution that makes the patches and the projection back. Not counted are norms, position
embedding, activation, softmax, sampler and memory. The speed is what a plain bf16 multiplication of large matrices
reaches on an H200, measured, not its data sheet's 989.

Of D the width, F the width of the feed-forward layers, N the tokens of the video, M the text's and picture's tokens:

    a block                8 N D²  (query, key, value, output of self-attention)   + 4 N² D   (its two products)
                         + 4 N D² + 4 M D²  (cross-attention's four layers)        + 4 N M D  (its two products)
                         + 4 N D F  (the feed-forward layers)
    VACE's block           the same + 2 N D²  (its hint; the first one also 2 N D² for what comes in)
    around the blocks      2 N D (4 Cin + 4 Cout)   of patches of 1x2x2; VACE's own patches 2 N D 4 Cvace
"""

from dataclasses import dataclass

H200_BF16 = 790e12
"""Operations a second."""
TEXT, PICTURE = 512, 257
"""Tokens of a prompt, always padded to that, and of CLIP's picture in Wan 2.1's image-to-video."""


@dataclass(frozen=True)
class Sizes:
    """Of a transformer; the defaults are those of every Wan 14B."""

    width: int = 5120
    feed_forward: int = 13824
    blocks: int = 40
    channels_in: int = 16
    channels_out: int = 16
    vace_blocks: int = 0
    vace_channels: int = 96
    picture: bool = False
    """Whether CLIP's tokens are given besides the text's."""


@dataclass(frozen=True)
class Work:
    """One generation: sides in pixels, multiples of 16; ``references`` are VACE's, each a latent frame of its own."""

    width: int
    height: int
    frames: int
    steps: int
    guided: bool
    references: int = 0

    @property
    def tokens(self) -> int:
        latent_frames = (self.frames - 1) // 4 + 1 + self.references
        return latent_frames * (self.height // 16) * (self.width // 16)

    @property
    def predictions(self) -> int:
        return self.steps * (2 if self.guided else 1)


def operations(sizes: Sizes, tokens: int) -> float:
    """Of one prediction."""
    n, d = float(tokens), float(sizes.width)
    given = TEXT + (PICTURE if sizes.picture else 0)
    block = 8 * n * d * d + 4 * n * n * d
    block += 4 * n * d * d + 4 * given * d * d + 4 * n * given * d
    block += 4 * n * d * sizes.feed_forward
    total = block * (sizes.blocks + sizes.vace_blocks)
    total += 2 * n * d * 4 * (sizes.channels_in + sizes.channels_out)
    if sizes.vace_blocks:
        total += 2 * n * d * d * (sizes.vace_blocks + 1) + 2 * n * d * 4 * sizes.vace_channels
    return total


def seconds(sizes: Sizes, work: Work, speed: float = H200_BF16) -> float:
    """Of the whole denoising loop at least."""
    return operations(sizes, work.tokens) * work.predictions / speed
