"""A young woman in a grey hoodie before a graffiti-covered wall, warm lights blurred down the corridor."""

# ruff: noqa: E501
# fmt: off

import math

import cv2
import numpy as np

from sample_art.canvas import SCALE, Array, Canvas, Points, box, curve, oval

VANISH = (820.0, 300.0)
LETTERS: dict[str, list[Points]] = {
    "R": [[(0, 1), (0, 0.5), (0, 0), (0.5, 0), (0.85, 0.22), (0.5, 0.48), (0.1, 0.5)], [(0.35, 0.52), (0.6, 0.75), (0.9, 1)]],
    "U": [[(0, 0), (0, 0.6), (0.2, 0.95), (0.7, 0.95), (0.9, 0.6), (0.9, 0)]],
    "S": [[(0.9, 0.12), (0.5, 0), (0.05, 0.2), (0.45, 0.5), (0.9, 0.76), (0.5, 1), (0, 0.88)]],
    "H": [[(0, 0), (0, 0.5), (0, 1)], [(0.9, 0), (0.9, 0.5), (0.9, 1)], [(0, 0.5), (0.9, 0.5)]],
    "E": [[(0.85, 0), (0.1, 0.02), (0, 0.1), (0, 0.9), (0.1, 0.98), (0.85, 1)], [(0, 0.5), (0.7, 0.5)]],
}
"""Strokes in a box of one by one."""


def corridor() -> Array:
    c = Canvas(1152, 768, 1235)
    c.sky([(0, (30, 24, 38)), (0.4, (74, 50, 52)), (1, (26, 20, 28))])
    _room(c)
    _graffiti(c)
    c.blur(3.2)
    _lights(c)
    _woman(c)
    c.glow(980, 200, 420, (255, 160, 80), 0.10)
    return c.finish(0.45)


def _room(c: Canvas) -> None:
    vx, vy = VANISH
    c.fill([(-10, -400), (vx - 60, vy - 80), (vx - 60, vy + 90), (-10, 1160)], (122, 92, 92))
    c.fill([(1162, -60), (vx + 60, vy - 80), (vx + 60, vy + 90), (1162, 860)], (58, 40, 46))
    c.fill([(-10, -500), (vx - 60, vy - 80), (vx + 60, vy - 80), (1162, -60), (1162, -500)], (44, 32, 42))
    c.fill([(-10, 1160), (vx - 60, vy + 90), (vx + 60, vy + 90), (1162, 860), (1162, 1200)], (52, 36, 38))
    c.fill(box(vx - 60, vy - 80, vx + 60, vy + 90), (206, 128, 72), 1, 5)
    c.glow(vx, vy, 90, (255, 190, 110), 0.3)
    c.glow(vx, vy, 260, (255, 150, 70), 0.26)
    shade = np.clip((c.x - 60) / 700, 0, 1) * np.clip((vx - c.x) / 20, 0, 1)
    c.lay(shade * 0.22 + 0 * c.y, (255, 178, 104))
    for n in range(1, 9):  # joints of the wall and doors of the other side, closer together down the corridor
        x = vx + 60 + 290 * (n / 8) ** 2.2
        t = (x - vx) / 342
        c.line([(x, vy - 80 - 330 * (t - 0.17)), (x, vy + 90 + 560 * (t - 0.17))], (36, 25, 32), 1 + 4 * t, 0.8)


def _graffiti(c: Canvas) -> None:
    """Bold shapes on the left wall, in its perspective."""
    vx, vy = VANISH

    def wall(u: float, v: float) -> tuple[float, float]:
        """u along the wall from the viewer (0) to the end (1), v from its middle up (-1) and down (1)."""
        x = -10 + (vx - 50) * (1 - max(0.0, 1 - u) ** 1.25)
        t = 1 - (x + 10) / (vx - 50)
        return x, vy + 5 + v * (85 + t * 520)

    def on_wall(points: Points) -> Points:
        return [wall(u, v) for u, v in points]

    paints = [(38, 176, 178), (240, 92, 96), (250, 190, 60), (120, 86, 200), (84, 186, 96), (240, 132, 52), (60, 120, 214), (236, 110, 170)]
    for _ in range(46):  # old layers of paint
        u, v = c.rng.random() ** 1.2 * 0.97, (c.rng.random() - 0.5) * 1.5
        r = 0.03 + 0.07 * c.rng.random()
        paint = paints[int(c.rng.random() * len(paints))]
        blob = [(u + r * math.cos(a) * (0.6 + 0.6 * c.rng.random()), v + r * 2.6 * math.sin(a) * (0.6 + 0.6 * c.rng.random()))
                for a in np.linspace(0, math.tau, 10)[:-1]]
        c.fill(on_wall(curve(blob)), paint, 0.4)
    size = 0.125
    for n, letter in enumerate("RUSHES"):  # a tag of big round letters
        u, v = 0.015 + (size + 0.03) * n, -0.36 + 0.05 * math.sin(n * 2.3)
        strokes = [on_wall(curve([(u + size * x, v + 0.72 * y) for x, y in stroke], False)) for stroke in LETTERS[letter]]
        near = 1 - 0.86 * u
        for wide, colour in ((64, (24, 16, 30)), (46, paints[(n * 3 + 1) % len(paints)])):
            for stroke in strokes:
                c.line(stroke, colour, wide * near)
        for stroke in strokes:
            c.line([(x - 8 * near, y - 9 * near) for x, y in stroke], (255, 250, 238), 7 * near, 0.55)
    for _ in range(34):  # drips and quick lines
        u, v = c.rng.random() * 0.95, (c.rng.random() - 0.5) * 1.4
        paint = paints[int(c.rng.random() * len(paints))]
        c.line(on_wall([(u, v), (u + 0.002, v + 0.12 + 0.2 * c.rng.random())]), paint, 4 * (1 - 0.7 * u), 0.75)
        c.line(on_wall(curve([(u, v), (u + 0.05, v - 0.1), (u + 0.1, v + 0.06), (u + 0.16, v - 0.08)], False)), paint, 5 * (1 - 0.7 * u), 0.6)


def _lights(c: Canvas) -> None:
    warm = [(255, 190, 104), (255, 158, 74), (255, 218, 150), (255, 132, 82), (255, 206, 120)]
    for side, top in ((1, -1), (1, 1), (-1, -1)):
        for n in range(9):
            t = (n / 8) ** 1.7
            x = VANISH[0] + side * (40 + 330 * t) + (c.rng.random() - 0.5) * 26
            y = VANISH[1] - 60 + top * (26 + 190 * t) + (c.rng.random() - 0.5) * 30
            _bokeh(c, x, y, 8 + 34 * t, warm[n % 5], 0.5 - 0.22 * t)
    for _ in range(26):
        x, y = 560 + c.rng.random() * 600, 40 + c.rng.random() * 560
        _bokeh(c, x, y, 7 + c.rng.random() ** 2 * 34, warm[int(c.rng.random() * 5)], 0.12 + 0.22 * c.rng.random())
    for x, y, r, colour in ((86, 120, 34, (90, 200, 220)), (210, 60, 24, (255, 120, 160)), (60, 300, 22, (255, 200, 120))):
        _bokeh(c, x, y, r, colour, 0.2)


def _bokeh(c: Canvas, x: float, y: float, r: float, colour: tuple[float, float, float], strength: float) -> None:
    c.glow(x, y, r * 1.9, colour, strength * 0.35)
    c.fill(oval(x, y, r, r), colour, strength, 0.8)
    c.line(oval(x, y, r - 0.6, r - 0.6), (255, 244, 220), 1.3, strength * 0.7, 0.5)


def _woman(c: Canvas) -> None:
    x, light = 470.0, (1.0, -0.5)
    rim, skin, shade, hair = (255, 190, 120), (226, 164, 130), (196, 132, 106), (52, 32, 34)
    grey, dark = (134, 134, 142), (88, 88, 98)
    # hood behind the neck, shoulders, body
    c.solid(curve([(x - 118, 470), (x - 132, 540), (x - 60, 600), (x + 60, 600), (x + 138, 540), (x + 120, 470), (x, 440)]), dark, light, 20, rim)
    c.solid(curve([(x - 92, 524), (x - 190, 566), (x - 276, 640), (x - 318, 800), (x + 322, 800), (x + 278, 636), (x + 190, 564), (x + 96, 522), (x, 600)]),
            grey, light, 34, rim, 0.5, 0.03)
    c.solid(curve([(x - 44, 440), (x + 46, 440), (x + 50, 520), (x + 62, 560), (x, 612), (x - 60, 560), (x - 48, 520)]), shade, light, 16)
    c.fill(curve([(x - 42, 452), (x + 46, 452), (x + 36, 500), (x, 522), (x - 34, 500)]), (146, 86, 76), 0.6, 6)
    _bear(c, x + 2, 716)
    for side in (-1, 1):  # the edges of the hood
        c.solid(curve([(x + side * 70, 478), (x + side * 122, 496), (x + side * 128, 556), (x + side * 66, 622), (x + side * 6, 652), (x + side * 30, 604), (x + side * 66, 556)]),
                (150, 150, 158), light, 12, rim, 0.55)
        c.line(curve([(x + side * 40, 612), (x + side * 46, 672), (x + side * 40, 724)], False), (228, 226, 222), 5)
        c.fill(oval(x + side * 40, 728, 4.5, 9), (206, 200, 194))
        c.line(curve([(x + side * 196, 600), (x + side * 180, 690), (x + side * 196, 780)], False), (74, 74, 84), 3, 0.6, 1.5)
    # bun and hair behind the head
    c.solid(curve([(x - 10, 128), (x - 62, 118), (x - 84, 76), (x - 54, 34), (x, 22), (x + 56, 38), (x + 78, 82), (x + 54, 122)]), hair, light, 18, rim, 0.7, 0.05)
    for n in range(7):
        a = -2.8 + n * 0.42
        c.line(curve([(x, 112), (x + 40 * math.cos(a), 76 + 26 * math.sin(a)), (x + 62 * math.cos(a + 0.6), 74 + 44 * math.sin(a + 0.6))], False), (92, 58, 50), 2.4, 0.6)
    c.solid(curve([(x - 122, 300), (x - 128, 210), (x - 92, 130), (x, 98), (x + 94, 130), (x + 130, 212), (x + 124, 306), (x + 90, 400), (x - 90, 396)]), hair, light, 24, rim, 0.6)
    # face
    face = curve([(x - 96, 250), (x - 92, 330), (x - 70, 402), (x - 30, 450), (x, 460), (x + 32, 450), (x + 72, 402), (x + 94, 330), (x + 98, 250), (x + 76, 180), (x, 150), (x - 76, 180)])
    for side in (-1, 1):
        c.solid(oval(x + side * 100, 312, 15, 30, side * 8), (212, 144, 114), light, 8, rim)
        c.line(oval(x + side * 106, 350, 11, 13), (240, 206, 128), 2.6)
    c.solid(face, skin, light, 36, None, 0.34)
    mask = c.mask(face)
    side_light = np.clip((c.x - x - 20) / 90, 0, 1) * mask
    c.lay(np.asarray(side_light * 0.34 + 0 * c.y), (255, 198, 140))
    c.lay(np.asarray(np.clip((x - 20 - c.x) / 90, 0, 1) * mask * 0.30 + 0 * c.y), (140, 82, 96))
    for side in (-1, 1):
        c.fill(oval(x + side * 56, 362, 28, 18), (232, 112, 98), 0.34, 9)
        _eye(c, x + side * 43, 300, side)
        c.line(curve([(x + side * 20, 262), (x + side * 46, 248), (x + side * 76, 262)], False), (58, 34, 34), 7, 0.92, 0.8)
    c.line(curve([(x + 10, 306), (x + 15, 340), (x + 21, 358), (x + 8, 368)], False), (172, 98, 80), 3.4, 0.6, 1)
    c.fill(oval(x + 4, 368, 18, 7), (180, 104, 84), 0.45, 3.5)
    c.fill(oval(x + 8, 350, 6, 8), (255, 222, 190), 0.5, 3)
    lips = curve([(x - 36, 402), (x - 12, 396), (x + 2, 399), (x + 16, 395), (x + 42, 397), (x + 22, 418), (x + 2, 423), (x - 18, 418)])
    c.fill(lips, (196, 88, 86), 0.95, 0.6)
    c.line(curve([(x - 42, 399), (x - 18, 406), (x + 4, 408), (x + 26, 404), (x + 50, 391)], False), (122, 46, 54), 3, 0.9, 0.5)
    c.fill(oval(x + 10, 414, 12, 3), (255, 190, 180), 0.5, 1.6)
    c.line(curve([(x + 56, 380), (x + 61, 392), (x + 57, 402)], False), (176, 104, 84), 2.4, 0.5, 0.8)
    # hair over the forehead, strands
    c.solid(curve([(x - 104, 300), (x - 112, 214), (x - 78, 138), (x, 106), (x + 80, 138), (x + 114, 216), (x + 106, 306), (x + 92, 250), (x + 60, 196),
                   (x + 22, 172), (x - 30, 190), (x - 78, 232)]), hair, light, 15, rim, 0.7, 0.04)
    for n in range(15):
        t = n / 14
        c.line(curve([(x - 88 + 176 * t, 236 - 62 * math.sin(math.pi * t)), (x - 56 + 112 * t, 160 - 20 * math.sin(math.pi * t)), (x - 14 + 28 * t, 112)], False), (96, 60, 50), 2, 0.45)
    for points, w in (([(x - 96, 240), (x - 116, 330), (x - 100, 420)], 5), ([(x - 100, 260), (x - 92, 350), (x - 106, 392)], 3),
                      ([(x + 98, 246), (x + 112, 330), (x + 96, 410)], 4.5), ([(x + 60, 40), (x + 92, 30), (x + 104, 56)], 3), ([(x - 56, 44), (x - 92, 40), (x - 100, 72)], 3)):
        c.line(curve(points, False), hair, w, 0.95)
    c.px = c.px + 0.10 * np.maximum(0, cv2.GaussianBlur(c.px, (0, 0), 24 * SCALE) - 90)


def _eye(c: Canvas, x: float, y: float, side: int) -> None:
    white = curve([(x - 27, y + 2), (x - 10, y - 14), (x + 12, y - 14), (x + 27, y + 1), (x + 12, y + 12), (x - 10, y + 13)])
    c.fill(oval(x, y - 8, 32, 20), (176, 104, 88), 0.4, 6)
    c.fill(white, (246, 238, 230))
    c.fill(oval(x + 1, y - 1, 13, 13.5), (74, 46, 34))
    c.fill(oval(x + 1, y + 3, 9, 7), (134, 86, 52), 0.9, 1)
    c.fill(oval(x + 1, y - 1, 6, 6.5), (18, 12, 14))
    c.fill(oval(x + 6, y - 6, 3.6, 3.8), (255, 250, 240))
    c.fill(curve([(x - 28, y), (x - 10, y - 16), (x + 12, y - 16), (x + 28, y - 1), (x + 12, y - 9), (x - 10, y - 9)]), (40, 24, 26), 0.9, 0.6)
    c.line(curve([(x - 27, y + 1), (x - 10, y - 14), (x + 12, y - 14), (x + 28, y)], False), (32, 18, 22), 4.4)
    c.line([(x + side * 27, y - 1), (x + side * 35, y - 9)], (32, 18, 22), 3.6)
    c.line(curve([(x - 20, y + 10), (x, y + 15), (x + 20, y + 9)], False), (150, 86, 76), 1.8, 0.7)


def _bear(c: Canvas, x: float, y: float) -> None:
    """A faded print."""
    print_, face = (168, 142, 126), (196, 178, 164)
    for side in (-1, 1):
        c.fill(oval(x + side * 42, y - 42, 20, 20), print_, 0.75)
        c.fill(oval(x + side * 42, y - 42, 10, 10), face, 0.6)
    c.fill(oval(x, y, 64, 55), print_, 0.8)
    c.fill(oval(x, y + 18, 30, 23), face, 0.75)
    for side in (-1, 1):
        c.fill(oval(x + side * 23, y - 10, 5.5, 6.5), (66, 54, 56), 0.8)
    c.fill(oval(x, y + 10, 10, 7), (66, 54, 56), 0.8)
    part, mask = c.patch(oval(x, y - 10, 92, 90), 0)
    worn = np.clip(cv2.GaussianBlur(c.rng.random(mask.shape, dtype=np.float32), (0, 0), 1.6) * 9 - 4.7, 0, 1)
    view = c.px[part]
    view += (np.array((140, 140, 148), np.float32) - view) * (worn * mask / 255 * 0.55)[..., None]
