"""A quiet landscape to set words on: a sky with a low light in it, streaks of cloud, ridges in the haze."""

import math
import random
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from rushes.engines.draft.palette import Colour, Palette
from rushes.media.encode import Frame

Canvas = npt.NDArray[np.float32]
"""Rows x columns x 3, RGB, 0 to 255."""

_RIDGES: Final = 5


def scenery(width: int, height: int, colours: Palette, chance: random.Random) -> Canvas:
    """``width`` x ``height`` pixels; the light stands on an upper third, right or left."""
    noise = np.random.default_rng(chance.getrandbits(64))
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    sun = (chance.choice((0.64, 0.69, 0.74)), chance.choice((0.27, 0.31, 0.36)))
    canvas = _sky(y, colours)
    canvas = np.repeat(canvas, width, axis=1)
    away = np.hypot((x - sun[0]) * width, (y - sun[1]) * height) / max(width, height)
    _lay(canvas, colours.light, 0.32 * _clouds(noise, width, height) * np.exp(-2.2 * away))
    _lay(canvas, colours.light, 0.55 * np.exp(-away * 6.5))
    radius = chance.uniform(0.032, 0.045)
    edge = 1.2 / max(width, height)
    _lay(canvas, colours.light, 0.92 * np.clip((radius - away) / edge + 0.5, 0, 1))
    for number in range(_RIDGES):
        _ridge(canvas, number, x, y, colours, chance)
    vignette = 1 - 0.32 * np.clip(np.hypot(x - 0.5, y - 0.5) / 0.75, 0, 1) ** 2.2
    canvas *= vignette[..., None]
    return canvas


def dithered(canvas: Canvas, chance: random.Random) -> Frame:
    """8 bits, with a grain of one step that keeps gradients from showing bands."""
    noise = np.random.default_rng(chance.getrandbits(64))
    grain = (
        noise.random(canvas.shape[:2], dtype=np.float32) + noise.random(canvas.shape[:2], dtype=np.float32) - 1
    )
    return np.clip(canvas + grain[..., None] * 0.9 + 0.5, 0, 255).astype(np.uint8)


def _sky(y: npt.NDArray[np.float32], colours: Palette) -> Canvas:
    t = np.clip(y / 0.78, 0, 1) ** 1.25
    top, low = np.array(colours.top, np.float32), np.array(colours.low, np.float32)
    return np.asarray(top + (low - top) * t[..., None], np.float32)


def _clouds(noise: np.random.Generator, width: int, height: int) -> npt.NDArray[np.float32]:
    """Long thin streaks, 0 to 1: noise at several sizes, stretched sideways."""
    total = np.zeros((height, width), np.float32)
    for size, weight in ((7, 0.5), (15, 0.3), (33, 0.2)):
        cells = noise.random((size, max(2, size // 4 * width // height + 2)), dtype=np.float32)
        total += weight * cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip((total - 0.5) * 4, 0, 1), np.float32)


def _ridge(
    canvas: Canvas,
    number: int,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.float32],
    colours: Palette,
    chance: random.Random,
) -> None:
    """Lay one ridge over ``canvas``, the further ones first: paler, smoother, higher."""
    near = (number + 1) / _RIDGES
    line = np.full_like(x, 0.60 + 0.30 * near**1.3)
    for octave in range(6):
        waves = chance.uniform(1.1, 1.9) * 1.9**octave * (0.8 + 0.7 * near)
        line += (0.045 + 0.012 * near) * 0.52**octave * np.sin(math.tau * (waves * x + chance.random()))
    rows = canvas.shape[0]
    inside = np.clip((y - line) * rows + 0.5, 0, 1)
    haze, land = np.array(colours.low, np.float32), np.array(colours.land, np.float32)
    body = haze * 0.82 + (land - haze * 0.82) * near**0.75
    # Mist gathers at the foot of all but the nearest ridge.
    mist = np.clip((y - line) / 0.16, 0, 1) * 0.35 * (1 - near)
    colour = body + (haze - body) * mist[..., None]
    canvas += (colour - canvas) * inside[..., None]


def _lay(canvas: Canvas, colour: Colour, amount: npt.NDArray[np.float32]) -> None:
    canvas += (np.array(colour, np.float32) - canvas) * amount[..., None].astype(np.float32)
