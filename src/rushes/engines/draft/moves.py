"""Which camera move a prompt asks for, in English film words; where it asks for none, the seed chooses.

Words count as whole words, and a direction must stand close behind its verb ("slowly dollies in", "the camera
dolly zooms out", "pan to the left"), so that a frying pan, a truck or a track remain things in the picture.
"""

import random
import re
from typing import Final

import msgspec


class Move(msgspec.Struct, frozen=True):
    """Amounts from -1 to 1, of one usual move each.

    ``depth`` in (+) or out (-); ``pan`` right (+) or left (-), on the spot; ``tilt`` up (+) or down (-);
    ``truck`` right (+) or left (-) and ``crane`` up (+) or down (-), travelling; ``orbit`` around the middle to
    the right (+) or left (-); ``roll`` clockwise (+); ``shake`` of a hand from 0.
    """

    depth: float = 0.0
    pan: float = 0.0
    tilt: float = 0.0
    truck: float = 0.0
    crane: float = 0.0
    orbit: float = 0.0
    roll: float = 0.0
    shake: float = 0.0


_GAP: Final = (
    r"(?:[\s,-]+(?:\w+ly|slow|to|the|a|bit|and|then|shot|move|movement|its?|from (?:the )?\w+ to))*[\s,-]+"
)
"""What may stand between a verb and its direction: "pans slowly to the left", "pan from right to left"."""
_ADVERB: Final = r"(?:\s+(?:\w+ly|then))?\s+"
_IN: Final = r"(?:in|inwards?|into|forwards?|closer|towards?|nearer|through)"
_OUT: Final = r"(?:out|outwards?|back|backwards?|away)"
_LEFT: Final = r"left(?:wards?)?"
_RIGHT: Final = r"right(?:wards?)?"
_UP: Final = r"up(?:wards?)?"
_DOWN: Final = r"down(?:wards?)?"
_CAMERA: Final = r"(?:camera|shot|lens|view)"
_DOLLY: Final = r"(?:doll(?:y|ies|ied|ying)|zoom(?:s|ed|ing)?|camera (?:\w+ly )?(?:push|pull)(?:es|s|ing)?)"
_GO: Final = r"(?:mov(?:es?|ing)|glid(?:es?|ing)|fl(?:y|ies|ying)|travels?|tracks?|drift(?:s|ing)?|creeps?)"
_PAN: Final = r"pan(?:s|n(?:ed|ing))?"
_TILT: Final = r"tilt(?:s|ed|ing)?"
_TRUCK: Final = r"(?:truck(?:ing)?|track(?:s|ing)?|camera (?:\w+ly )?(?:trucks|slides|moves|glides|drifts))"
_CRANE: Final = r"(?:cran(?:es?|ing)|boom(?:s|ing)?|pedestal(?:s|ling)?|camera (?:\w+ly )?(?:rises|moves))"
_ORBIT: Final = r"(?:orbit(?:s|ed|ing)?|circl(?:es?|ing)|revolv(?:es?|ing)|arc(?:s|ing)?)"


def _ways(axis: str, verb: str, plus: str, minus: str) -> list[tuple[str, str, float]]:
    """Patterns for "pan left" and "leftward pan", and the other way."""
    return [
        (axis, rf"\b{verb}{_GAP}{to}\b|\b{to}[\s-]{verb}\b", amount)
        for to, amount in ((plus, 1.0), (minus, -1.0))
    ]


_WORDS: Final[list[tuple[str, re.Pattern[str], float]]] = [
    (axis, re.compile(pattern), amount)
    for axis, pattern, amount in [
        *_ways("depth", _DOLLY, _IN, _OUT),
        ("depth", rf"\b{_CAMERA}{_ADVERB}{_GO}{_GAP}{_IN}\b|\bpush(?:es|ing)?-in\b|\bcloses in\b", 1.0),
        ("depth", rf"\b{_CAMERA}{_ADVERB}{_GO}{_GAP}{_OUT}\b|\bpull(?:s|ing)?-(?:back|out)\b", -1.0),
        ("depth", r"\bcamera (?:\w+ly )?(?:retreats|recedes)\b", -1.0),
        *_ways("pan", _PAN, _RIGHT, _LEFT),
        *_ways("tilt", _TILT, _UP, _DOWN),
        *_ways("truck", _TRUCK, _RIGHT, _LEFT),
        *_ways("crane", _CRANE, _UP, _DOWN),
        *_ways("orbit", _ORBIT, _RIGHT, _LEFT),
        ("roll", r"\b(?:barrel|camera|dutch) rolls?\b|\bdutch (?:tilt|angle)\b", 1.0),
        ("shake", r"\bhand-?\s?held\b|\bcamera shake\b|\bshaky\b", 1.0),
    ]
]
_EITHER: Final[list[tuple[str, re.Pattern[str]]]] = [
    (axis, re.compile(pattern))
    for axis, pattern in [
        ("depth", r"\b(?:dolly|zoom)(?:s|ing)?\b"),
        ("pan", rf"\bcamera{_ADVERB}{_PAN}\b|\bpan(?:ning)? shot\b|\b(?:slow|whip)[\s-]pan\b|\bpanning\b"),
        ("tilt", rf"\bcamera{_ADVERB}{_TILT}\b|\btilt(?:ing)? shot\b"),
        ("truck", r"\b(?:track|truck|follow|travell?)(?:ing)?[\s-]shot\b|\bcamera (?:tracks|follows)\b"),
        ("crane", r"\b(?:crane|jib|boom)[\s-]shot\b"),
        ("orbit", rf"\b{_CAMERA}{_ADVERB}{_ORBIT}\b|\borbit(?:s|al|ing)?\b|\barc shot\b|\brotat\w+ around\b"),
    ]
]
"""Words without a direction: the seed gives it (a dolly and a zoom go in)."""
_STATIC: Final = re.compile(
    r"\b(?:static|locked[\s-]off|fixed|stationary|motionless|still)[\s-](?:camera|shot|frame)\b|\btripod\b"
    r"|\bcamera (?:is|remains|stays|holds) (?:still|static|fixed|stationary)\b"
)
_SOFT: Final = re.compile(r"\b(?:slow(?:ly)?|slight(?:ly)?|subtl[ey]|gent(?:le|ly)|gradual(?:ly)?)\b")
_HARD: Final = re.compile(r"\b(?:fast|quick(?:ly)?|rapid(?:ly)?|whip|crash|dramatic(?:ally)?|sudden(?:ly)?)\b")
_NEAR: Final = 24
"""Characters around a camera word within which an adverb belongs to it."""


def read(prompt: str, chance: random.Random, *, orbit: bool = False) -> Move:
    """The move for ``prompt``. ``orbit`` adds half an orbit where none is named."""
    text = prompt.lower()
    if _STATIC.search(text):
        return Move()
    found: dict[str, tuple[int, float]] = {}
    for axis, pattern, amount in _WORDS:
        hit = pattern.search(text)
        if hit and (axis not in found or hit.start() < found[axis][0]):
            found[axis] = (hit.start(), amount * _strength(text, hit))
    for axis, pattern in _EITHER:
        hit = pattern.search(text)
        if hit and axis not in found:
            way = 1.0 if axis == "depth" else chance.choice((-1.0, 1.0))
            found[axis] = (hit.start(), way * _strength(text, hit))
    if not found.keys() - {"shake"}:
        for axis in chance.choice(_CHOICES):
            found[axis] = (0, chance.choice((-1.0, 1.0)))
    if orbit and "orbit" not in found:
        found["orbit"] = (0, chance.choice((-0.5, 0.5)))
    share = max(1, len(found.keys() - {"shake"})) ** -0.5
    return Move(**{axis: v if axis == "shake" else v * share for axis, (_, v) in found.items()})


_CHOICES: Final = (("depth",), ("depth", "pan"), ("depth", "orbit"), ("truck",), ("depth", "crane"))


def _strength(text: str, hit: re.Match[str]) -> float:
    around = text[max(0, hit.start() - _NEAR) : hit.end() + _NEAR]
    if _HARD.search(around):
        return 1.3
    return 0.8 if _SOFT.search(around) else 1.0
