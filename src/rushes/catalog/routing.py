"""Which engine gets a request: its model's routes, weighed against how things stand now. Nothing is read here.

Local slots take what they can by themselves (:func:`may_claim` says of which models); :func:`decide` says whether a
remote takes a request away from them, and, for people, why or why not.
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from rushes.catalog.model import Model
from rushes.catalog.routes import (
    ANY_LOCAL,
    DRAFT,
    RemoteView,
    Route,
    allows,
    is_local,
    parse_hours,
    remotes_of,
    within,
)

_CENT: Final = 0.01
_ROUNDING_USD: Final = 1e-9
"""What sums of costs may be off by."""
_TAKEN_SECONDS: Final = 5.0
"""Within which a slot takes what waits for it."""
_MINUTE: Final = 60
_LONGEST_IN_SECONDS: Final = 120
_LONGEST_IN_MINUTES: Final = 120 * 60


class Outlook(msgspec.Struct, frozen=True):
    """How things stand for one model."""

    engines: tuple[str, ...]
    """Local engines with live slots that serve it, without the draft one."""
    slots: int
    """Of these engines."""
    draft_slots: int
    waiting: int
    """Requests that wait for these slots, also for other models."""
    seconds: float | None
    """Mean time of one request there; None while none has run."""
    busy: float
    """Seconds of work that is left in the slots, all together."""
    remotes: tuple[RemoteView, ...]
    """Of all live workers, each name once. ``capacity`` is what is free of it."""
    model: str = ""
    """Its id: remotes that do not serve it count as none. Empty: all of them serve it."""
    free: int = 0
    """How many of ``slots`` have nothing to do."""

    def eta(self, position: int, waited: float = 0.0, idle_for: float = 0.0) -> float | None:
        """Seconds until the request at this place (1 is the next) begins in a slot; None where there are none. Where
        nobody knows how long one takes, how long it has ``waited`` is all that is known; and where slots that have
        nothing to do leave it waiting (their engine does not start), how long they do.
        """
        if not self.slots:
            return None
        stalled = idle_for if self.free and idle_for > _TAKEN_SECONDS else 0.0
        if position <= self.free:
            return stalled
        if self.seconds is None:
            return max(waited, stalled)
        return max(stalled, (self.busy + (position - 1) * self.seconds) / self.slots)


class Case(msgspec.Struct, frozen=True):
    """The request, as far as routes ask for it."""

    account: str
    position: int
    """Its place in the line for local slots; 1 is the next."""
    waited: float
    """Seconds, by the clock of whoever decides: since it was first seen waiting."""
    minute: int
    """Of the local day."""
    costs: Mapping[str, float | None]
    """USD at each remote, by its name; None, or no entry, where that is not known."""
    budget_left: float | None
    """USD that are left of the day's budget; None without one."""
    key_budget_left: float | None
    idle_for: float = 0.0
    """Seconds for which a slot has had nothing to do and yet has not taken it; 0 where nobody has watched."""


class Verdict(msgspec.Struct, frozen=True):
    """What comes of one route."""

    engine: str
    """As in the route."""
    remote: str | None
    """The remote's name; None for a local engine, and where no remote will do."""
    takes: bool
    why: str
    """One short sentence for people."""


def decide(routes: Sequence[Route], outlook: Outlook, case: Case) -> list[Verdict]:
    """What comes of each route, in their order; at most one takes the request.

    A remote takes it where all conditions of its route hold, and either no local engine before it could, or that
    would not begin within ``queue_eta_above``. Where no remote does, the first local engine that is there has it.
    """
    verdicts: list[Verdict] = []
    taken = ""
    before: list[Route] = []
    """Local engines that could take it, in their order."""
    for route in routes:
        if taken:
            verdict = Verdict(route.engine, None, takes=False, why=f"{taken} takes it")
        elif is_local(route.engine):
            verdict = _local(route, outlook, case, before)
            if _is_there(route, outlook):
                before.append(route)
        else:
            verdict = _remote(route, outlook, case, before)
            taken = verdict.remote or "" if verdict.takes else ""
        verdicts.append(verdict)
    if before and not taken:
        first = routes.index(before[0])
        verdicts[first] = msgspec.structs.replace(verdicts[first], takes=True)
    return verdicts


def may_leave(routes: Sequence[Route], outlook: Outlook) -> bool:
    """Whether any request for the model could go to a remote, the last one in the line for one: else none of them
    needs to be looked at.
    """
    forever = float("inf")
    idle_for = forever if outlook.free else 0.0
    last = Case("", outlook.waiting + 1, forever, 0, {}, None, None, idle_for=idle_for)
    before: list[Route] = []
    for route in routes:
        if is_local(route.engine):
            if _is_there(route, outlook):
                before.append(route)
        elif remotes_of(route.engine, _serving(outlook)) and not any(_early(route, outlook, last, before)):
            return True
    return False


def may_claim(engine: str, model: Model, others: Collection[str], remotes: Collection[str]) -> bool:
    """Whether slots of the local ``engine`` may take requests for ``model``.

    ``others`` are the engines of all other live slots that serve it, ``remotes`` the names of the remotes that its
    routes lead to (:func:`rushes.catalog.routes.routed`). Draft pictures are made where the manifest asks for them,
    and where nothing else serves the model.
    """
    named = {route.engine for route in model.routes if is_local(route.engine)}

    def allowed(name: str) -> bool:
        return not model.routes or name in named or ANY_LOCAL in named

    if engine != DRAFT:
        return allowed(engine)
    return DRAFT in named or not (remotes or any(allowed(one) for one in others if one != DRAFT))


# -- local engines ----------------------------------------------------------------------------------------
def _is_there(route: Route, outlook: Outlook) -> bool:
    return outlook.draft_slots > 0 if route.engine == DRAFT else bool(_engines(route, outlook))


def _engines(route: Route, outlook: Outlook) -> tuple[str, ...]:
    """The engines with live slots that the route means."""
    if not outlook.slots:
        return ()
    return tuple(one for one in outlook.engines if route.engine in (one, ANY_LOCAL))


def _local(route: Route, outlook: Outlook, case: Case, before: Sequence[Route]) -> Verdict:
    """Of a local engine, as long as no remote takes the request away from it."""
    why = _slots(route, outlook, case)
    if before and _is_there(route, outlook):
        why = f"{why}; {before[0].engine} comes first"
    return Verdict(route.engine, None, takes=False, why=why)


def _slots(route: Route, outlook: Outlook, case: Case) -> str:
    if route.engine == DRAFT:
        count = outlook.draft_slots
        return f"{_count(count, 'slot')} for draft pictures" if count else "no live slot for draft pictures"
    engines = _engines(route, outlook)
    if not engines:
        what = "a local engine" if route.engine == ANY_LOCAL else route.engine
        return f"no live slot of {what} serves the model"
    line = f"{_count(outlook.slots, 'slot')} of {' and '.join(engines)}"
    if case.position <= outlook.free:
        return f"{line}, free now"
    when = (
        _wait([route], outlook, case) if outlook.seconds is not None else "nothing tells how long it takes yet"
    )
    return f"{line}, {outlook.waiting} waiting, {when}"


def _eta(before: Sequence[Route], outlook: Outlook, case: Case) -> float | None:
    """Seconds that the request would wait for these local engines; None where none of them is there."""
    if any(route.engine != DRAFT for route in before):
        return outlook.eta(case.position, case.waited, case.idle_for)
    return case.waited if before else None


def _wait(before: Sequence[Route], outlook: Outlook, case: Case) -> str:
    eta = _eta(before, outlook, case) or 0.0
    drafts = all(route.engine == DRAFT for route in before)
    if not drafts and outlook.free and case.idle_for > _TAKEN_SECONDS and eta == case.idle_for:
        return f"a slot has been free for {_duration(eta)} and has not taken it"
    if drafts or (outlook.seconds is None and case.position > outlook.free):
        return f"has waited {_duration(eta)}"
    return f"about {_duration(eta)}"


# -- remotes ----------------------------------------------------------------------------------------------
def _remote(route: Route, outlook: Outlook, case: Case, before: Sequence[Route]) -> Verdict:
    candidates = remotes_of(route.engine, _serving(outlook))
    if not candidates:
        return Verdict(route.engine, None, takes=False, why=f"no worker has {route.engine} for the model")
    against = [*_closed(route, case), *_early(route, outlook, case, before)]
    troubles = {one.name: list(_troubles(one, route, outlook, case)) for one in candidates}
    fit = next((name for name, found in troubles.items() if not found), None)
    if fit is None:
        against += [trouble for found in troubles.values() for trouble in found]
    if against:
        return Verdict(route.engine, fit, takes=False, why="; ".join(dict.fromkeys(against)))
    cost = case.costs.get(fit or "")
    price = "its price is not known" if cost is None else f"about {_usd(cost)}"
    return Verdict(route.engine, fit, takes=True, why=f"{_due(route, outlook, case, before)}; {price}")


def _serving(outlook: Outlook) -> list[RemoteView]:
    return [one for one in outlook.remotes if not outlook.model or outlook.model in one.models]


def _closed(route: Route, case: Case) -> Iterator[str]:
    """What of the request keeps it from the route, whatever the remote."""
    if not allows(route, case.account):
        yield f"not for the account {case.account}, only for {', '.join(route.accounts)}"
    if not within(route.hours, case.minute):
        start, end = parse_hours(route.hours)
        yield f"it is {_clock(case.minute)}, and it takes from {_clock(start)} to {_clock(end)}"


def _early(route: Route, outlook: Outlook, case: Case, before: Sequence[Route]) -> Iterator[str]:
    """Why a local engine keeps the request."""
    eta = _eta(before, outlook, case)
    if eta is None:
        return
    if route.queue_eta_above is None:
        yield f"only where {' or '.join(one.engine for one in before)} cannot take it"
    elif eta <= route.queue_eta_above:
        yield f"{_wait(before, outlook, case)}; it takes over above {_duration(route.queue_eta_above)}"


def _due(route: Route, outlook: Outlook, case: Case, before: Sequence[Route]) -> str:
    if _eta(before, outlook, case) is None:
        return "no local engine before it can take it"
    limit = _duration(route.queue_eta_above or 0.0)
    return f"{_wait(before, outlook, case)}, and it takes over above {limit}"


def _troubles(remote: RemoteView, route: Route, outlook: Outlook, case: Case) -> Iterator[str]:
    """Why this remote does not take the request now."""
    name, cost = remote.name, case.costs.get(remote.name)
    if remote.state != "ready":
        what = "asked for a pause" if remote.state == "held" else "is not tried"
        until = f" until {_time(remote.until)}" if remote.until is not None else ""
        yield f"{name} {what}{until}" + (f": {remote.why}" if remote.why else "")
    elif remote.capacity <= 0:
        yield f"{name} has as many as it may"
    if outlook.model in remote.unknown:
        yield f"{name} did not take the model: {remote.unknown[outlook.model]}"
    if route.max_cost_usd is not None and (cost is None or cost > route.max_cost_usd + _ROUNDING_USD):
        price = "its price is not known" if cost is None else f"it costs about {_usd(cost)}"
        yield f"{price} at {name}, and max_cost_usd is {_usd(route.max_cost_usd)}"
    for whose, left in (("day", case.budget_left), ("key", case.key_budget_left)):
        if left is None:
            continue
        if left <= 0:
            yield f"the {whose}'s budget is spent"
        elif cost is not None and cost > left + _ROUNDING_USD:
            yield f"it costs about {_usd(cost)} at {name}, and the {whose}'s budget has {_usd(left)} left"


# -- in words ---------------------------------------------------------------------------------------------
def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _duration(seconds: float) -> str:
    if seconds <= _LONGEST_IN_SECONDS:
        return f"{seconds:.0f} s"
    if seconds <= _LONGEST_IN_MINUTES:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _MINUTE / _MINUTE:.0f} h"


def _usd(amount: float) -> str:
    return f"${amount:.4f}" if 0 < abs(amount) < _CENT else f"${amount:.2f}"


def _clock(minute: int) -> str:
    return f"{minute // _MINUTE:02}:{minute % _MINUTE:02}"


def _time(moment: float) -> str:
    """The local time of a moment since the epoch."""
    return time.strftime("%H:%M:%S", time.localtime(moment))
