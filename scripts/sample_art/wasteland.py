"""A lone figure in heavy gear and a yellow jacket before a rocket, golden hour."""

# ruff: noqa: E501
# fmt: off

import math

import numpy as np

from sample_art.canvas import Array, Canvas, box, curve, oval


def wasteland() -> Array:
    c = Canvas(1280, 720, 1290)
    c.sky([(0, (58, 50, 78)), (0.22, (120, 76, 82)), (0.45, (216, 128, 74)), (0.64, (255, 206, 128)), (1, (255, 214, 140))])
    streaks = np.clip((c.noise(3, 16, 4) - 0.48) * 3, 0, 1) * np.clip(1 - c.y / 430, 0, 1)
    c.lay(streaks * 0.55, (255, 190, 130))
    c.lay(np.clip((c.noise(4, 20, 3) - 0.55) * 3, 0, 1) * np.clip(1 - c.y / 360, 0, 1) * 0.45, (70, 48, 72))
    for x0, y0, x1, y1, w in ((150, 0, 520, 250, 3.2), (820, 0, 1130, 150, 2.4), (980, 0, 1280, 96, 1.8)):
        c.line([(x0, y0), (x1, y1)], (255, 224, 178), w, 0.6, 1.6)
    c.glow(1010, 438, 330, (255, 170, 70), 0.55)
    c.glow(1010, 438, 120, (255, 220, 150), 0.7)
    c.fill(oval(1010, 438, 40, 40), (255, 250, 226), 0.96, 1.2)
    _ruins(c)
    _rocket(c)
    _dust(c, 470, 0.85)
    _ground(c)
    _soldier(c)
    _foreground(c)
    c.glow(1010, 450, 520, (255, 150, 60), 0.13)
    return c.finish(0.42)


def _ruins(c: Canvas) -> None:
    for far, colour, base, tall in ((0, (214, 138, 88), 470, 90), (1, (160, 94, 70), 486, 150), (2, (104, 62, 56), 500, 120)):
        x = -20.0
        while x < 1300:
            wide = 18 + c.rng.random() * 62
            high = tall * (0.25 + 0.75 * c.rng.random()) * (0.55 if 560 < x < 1090 and far else 1)
            cut = c.rng.random() * 0.3 * high
            c.fill([(x, base + 30), (x, base - high + cut), (x + wide * 0.4, base - high), (x + wide, base - high + cut / 2),
                    (x + wide, base + 30)], colour)  # fmt: skip
            if c.rng.random() > 0.6:
                c.line([(x + wide * 0.4, base - high), (x + wide * 0.4, base - high - 30)], colour, 1.6)
            x += wide * (0.8 + 0.9 * c.rng.random())
        c.lay(np.clip((c.y - base + 90) / 110, 0, 1) * np.clip((base + 60 - c.y) / 40, 0, 1) * 0.45 + 0 * c.x, (255, 196, 124))


def _rocket(c: Canvas) -> None:
    x, w, top, foot = 800.0, 52.0, 56.0, 512.0
    for side in (-1, 1):
        c.solid([(x + side * w * 0.9, foot - 130), (x + side * w * 1.95, foot - 30), (x + side * w * 1.95, foot + 14),
                 (x + side * w * 0.9, foot - 16)], (92, 56, 48), (1, -0.4), 9, (255, 190, 110))  # fmt: skip
    hull = [(x, top), *curve([(x, top), (x + w * 0.55, top + 52), (x + w, top + 140), (x + w, foot)], False),
            *curve([(x - w, foot), (x - w, top + 140), (x - w * 0.55, top + 52), (x, top)], False)]  # fmt: skip
    c.solid(hull, (150, 96, 74), (1, -0.15), 26, (255, 214, 150), 0.62, 0.06)
    mask = c.mask(hull)
    rust = np.clip((c.noise(60, 6, 4) - 0.52) * 4, 0, 1) * mask
    c.lay(rust * 0.5, (92, 44, 30))
    c.lay(np.clip((c.x - x - w * 0.35) / (w * 0.6), 0, 1) * mask * 0.45 + 0 * c.y, (255, 186, 112))
    c.lay(np.clip((x - w * 0.1 - c.x) / w, 0, 1) * mask * 0.55 + 0 * c.y, (44, 26, 36))
    for y, tone in ((205, 0.55), (214, 0.3), (318, 0.5), (420, 0.5), (428, 0.25)):
        c.lay(mask * (np.abs(c.y - y) < 2.4) * tone, (40, 22, 28))
    c.fill(oval(x + 4, 262, 13, 13), (40, 26, 34), 0.9)
    c.line(oval(x + 4, 262, 15, 15), (226, 158, 104), 2, 0.8)
    for mast in (-118, -92):
        c.line([(x + mast, 150), (x + mast, 510)], (70, 40, 42), 4)
    for y in range(160, 500, 28):
        c.line([(x - 118, y), (x - 92, y + 28)], (70, 40, 42), 2)
        c.line([(x - 92, y), (x - 118, y + 28)], (70, 40, 42), 2)
    for y in (222, 340):
        c.line([(x - 92, y), (x - w, y + 6)], (70, 40, 42), 4)


def _dust(c: Canvas, base: float, strength: float) -> None:
    cloud = c.noise(9, 6, 5)
    for x, y, rx, ry in ((800, base + 36, 250, 62), (610, base + 40, 150, 46), (1010, base + 44, 190, 40), (330, base + 56, 260, 30)):
        away = np.hypot((c.x - x) / rx, (c.y - y) / ry)
        c.lay(np.clip((1.15 - away) * 1.3, 0, 1) * np.clip(0.15 + cloud * 1.1, 0, 1) * strength, (244, 178, 112))


def _ground(c: Canvas) -> None:
    line = 520 + 10 * np.sin(c.x / 150) + 5 * np.sin(c.x / 41)
    inside = np.clip((c.y - line) / 3, 0, 1)
    depth = np.clip((c.y - 515) / 205, 0, 1) + 0 * c.x
    soil = c.noise(40, 26, 5)
    near, far = np.array((40, 25, 27), np.float32), np.array((172, 102, 66), np.float32)
    colour = far + (near - far) * depth[..., None] ** 0.62
    colour *= (0.78 + 0.44 * soil)[..., None]
    c.px += (colour - c.px) * inside[..., None]
    for _ in range(150):
        z = c.rng.random() ** 1.6
        y = 530 + 180 * z
        x = c.rng.random() * 1280
        s = (3 + 15 * z) * (0.5 + c.rng.random())
        points = [(x + s * math.cos(a) * (1.1 + 0.7 * c.rng.random()), y - abs(s * math.sin(a)) * (0.4 + 0.5 * c.rng.random()))
                  for a in np.linspace(0, math.pi, 6)]  # fmt: skip
        tone = 1 - 0.72 * z
        c.fill([(px - s * 2.2, py * 0 + y + 1) if i == 0 else (px, py) for i, (px, py) in enumerate(points)], (30, 17, 20), 0.35)
        c.solid(points, (104 * tone + 14, 60 * tone + 9, 46 * tone + 11), (1, -0.5), 3, (206, 128, 76) if z < 0.6 else None, 0.9)
    c.glow(1010, 560, 330, (255, 150, 70), 0.2)


def _soldier(c: Canvas) -> None:
    x, rim, light = 452.0, (255, 206, 132), (1.0, -0.45)
    black, strap, yellow = (38, 34, 40), (24, 21, 26), (226, 158, 34)
    c.fill([(x - 56, 668), (x - 330, 712), (x - 150, 718), (x + 60, 676)], (16, 9, 14), 0.6, 5)
    c.solid(curve([(x - 84, 352), (x - 98, 420), (x - 88, 478), (x - 40, 484), (x - 36, 350)]), (62, 56, 50), light, 12)
    for side, foot in ((-1, x - 44), (1, x + 46)):  # legs and boots
        c.solid(curve([(x + side * 6, 470), (x + side * 50, 468), (x + side * 54, 540), (foot + side * 26, 600), (foot + side * 22, 652),
                       (foot - side * 18, 652), (foot - side * 20, 596), (x + side * 6, 540)]), black, light, 13, rim, 0.5, 0.03)  # fmt: skip
        c.solid(curve([(foot - 22, 630), (foot + 20, 630), (foot + 24, 656), (foot + 30 + side * 8, 676), (foot - 28 + side * 8, 676)]),
                (26, 23, 26), light, 8, rim)  # fmt: skip
        c.solid(curve([(x + side * 30 - 18, 548), (x + side * 30 + 20, 548), (x + side * 30 + 16, 584), (x + side * 30 - 15, 584)]),
                (54, 49, 52), light, 6, rim)  # fmt: skip
        c.line([(x + side * 10, 520), (x + side * 52, 514)], strap, 6)
    c.solid(curve([(x - 44, 322), (x + 44, 322), (x + 66, 346), (x + 68, 430), (x + 64, 496), (x, 504), (x - 64, 496), (x - 66, 430),
                   (x - 64, 346)]), yellow, light, 20, rim, 0.6, 0.03)  # fmt: skip
    for side in (-1, 1):  # arms
        c.solid(curve([(x + side * 46, 330), (x + side * 76, 344), (x + side * 94, 420), (x + side * 96, 488), (x + side * 72, 494),
                       (x + side * 66, 424), (x + side * 52, 372)]), (212, 142, 28), light, 12, rim, 0.6, 0.03)  # fmt: skip
        c.solid(curve([(x + side * 70, 484), (x + side * 98, 480), (x + side * 100, 516), (x + side * 84, 528), (x + side * 70, 512)]),
                (30, 27, 30), light, 7, rim)  # fmt: skip
        c.line([(x + side * 68, 440), (x + side * 96, 432)], (120, 74, 18), 2.4, 0.8)
        c.line([(x + side * 34, 324), (x + side * 30, 400), (x + side * 34, 474)], strap, 9)
    c.line([(x, 336), (x, 500)], (132, 84, 18), 2.4)
    c.line([(x - 62, 408), (x + 64, 408)], strap, 7)
    c.solid(box(x - 66, 468, x + 66, 484), (28, 24, 26), light, 5, rim)
    for px, py, w, h in ((-62, 478, 26, 34), (-30, 482, 22, 28), (12, 482, 22, 28), (40, 478, 27, 36), (-52, 414, 24, 30), (26, 414, 26, 28)):
        c.solid(curve([(x + px, py - 2), (x + px + w, py - 2), (x + px + w + 1, py + h), (x + px - 1, py + h)], True, 6),
                (66, 56, 42), light, 5, rim)  # fmt: skip
        c.line([(x + px, py + h * 0.35), (x + px + w, py + h * 0.35)], (36, 30, 26), 2)
    c.solid(curve([(x - 40, 320), (x - 28, 300), (x + 28, 300), (x + 42, 320), (x + 30, 342), (x - 30, 342)]), (196, 128, 24), light, 8, rim)
    c.solid(curve([(x - 36, 280), (x - 34, 240), (x, 222), (x + 34, 240), (x + 37, 280), (x + 26, 314), (x - 26, 314)]),
            (50, 46, 50), light, 14, rim, 0.6)  # fmt: skip
    c.solid(curve([(x - 27, 288), (x + 27, 288), (x + 22, 318), (x, 328), (x - 22, 318)]), (30, 28, 32), light, 7, rim)
    for side in (-1, 1):
        c.solid(oval(x + side * 15, 274, 13.5, 12.5), (20, 18, 24), light, 4)
        c.fill(oval(x + side * 15, 274, 10.5, 9.5), (214, 112, 40))
        c.fill(oval(x + side * 15 + 3, 270, 4, 3.2), (255, 232, 178), 0.95)
        c.solid(oval(x + side * 25, 314, 11.5, 11.5), (66, 60, 58), light, 5, rim)
        c.fill(oval(x + side * 25, 314, 5.5, 5.5), (24, 21, 24))
    c.solid(box(x + 8, 214, x + 30, 230), (32, 29, 34), light, 4, rim)
    c.fill(oval(x + 21, 222, 4.6, 4.6), (255, 150, 80))
    c.line([(x - 32, 268), (x - 44, 262), (x - 46, 214)], (30, 26, 30), 3)


def _foreground(c: Canvas) -> None:
    for points in (
        [(-20, 740), (-20, 610), (60, 640), (96, 600), (170, 668), (250, 690), (330, 740)],
        [(1300, 740), (1300, 590), (1236, 622), (1200, 596), (1120, 664), (1010, 700), (900, 740)],
    ):
        c.fill(points, (22, 13, 18), 0.97, 3.5)
    c.line([(1150, 690), (1214, 520), (1240, 512)], (22, 13, 18), 9, 0.96, 3)
    c.line([(66, 660), (40, 540)], (22, 13, 18), 8, 0.96, 3)
    for _ in range(120):
        x, y, s = c.rng.random() * 1280, 120 + c.rng.random() * 560, 0.8 + c.rng.random() ** 3 * 4
        c.fill(oval(x, y, s, s), (255, 214, 150), 0.12 + 0.3 * c.rng.random(), s * 0.5)
