"""Fonts that can write a text. Pillow's own font writes Latin; for the rest, what the machine happens to have.

Nothing here fails for want of a font: a character that no font has is written in ASCII where that reads the
same, and else as an empty box.
"""

import functools
import unicodedata
from pathlib import Path
from typing import Final

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_FOLDERS: Final = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
_PREFERRED: Final = [
    "NotoSans-Regular",
    "NotoSans[",
    "DejaVuSans.",
    "LiberationSans-Regular",
    "segoeui.",
    "HelveticaNeue",
    "arial.",
    "Arial.",
    "FreeSans.",
    "NotoSansCJK-Regular",
    "NotoSansJP",
    "NotoSansSC",
    "NotoSansTC",
    "NotoSansKR",
    "SourceHanSans",
    "ipaexg",
    "ipag",
    "fonts-japanese-gothic",
    "TakaoGothic",
    "VL-Gothic",
    "wqy-",
    "DroidSansFallback",
    "Hiragino",
    "PingFang",
    "AppleSDGothicNeo",
    "YuGoth",
    "meiryo",
    "msgothic",
    "msyh",
    "malgun",
    "NotoSansArabic",
    "NotoSansHebrew",
    "NotoSansDevanagari",
    "NotoSansThai",
    "NotoSans",
    "ArialUni",
    "arialuni",
    "seguisym",
    "NotoEmoji",
    "unifont",
]
"""How file names begin, best first; what matches none of them comes after, by name."""
_MOST_FILES: Final = 400
_PROBE: Final = 24
_NO_CHARACTER: Final = "\U0010ffff"
"""A code point that will never be a character: every font draws its sign for "missing"."""
_PLAIN: Final = {
    "ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L",
    "\u2013": "-", "\u2014": "-", "\u2018": "'", "\u2019": "'", "\u201a": ",", "\u201c": '"', "\u201d": '"',
    "\u201e": '"', "«": '"', "»": '"', "\u2022": "-", "\u00d7": "x", "\u2212": "-",
}  # fmt: skip
"""What reads the same, beside what Unicode itself takes apart."""
_NEUTRAL: Final = frozenset({"Mn", "Me", "Cf", "Zs"})
"""Categories of characters that are drawn in the font of their neighbour, or not at all."""


def base(text: str) -> int:
    """The number of the font that has most of the characters of ``text``: one hand for as much as possible."""
    wanted = {c for c in text if unicodedata.category(c) not in _NEUTRAL}
    lacking = [c for c in wanted if not _has(0, c)]
    if not lacking:
        return 0
    counts: dict[int, int] = {0: len(wanted) - len(lacking)}
    for number in sorted({writer(c) for c in lacking}):
        counts[number] = sum(_has(number, c) for c in wanted)
    return max(counts, key=lambda number: (counts[number], -number))


def runs(text: str, first: int = 0) -> list[tuple[str, int]]:
    """``text`` in pieces, each with the number of the font that writes it: ``first`` where that one can."""
    pieces: list[tuple[str, int]] = []
    for character in unicodedata.normalize("NFC", text):
        if unicodedata.category(character) in _NEUTRAL and pieces:
            pieces[-1] = (pieces[-1][0] + character, pieces[-1][1])
            continue
        number = first if _has(first, character) else writer(character)
        drawn = character if _has(number, character) else _plain(character)
        if pieces and pieces[-1][1] == number:
            pieces[-1] = (pieces[-1][0] + drawn, number)
        else:
            pieces.append((drawn, number))
    return pieces


def _plain(character: str) -> str:
    """ASCII for a character that no font has, where there is some: "e" for "é"; else the character itself."""
    if character in _PLAIN:
        return _PLAIN[character]
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return letters if letters.isprintable() and letters else character


@functools.lru_cache(maxsize=8192)
def writer(character: str) -> int:
    """The number of the first font that has ``character``; 0, Pillow's own, also where none has it."""
    if _has(0, character):
        return 0
    return next((n for n in range(1, len(_files()) + 1) if _has(n, character)), 0)


@functools.lru_cache(maxsize=256)
def font(number: int, size: int) -> Font:
    """Font ``number`` at ``size`` pixels: 0 is Pillow's own."""
    if number == 0:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(_files()[number - 1]), size)


@functools.cache
def _files() -> tuple[Path, ...]:
    """The font files of this machine, in the order in which they are asked for a character."""
    found: set[Path] = set()
    for folder in _FOLDERS:
        root = Path(folder).expanduser()
        if root.is_dir():
            found.update(p for p in root.rglob("*") if p.suffix.lower() in {".ttf", ".otf", ".ttc"})
    return tuple(sorted(found, key=_rank)[:_MOST_FILES])


def _rank(path: Path) -> tuple[int, str, str]:
    name = path.name
    place = next((i for i, start in enumerate(_PREFERRED) if name.startswith(start)), len(_PREFERRED))
    return place, name, str(path)


@functools.lru_cache(maxsize=64)
def _missing(number: int) -> bytes | None:
    """How font ``number`` draws a character that it lacks; None where the font cannot be used at all."""
    try:
        return _drawn(number, _NO_CHARACTER)
    except (OSError, ValueError):  # a bitmap font of fixed size, a damaged file
        return None


@functools.lru_cache(maxsize=16384)
def _has(number: int, character: str) -> bool:
    missing = _missing(number)
    if missing is None:
        return False
    try:
        return _drawn(number, character) != missing
    except (OSError, ValueError):
        return False


def _drawn(number: int, character: str) -> bytes:
    mask = font(number, _PROBE).getmask(character, mode="L")
    return bytes(mask) + repr(mask.size).encode()


def right_to_left(text: str) -> bool:
    """Whether the first letter with a direction runs to the left, as in Arabic and Hebrew."""
    for character in text:
        direction = unicodedata.bidirectional(character)
        if direction in {"R", "AL"}:
            return True
        if direction == "L":
            return False
    return False
