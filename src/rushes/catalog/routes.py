"""Which engines may run a model, in which order and under which conditions: ``[[routes]]`` of its manifest.

A route to a local engine has no conditions: slots take what they can at once. A route to a remote is taken where all
of its conditions hold; :mod:`rushes.catalog.routing` decides. `docs/models.md` is the reference of the keys.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

if TYPE_CHECKING:
    from rushes.catalog.model import Model

ANY_LOCAL: Final = "local"
"""The name of every local engine that makes the model itself."""
DRAFT: Final = "draft"
LOCAL: Final = (ANY_LOCAL, DRAFT, "comfyui", "wan")
"""Local engines that a route may name, besides ``module:factory``, one of the operator's own."""
_NOOP: Final = "noop"
"""A local engine for tests."""
DAY_MINUTES: Final = 24 * 60

_NAME: Final = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_OWN_ENGINE: Final = re.compile(r"[\w.]+:\w+")
_HOURS: Final = re.compile(r"\s*([0-9]{1,2}):([0-9]{2})\s*-\s*([0-9]{1,2}):([0-9]{2})\s*")
_MINUTES: Final = 60
_CONDITIONS: Final = ("queue_eta_above", "accounts", "max_cost_usd", "hours")


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine that may run a model, and when."""

    engine: str
    """``local`` (every local engine but the draft one), a local engine's name, or a remote's name or kind."""
    queue_eta_above: float | None = None
    """Seconds. It takes a request only where that would wait longer for the local engines before it."""
    accounts: tuple[str, ...] = ()
    """Patterns of the accounts that may use it; empty for all."""
    max_cost_usd: float | None = None
    """Of one request, by the price in the manifest; an unknown price never fits."""
    hours: str = ""
    """Of the worker's local time, such as ``20:00-06:00``; the end is not included. Empty for the whole day."""


class RemoteView(Protocol):
    """What is known of a remote engine here: the fields of :class:`rushes.requests.record.RemoteState`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def models(self) -> tuple[str, ...]: ...
    @property
    def capacity(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def until(self) -> float | None: ...
    @property
    def why(self) -> str: ...
    @property
    def unknown(self) -> Mapping[str, str]: ...


def is_local(engine: str) -> bool:
    """Whether a route's engine is one that runs in slots."""
    return engine in (*LOCAL, _NOOP) or bool(_OWN_ENGINE.fullmatch(engine))


def remotes_of(engine: str, remotes: Iterable[RemoteView]) -> tuple[RemoteView, ...]:
    """The remotes that a route's engine means: the one of this name, else all of this kind, in their order."""
    known = tuple(remotes)
    return tuple(one for one in known if one.name == engine) or tuple(
        one for one in known if one.kind == engine
    )


def routed(routes: Sequence[Route], remotes: Iterable[RemoteView]) -> tuple[RemoteView, ...]:
    """The remotes that ``routes`` lead to, each once."""
    known = tuple(remotes)
    found = {
        one.name: one
        for route in routes
        if not is_local(route.engine)
        for one in remotes_of(route.engine, known)
    }
    return tuple(found.values())


def effective_routes(
    model: "Model", remotes: Sequence[RemoteView], overflow_seconds: float
) -> tuple[Route, ...]:
    """The manifest's routes; without any, local engines, and then every one of ``remotes`` that serves the model:
    where a request would wait longer than ``overflow_seconds``, or, with 0, where no local engine serves it.

    Draft pictures come last, and only where no remote serves the model: they are for trying things out.
    """
    serving = [one for one in remotes if model.id in one.models]
    routes = model.routes or (
        Route(ANY_LOCAL),
        *(Route(one.name, queue_eta_above=overflow_seconds or None) for one in serving),
    )
    asked = any(route.engine == DRAFT for route in routes)
    return routes if asked or routed(routes, serving) else (*routes, Route(DRAFT))


def allows(route: Route, account: str) -> bool:
    """Whether ``account`` may use the route."""
    return not route.accounts or any(fnmatchcase(account, pattern) for pattern in route.accounts)


def within(hours: str, minute: int) -> bool:
    """Whether ``minute`` of the day lies in ``hours``. Raises ValueError where they are none."""
    if not hours:
        return True
    start, end = parse_hours(hours)
    return start <= minute < end if start < end else minute >= start or minute < end


def parse_hours(text: str) -> tuple[int, int]:
    """The first minute of the day and the one after the last. Raises ValueError with the fix."""
    match = _HOURS.fullmatch(text)
    if not match:
        raise ValueError(f'{text!r} are no hours: write them as in "20:00-06:00"')
    first, last = ((int(match[at]), int(match[at + 1])) for at in (1, 3))
    start, end = (hour * _MINUTES + minute for hour, minute in (first, last))
    if max(start, end) > DAY_MINUTES or max(first[1], last[1]) >= _MINUTES:
        raise ValueError(f"{text!r} are no hours: a day has 00:00 to 24:00")
    if start % DAY_MINUTES == end % DAY_MINUTES:
        raise ValueError("begins and ends at the same time; leave it out for the whole day")
    return start, end


def problems(routes: Sequence[Route]) -> Iterator[tuple[str, str]]:
    """What is wrong with a manifest's routes: the key and the fix."""
    remote = ""
    for index, route in enumerate(routes):
        key = f"routes[{index}]"
        if route in routes[:index]:
            yield key, f"the same route to {route.engine} stands here twice; take one out"
        if is_local(route.engine):
            yield from _local_problems(route, key, remote)
            continue
        remote = remote or route.engine
        if not _NAME.fullmatch(route.engine):
            yield (
                f"{key}.engine",
                f"{route.engine!r} is no engine: write {', '.join(LOCAL)}, or the name or kind of a remote",
            )
        yield from _condition_problems(route, key)


def _local_problems(route: Route, key: str, remote: str) -> Iterator[tuple[str, str]]:
    plain = Route(route.engine)
    for name in _CONDITIONS:
        if getattr(route, name) != getattr(plain, name):
            why = f"{route.engine} runs here, and its slots take what they can at once"
            yield f"{key}.{name}", f"{why}: conditions are for remotes; take it out"
    if remote:
        yield key, f"{route.engine} stands behind the remote {remote}: put local engines before remotes"


def _condition_problems(route: Route, key: str) -> Iterator[tuple[str, str]]:
    for name, unit in (("queue_eta_above", "seconds"), ("max_cost_usd", "US dollars")):
        value = getattr(route, name)
        if value is not None and not 0 <= value < float("inf"):
            yield f"{key}.{name}", f"must be a number of {unit}, 0 or more"
    if not all(pattern.strip() for pattern in route.accounts):
        yield f"{key}.accounts", "a pattern is empty; take it out"
    if route.hours:
        try:
            parse_hours(route.hours)
        except ValueError as error:
            yield f"{key}.hours", str(error)
