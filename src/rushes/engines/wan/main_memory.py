"""How much main memory this process can still take: a process that takes more than there is gets killed without a
word. Imports no torch.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from rushes import log
from rushes.errors import EngineError

_ROOT: Final = Path("/")


class _Group(NamedTuple):
    """The files of one version of Linux's control groups, in the folder of a group."""

    mounted: str
    limit: str
    used: str
    cached: tuple[str, ...]
    """Keys in ``memory.stat``: pages of files, which count as used and are given up before anything is killed."""


_V2: Final = _Group(
    "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")
)
_V1: Final = _Group(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def available(root: Path = _ROOT) -> int | None:
    """Bytes: what Linux estimates can be taken without swapping, or what a container or a service may still take
    where that is less; None elsewhere. ``root`` is where ``proc`` and ``sys`` are.
    """
    estimate = _fields(root / "proc/meminfo").get("MemAvailable")
    free = [] if estimate is None else [estimate * 1024]  # "kB" there means KiB
    return min([*free, *_left_in_groups(root)], default=None)


def check(bytes_: int) -> int | None:
    """Bytes available, where the system tells. Raises EngineError ``out_of_memory`` where they are fewer."""
    there = available()
    if there is not None and there < bytes_:
        log.event("main memory is too small", needed=bytes_, available=there)
        text = (
            f"The weights need {bytes_ / 2**30:.0f} GiB of main memory besides the card's, and there are "
            f"{there / 2**30:.0f} GiB."
        )
        raise EngineError("out_of_memory", text, replace=True)
    return there


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left to each group that this process is in: its own and those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            kind = _V2
        elif "memory" in controllers.split(","):
            kind = _V1
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        # In a container the path may be the host's, which is not here: what is mounted is then the group itself.
        for group in (own, *own.parents):
            left = _left(root / kind.mounted / group, kind)
            if left is not None:
                yield left


def _left(group: Path, kind: _Group) -> int | None:
    limit, used = _number(group / kind.limit), _number(group / kind.used)
    if limit is None or used is None:
        return None
    stat = _fields(group / "memory.stat")
    return max(0, limit - used + sum(stat.get(key, 0) for key in kind.cached))


def _number(file: Path) -> int | None:
    """None where the file is not there, or says ``max``."""
    try:
        text = file.read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _fields(file: Path) -> Mapping[str, int]:
    """Of lines of a name, a colon or none, and a number."""
    try:
        lines = file.read_text("ascii").splitlines()
    except OSError:
        return {}
    words = (line.replace(":", " ").split() for line in lines)
    return {found[0]: int(found[1]) for found in words if len(found) > 1 and found[1].isdecimal()}
