"""The known name that a mistyped one probably meant."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

_LONGEST: Final = 100
"""Characters; nobody mistypes a longer name, and comparing costs its square."""


def nearest(name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str | None:
    """The nearest of ``known``, or None where none is near.

    ``aliases`` maps other words for a known name (its title, its role; lower-case) to it; one that is met
    exactly wins over a name that is only similar.
    """
    if len(name) > _LONGEST:
        return None
    word = name.lower().replace("_", " ").strip()
    if aliases and word in aliases:
        return aliases[word]
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return lowered[close[0]]
    close = difflib.get_close_matches(word, aliases or (), n=1, cutoff=0.75)
    return aliases[close[0]] if aliases and close else None


def did_you_mean(name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """The end of an error message: the nearest name, or all of them."""
    names = list(known)
    guess = nearest(name, names, aliases)
    return f"did you mean {guess}?" if guess else f"known are {', '.join(names)}"
