"""A puppy at play in a meadow: two moments of one scene, alike enough to be moved from one into the other."""

# ruff: noqa: E501
# fmt: off

import math
from dataclasses import dataclass

import numpy as np

from sample_art.canvas import Array, Canvas, Points, curve, oval

FUR, CREAM, DEEP, RIM = (222, 154, 84), (250, 226, 188), (160, 92, 48), (255, 232, 176)
LIGHT = (0.8, -1.0)


@dataclass(frozen=True)
class Pose:
    """Offsets in pixels, angles in degrees; ``mouth`` and ``paw`` from 0 to 1."""

    body: float = 0.0
    head: tuple[float, float] = (0.0, 0.0)
    tilt: float = 0.0
    ears: float = 0.0
    mouth: float = 0.15
    paw: float = 0.0
    tail: float = 0.0
    ball: tuple[float, float] = (690.0, 806.0)


def puppy_sitting() -> Array:
    return _scene(Pose())


def puppy_barking() -> Array:
    return _scene(Pose(body=-14, head=(-18, -22), tilt=-8, ears=0.8, mouth=1.0, paw=0.7, tail=20, ball=(716.0, 776.0)))


def _scene(pose: Pose) -> Array:
    c = Canvas(960, 960, 1259)
    c.sky([(0, (92, 168, 218)), (0.35, (160, 208, 226)), (0.56, (244, 234, 200)), (1, (244, 234, 200))])
    c.glow(760, 150, 380, (255, 226, 150), 0.15)
    for x, y, r in ((170, 140, 54), (236, 118, 70), (312, 146, 56), (620, 220, 36), (672, 206, 50), (730, 224, 38)):
        c.fill(oval(x, y, r * 1.35, r * 0.72), (255, 255, 252), 0.72, 9)
    for base, colour, size in ((470, (142, 180, 150), 60), (510, (106, 160, 110), 84)):
        x = -40.0
        while x < 1000:
            r = size * (0.6 + 0.8 * c.rng.random())
            c.fill(oval(x, base + 10 - r * 0.2, r, r * 0.9), colour, 0.9, 7)
            x += r * 0.9
        c.fill([(-20, base), (980, base), (980, 980), (-20, 980)], colour, 0.95, 8)
    _meadow(c)
    for _ in range(18):
        x, y, r = c.rng.random() * 960, 250 + c.rng.random() * 300, 8 + c.rng.random() ** 2 * 30
        c.fill(oval(x, y, r, r), (255, 248, 196), 0.10 + 0.14 * c.rng.random(), 1.2)
    c.fill(oval(452 + pose.body, 852, 250, 40), (40, 84, 38), 0.55, 12)
    _body(c, pose)
    _head(c, 452 + pose.body + pose.head[0], 418 + pose.head[1], pose)
    _ball(c, *pose.ball)
    _foreground(c)
    c.glow(760, 120, 640, (255, 214, 130), 0.07)
    return c.finish(0.30)


def _meadow(c: Canvas) -> None:
    top = 560 + 12 * np.sin(c.x / 140)
    inside = np.clip((c.y - top) / 10, 0, 1)
    depth = np.clip((c.y - 560) / 400, 0, 1)
    far, near = np.array((162, 202, 96), np.float32), np.array((64, 132, 62), np.float32)
    colour = far + (near - far) * (depth + 0 * c.x)[..., None]
    colour = colour * (0.86 + 0.28 * c.noise(8, 14, 5))[..., None]
    c.px += (colour - c.px) * inside[..., None]
    for _ in range(1500):
        z = c.rng.random()
        x, y = c.rng.random() * 960, 572 + 380 * z
        tall, lean, tone = 8 + 30 * z, (c.rng.random() - 0.5) * 16, 0.75 + 0.5 * c.rng.random()
        green = (110 * tone - 30 * z, 170 * tone - 26 * z, 74 * tone - 14 * z)
        c.line([(x, y), (x + lean * 0.3, y - tall * 0.6), (x + lean, y - tall)], green, 1 + 1.6 * z, 0.8)
    for _ in range(46):
        z = c.rng.random()
        _daisy(c, c.rng.random() * 960, 590 + 350 * z, 3 + 7 * z)


def _daisy(c: Canvas, x: float, y: float, r: float) -> None:
    for n in range(7):
        a = math.tau * n / 7 + 0.3
        c.fill(oval(x + r * math.cos(a), y + r * 0.7 * math.sin(a), r * 0.62, r * 0.42, math.degrees(a)), (255, 252, 244), 0.95)
    c.fill(oval(x, y, r * 0.5, r * 0.4), (250, 196, 52))


def _body(c: Canvas, pose: Pose) -> None:
    x = 452 + pose.body
    a = math.radians(-34 - pose.tail)
    tip = (x + 168 + 150 * math.cos(a), 740 + 150 * math.sin(a))
    middle = (x + 178 + 80 * math.cos(a + 0.5), 742 + 80 * math.sin(a + 0.5))
    tail = curve([(x + 130, 760), (middle[0] - 10, middle[1] - 24), (tip[0] - 14, tip[1] - 10), (tip[0] + 8, tip[1] + 2), (middle[0] + 22, middle[1] + 20), (x + 140, 812)])
    c.solid(tail, FUR, LIGHT, 14, RIM, 0.4, 0.05)
    c.fill(oval(tip[0] - 8, tip[1] + 6, 17, 14, math.degrees(a)), CREAM, 0.8, 5)
    for side in (-1, 1):  # haunches
        c.solid(oval(x + side * 122, 776, 88, 82, side * 12), FUR, LIGHT, 24, RIM, 0.45, 0.05)
        c.solid(curve([(x + side * 92, 826), (x + side * 150, 812), (x + side * 196, 836), (x + side * 190, 868), (x + side * 110, 870)]), CREAM, LIGHT, 10, RIM, 0.4)
    torso = curve([(x - 104, 560), (x - 146, 680), (x - 136, 800), (x - 60, 850), (x + 60, 850), (x + 136, 800), (x + 146, 680), (x + 104, 560), (x, 520)])
    c.solid(torso, FUR, LIGHT, 38, RIM, 0.4, 0.05)
    c.fill(curve([(x - 66, 560), (x - 84, 660), (x - 60, 760), (x, 800), (x + 60, 760), (x + 84, 660), (x + 66, 560)]), CREAM, 0.9, 12)
    _strokes(c, [(x + (n % 7 - 3) * 22, 600 + (n // 7) * 40) for n in range(35)], (226, 190, 142), 14)
    for side in (-1, 1):
        lift = pose.paw if side > 0 else 0.0
        hip, foot = (x + side * 58, 676.0), (x + side * 62 + 96 * lift, 846 - 118 * lift)
        knee = (x + side * 70 + 42 * lift, 770 - 20 * lift)
        leg: Points = curve([(hip[0] - 36, hip[1]), (knee[0] - 35, knee[1]), (foot[0] - 34, foot[1]), (foot[0] + 34, foot[1] - 4 * lift), (knee[0] + 35, knee[1] - 8 * lift), (hip[0] + 36, hip[1])])
        c.solid(leg, (230, 166, 98), LIGHT, 16, RIM, 0.42, 0.05)
        c.solid(oval(foot[0], foot[1] + 4, 48, 32, -20 * lift), CREAM, LIGHT, 11, RIM, 0.4)
        for toe in (-16, 16):
            c.line([(foot[0] + toe, foot[1] + 8), (foot[0] + toe * 1.05, foot[1] + 28)], (196, 150, 110), 3.4, 0.9)
    collar = curve([(x - 98, 566), (x, 606), (x + 98, 566), (x + 94, 596), (x, 638), (x - 94, 596)])
    c.solid(collar, (206, 58, 52), LIGHT, 8, (255, 150, 120), 0.5)
    c.solid(oval(x + 2, 646, 18, 18), (248, 198, 70), LIGHT, 6, (255, 244, 190), 0.6)


def _strokes(c: Canvas, places: Points, colour: tuple[float, float, float], size: float) -> None:
    for x, y in places:
        lean = (c.rng.random() - 0.5) * size
        c.line(curve([(x, y), (x + lean * 0.4, y + size * 0.6), (x + lean, y + size)], False), colour, 3, 0.55)


def _head(c: Canvas, x: float, y: float, pose: Pose) -> None:
    cos, sin = math.cos(math.radians(pose.tilt)), math.sin(math.radians(pose.tilt))

    def at(points: Points) -> Points:
        return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in points]

    def ear(side: int) -> None:
        up = pose.ears * (70 if side < 0 else 96)
        out = pose.ears * 66
        shape = curve([(side * 96, -136), (side * 160, -128 - up * 0.4), (side * (206 + out), -20 - up), (side * (212 + out), 66 - up * 1.3),
                       (side * (170 + out * 0.8), 96 - up * 1.2), (side * 140, 20 - up * 0.3), (side * 112, -40)])
        c.solid(at(shape), DEEP, LIGHT, 20, (226, 164, 98), 0.5, 0.05)

    ear(-1)
    ear(1)
    drop = 44 * pose.mouth
    if pose.mouth > 0.5:  # the lower jaw opens under the muzzle
        c.solid(at(curve([(-66, 84), (66, 84), (54, 132 + drop), (0, 160 + drop), (-54, 132 + drop)])), (240, 210, 168), LIGHT, 12, RIM, 0.4)
    skull = curve([(-150, -30), (-138, -120), (-70, -176), (0, -186), (70, -176), (138, -120), (150, -30), (140, 56), (86, 122), (0, 142), (-86, 122), (-140, 56)])
    c.solid(at(skull), FUR, LIGHT, 40, RIM, 0.38, 0.05)
    c.fill(at(curve([(-26, -176), (0, -182), (26, -176), (24, -80), (44, 0), (0, 30), (-44, 0), (-24, -80)])), CREAM, 0.92, 8)
    for side in (-1, 1):
        c.fill(at(oval(side * 84, 52, 34, 30)), (244, 206, 158), 0.6, 10)
    if pose.mouth > 0.5:
        c.fill(at(curve([(-60, 74), (60, 74), (46, 118 + drop), (0, 142 + drop), (-46, 118 + drop)])), (96, 30, 36))
        c.fill(at(curve([(-34, 104 + drop * 0.4), (0, 92 + drop * 0.4), (34, 104 + drop * 0.4), (30, 128 + drop), (0, 140 + drop), (-30, 128 + drop)])), (240, 128, 132), 1, 0.6)
        c.line(at([(0, 104 + drop * 0.5), (0, 128 + drop)]), (206, 88, 98), 3, 0.8)
        for side in (-1, 1):
            c.fill(at([(side * 36, 80), (side * 46, 80), (side * 40, 98)]), (255, 252, 244))
    else:
        c.solid(at(curve([(-22, 96), (22, 96), (24, 134), (0, 152), (-24, 134)])), (240, 128, 132), LIGHT, 7, None, 0.4)
        c.line(at([(0, 104), (0, 136)]), (206, 88, 98), 3, 0.8)
    c.solid(at(curve([(-78, 40), (-52, 0), (0, -12), (52, 0), (78, 40), (66, 86), (28, 102), (0, 92), (-28, 102), (-66, 86)])), CREAM, LIGHT, 18, None, 0.36)
    c.line(at([(0, 40), (0, 88)]), (110, 66, 52), 4, 0.85)
    for side in (-1, 1):
        c.line(at(curve([(0, 88), (side * 26, 100), (side * 58, 84)], False)), (110, 66, 52), 4.4, 0.85)
        for n in range(3):
            c.fill(at(oval(side * (40 + 8 * (n % 2)), 52 + 12 * n, 2.6, 2.6)), (176, 124, 88), 0.8)
    c.solid(at(curve([(-36, 6), (0, -6), (36, 6), (26, 34), (0, 46), (-26, 34)])), (44, 32, 34), LIGHT, 9, None, 0.7)
    c.fill(at(oval(10, 8, 10, 5)), (220, 210, 210), 0.6, 2)
    for side in (-1, 1):
        c.fill(at(oval(side * 72, -40, 36, 38)), (170, 102, 58), 0.5, 7)
        c.fill(at(oval(side * 70, -38, 27, 30)), (40, 24, 22))
        c.fill(at(oval(side * 70, -28, 18, 15)), (112, 62, 34), 0.8, 4)
        c.fill(at(oval(side * 70, -38, 14, 16)), (16, 10, 12))
        c.fill(at(oval(side * 70 + 9, -50, 8.5, 9)), (255, 255, 250))
        c.fill(at(oval(side * 70 - 9, -26, 4, 4)), (255, 244, 226), 0.8)
        c.fill(at(oval(side * 66, -92 - 8 * pose.ears, 20, 8, side * 12)), (250, 214, 160), 0.75, 4)
    for _ in range(24):
        px, py = (c.rng.random() - 0.5) * 200, -160 + c.rng.random() * 60
        c.line(at([(px, py), (px * 1.04, py + 16)]), (196, 128, 66), 2.4, 0.4)


def _ball(c: Canvas, x: float, y: float) -> None:
    c.fill(oval(x, 868, 76 - (806 - y) * 0.3, 15), (34, 76, 36), 0.5, 7)
    c.solid(oval(x, y, 66, 66), (64, 142, 214), LIGHT, 24, (190, 228, 255), 0.6)
    inside = c.mask(oval(x, y, 66, 66))
    for shift in (-30, 30):
        arc = np.abs(np.hypot(c.x - (x + shift * 3.4), c.y - (y + 12)) - 88) < 7
        c.lay(np.asarray(arc * inside * 0.95), (255, 236, 120))
    c.fill(oval(x + 22, y - 28, 17, 11, -35), (255, 255, 255), 0.6, 5)


def _foreground(c: Canvas) -> None:
    for _ in range(190):
        x, tall, lean = c.rng.random() * 960, 30 + 74 * c.rng.random(), (c.rng.random() - 0.5) * 46
        tone = 0.6 + 0.5 * c.rng.random()
        blade = curve([(x - 4, 975), (x + lean * 0.4 - 2, 975 - tall * 0.6), (x + lean, 975 - tall), (x + lean * 0.4 + 4, 975 - tall * 0.55), (x + 5, 975)])
        c.fill(blade, (72 * tone, 144 * tone, 58 * tone), 0.95, 0.5)
    for x, y, r in ((92, 886, 15), (850, 912, 17), (250, 924, 12), (610, 930, 13)):
        _daisy(c, x, y, r)
