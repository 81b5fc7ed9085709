"""Which tasks at remotes a worker may take up: what the stores match by. Pure."""

from collections.abc import Sequence
from typing import Final

from rushes.requests.record import RemoteTask

ANYBODYS: Final = ""
"""Of a task that is being handed over: nobody can poll it, so whoever comes first says what is known of it."""
_SEPARATOR: Final = "\n"
"""Between name and place: in no remote's name, which is part of a variable's name, and in no origin."""


def address(name: str, place: str) -> str:
    """One remote at one place, as the column ``remote`` has it. The name is what stands before the separator."""
    return f"{name}{_SEPARATOR}{place}"


def address_of(task: RemoteTask) -> str:
    return ANYBODYS if task.phase == "submitting" else address(task.remote, task.place)


def addresses(remotes: Sequence[tuple[str, str]]) -> list[str]:
    """Of all tasks that a worker with these remotes, as ``(name, place)``, may take up."""
    return [ANYBODYS, *(address(name, place) for name, place in remotes)]
