"""The colours of a card: from words of the prompt where they name a light or a place, else from the seed."""

import colorsys
import random
import re
from typing import Final

import msgspec

Colour = tuple[float, float, float]
"""RGB, 0 to 255."""


class Palette(msgspec.Struct, frozen=True):
    """``top`` and ``low`` of the sky, the ``light`` in it, and the ``land`` in front."""

    top: Colour
    low: Colour
    light: Colour
    land: Colour


def _hex(text: str) -> Colour:
    value = int(text, 16)
    return float(value >> 16), float(value >> 8 & 255), float(value & 255)


_NAMED: Final = [
    (
        re.compile(rf"\b(?:{words})\b"),
        Palette(*(_hex(colour) for colour in colours.split())),
    )
    for words, colours in [
        (r"neon|cyberpunk|synthwave|night city|nightclub", "150b33 5a1a6e ff5fa8 0a0618"),
        (r"night|midnight|moon(?:light|lit)?|stars|starry", "070d1f 1d3a63 cfe0ff 040912"),
        (r"space|galaxy|nebula|cosmic|planets?", "08061a 3a1d5c b9a4ff 05040f"),
        (r"golden hour|sunset|dusk|dawn|sunrise|wasteland", "33254a d8743e ffd79a 1b1320"),
        (r"desert|dunes?|canyon|sahara|mars", "5a3044 d99055 ffe3b0 2b1720"),
        (r"snow(?:y|s)?|ice|icy|winter|arctic|glaciers?", "29405e 9db7cc f6fbff 16263a"),
        (r"ocean|sea|beach|waves?|underwater|lake|river", "06283f 2f8798 d5fff2 031521"),
        (r"forest|jungle|woods|trees?|meadow|garden|moss", "0e2a2a 5f8a5b f0f2b8 07171a"),
        (r"fire|flames?|lava|volcano|embers?", "1f0a12 a8351f ffb45c 10060a"),
        (r"rain(?:y|ing)?|storm(?:y)?|fog(?:gy)?|mist(?:y)?|clouds?", "232c38 66788a dfe8ee 12181f"),
        (r"flowers?|blossoms?|cherry|spring|pink|romantic", "3d2447 c9758f ffe0e0 211329"),
        (r"puppy|puppies|dogs?|cats?|kittens?|playing|happy|joyful", "1e4a5c e0a458 fff0c9 11272f"),
    ]
]


def palette(prompt: str, chance: random.Random) -> Palette:
    """Colours for ``prompt``; the first named light or place in the list above decides."""
    text = prompt.lower()
    for words, colours in _NAMED:
        if words.search(text):
            return colours
    hue = chance.random()
    away = hue + chance.choice((0.08, -0.08, 0.45, 0.55))
    return Palette(
        top=_hls(hue, 0.14, 0.45),
        low=_hls(away, 0.42, 0.42),
        light=_hls(away + 0.04, 0.86, 0.8),
        land=_hls(hue, 0.06, 0.4),
    )


def _hls(hue: float, lightness: float, saturation: float) -> Colour:
    red, green, blue = colorsys.hls_to_rgb(hue % 1, lightness, saturation)
    return red * 255, green * 255, blue * 255
