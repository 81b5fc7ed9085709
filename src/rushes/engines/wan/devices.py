"""Which graphics card a slot takes, and where what is compiled for it is kept. Decided before torch is imported: the
variables are read once.
"""

import csv
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

import msgspec

from rushes import log
from rushes.errors import SettingsError

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
COMPILED: Final = "TORCHINDUCTOR_CACHE_DIR"
_QUERY: Final = ("uuid", "name", "memory.total", "compute_cap")
_NVIDIA_SECONDS: Final = 30.0
"""nvidia-smi takes seconds where no driver stays loaded, and for ever where one hangs."""


class Card(msgspec.Struct, frozen=True):
    """A graphics card as ``nvidia-smi`` tells it."""

    uuid: str
    """By which CUDA finds it whatever order it counts in."""
    name: str
    memory: int | None
    """Bytes in all; None where the card has no memory of its own."""
    capability: tuple[int, int] | None
    """CUDA compute capability, (9, 0) for an H200; None where an old driver does not tell."""


def cards(environ: Mapping[str, str]) -> list[Card]:
    """The cards of this machine, whatever is visible; empty where there is no working driver."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            query, stdin=subprocess.DEVNULL, capture_output=True, timeout=_NVIDIA_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.event("cards not counted", error=str(error))
        return []
    rows = csv.reader(done.stdout.decode(errors="replace").splitlines(), skipinitialspace=True)
    return [_card(row) for row in rows if len(row) == len(_QUERY) and row[0].startswith("GPU-")]


def visible(environ: Mapping[str, str]) -> list[str]:
    """The cards that CUDA is to see, by uuid or as the operator has picked them in CUDA_VISIBLE_DEVICES."""
    return _visible(environ, [card.uuid for card in cards(environ)])


def choose(setting: str, slot: int, environ: MutableMapping[str, str], each: int = 1) -> str:
    """What torch is to compute on: ``cuda``, with only the cards of this slot (counted from 0) left visible in
    ``environ``, or ``cpu``. ``each`` is how many cards a slot has.

    ``setting`` is ``cuda``, ``cpu``, or ``auto``: the card where there is one. Cards that the operator has picked in
    CUDA_VISIBLE_DEVICES are the only ones. Raises SettingsError where there are fewer than slots need: two models on
    one card would only push each other out.
    """
    if setting == "cpu":
        return "cpu"
    found = [card.uuid for card in cards(environ)]
    seen = _visible(environ, found)
    if setting == "auto" and (not found or not seen):
        return "cpu"
    if not seen:
        why = "no card is visible" if VISIBLE in environ else "nvidia-smi tells of no card"
        raise SettingsError(f"wan_device: it is `cuda`, but {why}. Mend the driver, or set it to `auto`.")
    many = "one card is" if len(seen) == 1 else f"{len(seen)} cards are"
    if len(seen) < each:
        raise SettingsError(
            f"wan_cards: {many} visible, and a slot is to have {each}. Set RUSHES_WAN_CARDS to 1."
        )
    own = seen[slot * each : (slot + 1) * each]
    if len(own) < each:
        finds = "none" if not own else f"{len(own)} of its {each}"
        raise SettingsError(
            f"workers: {many} visible, and slot {slot + 1} finds {finds}. "
            f"Set RUSHES_WORKERS to {len(seen) // each}."
        )
    environ[VISIBLE] = ",".join(own)
    return "cuda"


def keep_compiled(folder: Path, environ: MutableMapping[str, str]) -> None:
    """Have torch keep in ``folder`` what it compiles for a card, so that the next process need not compile it again;
    where ``environ`` names a folder already, in that. Without either it is the system's folder for temporary files.

    To be called before torch is imported. What lies there is loaded and run: the folder is made for this user alone.
    Several processes may share one. Raises OSError where it cannot be made.
    """
    if environ.get(COMPILED):
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    environ[COMPILED] = str(folder.absolute())


def _visible(environ: Mapping[str, str], found: list[str]) -> list[str]:
    """As CUDA reads its variable: the list ends at the first entry that cannot be."""
    if VISIBLE not in environ:
        return found
    visible = []
    for entry in (part.strip() for part in environ[VISIBLE].split(",")):
        if not entry or entry.startswith("-"):
            break
        visible.append(entry)
    return visible


def _card(row: list[str]) -> Card:
    uuid, name, mebibytes, capability = row
    major, _, minor = capability.partition(".")
    return Card(
        uuid=uuid,
        name=name,
        memory=int(mebibytes) * 2**20 if mebibytes.isdecimal() else None,
        capability=(int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None,
    )
