"""A canvas for pictures that are computed: gradients, shapes with volume, glows, smooth noise.

Coordinates are pixels of the finished picture; drawn at twice that size and shrunk at the end, which smooths every
edge. The same calls draw the same pixels.
"""

import math
from typing import Any

import cv2
import numpy as np

SCALE = 2
Array = np.ndarray[Any, np.dtype[Any]]
Colour = tuple[float, float, float]
Points = list[tuple[float, float]]


class Canvas:
    """Float RGB, drawn on in layers."""

    def __init__(self, width: int, height: int, seed: int) -> None:
        self.width, self.height = width, height
        self.px = np.zeros((height * SCALE, width * SCALE, 3), np.float32)
        self.rng = np.random.default_rng(seed)
        rows, columns = self.px.shape[:2]
        self.x = (np.arange(columns, dtype=np.float32) / SCALE)[None, :]
        self.y = (np.arange(rows, dtype=np.float32) / SCALE)[:, None]

    def sky(self, stops: list[tuple[float, Colour]]) -> None:
        places = [place * self.height for place, _ in stops]
        for channel in range(3):
            values = [colour[channel] for _, colour in stops]
            self.px[:, :, channel] = np.interp(self.y, places, values)

    def lay(self, amount: Array, colour: Colour) -> None:
        self.px += (np.array(colour, np.float32) - self.px) * amount[..., None]

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: float) -> None:
        away = np.hypot(self.x - x, self.y - y) / radius
        self.px += np.array(colour, np.float32) * (strength * np.exp(-away * away))[..., None]

    def noise(self, across: int, down: int, octaves: int = 4) -> Array:
        """Smooth noise from 0 to 1, ``across`` x ``down`` cells at first."""
        total = np.zeros(self.px.shape[:2], np.float32)
        size = (self.px.shape[1], self.px.shape[0])
        for octave in range(octaves):
            cells = self.rng.random((down * 2**octave + 2, across * 2**octave + 2), dtype=np.float32)
            total += cv2.resize(cells, size, interpolation=cv2.INTER_CUBIC) * 0.5**octave
        return np.clip((total / (2 - 0.5 ** (octaves - 1)) - 0.5) * 1.6 + 0.5, 0, 1)

    def patch(self, points: Points, pad: float, width: float = 0.0) -> tuple[Any, Array]:
        """Where a shape (or a line of ``width``) lies, with ``pad`` pixels around it, and its mask there."""
        path = np.array(points) * SCALE
        reach = (pad + width) * SCALE + 2
        rows, columns = self.px.shape[:2]
        left, top = (np.maximum(0, np.floor(path.min(axis=0) - reach))).astype(int)
        right, low = (np.minimum((columns, rows), np.ceil(path.max(axis=0) + reach))).astype(int)
        mask = np.zeros((max(0, low - top), max(0, right - left)), np.uint8)
        if mask.size:
            fixed = np.round((path - (left, top)) * 16).astype(np.int32)
            if width:
                cv2.polylines(mask, [fixed], False, 255, max(1, round(width * SCALE)), cv2.LINE_AA, 4)
            else:
                cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, 4)
        return np.s_[top:low, left:right], mask

    def mask(self, points: Points) -> Array:
        """The mask of a shape on the whole canvas."""
        whole = np.zeros(self.px.shape[:2], np.float32)
        part, mask = self.patch(points, 0)
        whole[part] = mask.astype(np.float32) / 255
        return whole

    def fill(
        self, points: Points, colour: Colour, alpha: float = 1.0, blur: float = 0.0, width: float = 0.0
    ) -> None:
        part, mask = self.patch(points, blur * 3, width)
        if not mask.size:
            return
        if blur:
            mask = cv2.GaussianBlur(mask, (0, 0), blur * SCALE)
        view = self.px[part]
        view += (np.array(colour, np.float32) - view) * (mask.astype(np.float32) * (alpha / 255))[..., None]

    def line(self, points: Points, colour: Colour, width: float, alpha: float = 1.0, blur: float = 0.0) -> None:
        self.fill(points, colour, alpha, blur, width)

    def solid(
        self, points: Points, colour: Colour, light: tuple[float, float] = (1, -1), soft: float = 14,
        rim: Colour | None = None, depth: float = 0.42, texture: float = 0.0,
    ) -> None:  # fmt: skip
        """A shape with volume: lighter towards ``light``, darker away from it, with a thin lit edge."""
        part, small = self.patch(points, soft * 2.5)
        if not small.size:
            return
        mask, view = small.astype(np.float32) / 255, self.px[part]
        form = cv2.GaussianBlur(mask, (0, 0), soft * SCALE, borderType=cv2.BORDER_REPLICATE)
        step = np.float32(soft * SCALE * 0.5 / math.hypot(*light))
        relief = _moved(form, step * light[0], step * light[1]) - _moved(
            form, -step * light[0], -step * light[1]
        )
        shade = 1 + depth * 2 * relief[..., None]
        if texture:
            grain = cv2.GaussianBlur(self.rng.random(mask.shape, dtype=np.float32), (0, 0), 2.2) - 0.5
            shade = shade + texture * grain[..., None] * 4
        view += (np.clip(np.array(colour, np.float32) * shade, 0, 255) - view) * mask[..., None]
        if rim:
            thin = np.float32(SCALE * 2.2 / math.hypot(*light))
            edge = np.clip(mask - _moved(mask, -thin * light[0], -thin * light[1]), 0, 1)
            edge = cv2.GaussianBlur(edge, (0, 0), SCALE * 0.7) * mask
            view += (np.array(rim, np.float32) - view) * np.clip(edge * 1.1, 0, 1)[..., None]

    def blur(self, radius: float) -> None:
        self.px = cv2.GaussianBlur(self.px, (0, 0), radius * SCALE)

    def finish(self, vignette: float) -> Array:
        off = np.hypot(self.x / self.width - 0.5, self.y / self.height - 0.5) / 0.707
        self.px *= (1 - vignette * np.clip(off, 0, 1) ** 2.4)[..., None]
        small = cv2.resize(self.px, (self.width, self.height), interpolation=cv2.INTER_AREA)
        grain = self.rng.random((self.height, self.width), dtype=np.float32) - 0.5
        return np.clip(small + grain[..., None] * 1.6 + 0.5, 0, 255).astype(np.uint8)


def _moved(mask: Array, dx: float, dy: float) -> Array:
    matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float64)
    return np.asarray(
        cv2.warpAffine(mask, matrix, mask.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    )


def curve(points: Points, closed: bool = True, steps: int = 12) -> Points:
    """A smooth line through ``points`` (Catmull-Rom)."""
    p = np.array(points, float)
    n = len(p)
    out: Points = []
    for i in range(n if closed else n - 1):
        near = [p[(i + k) % n] if closed else p[min(max(i + k, 0), n - 1)] for k in (-1, 0, 1, 2)]
        a, b, c, d = near
        for t in np.arange(steps) / steps:
            q = 0.5 * (
                2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
            )
            out.append((float(q[0]), float(q[1])))
    return out if closed else [*out, points[-1]]


def oval(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Points:
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    angles = [math.tau * i / 72 for i in range(72)]
    return [(x + rx * math.cos(a) * c - ry * math.sin(a) * s, y + rx * math.cos(a) * s + ry * math.sin(a) * c)
            for a in angles]  # fmt: skip


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
