"""What `rushes models check` says of a model's routes and of its tables for remotes. Asks nobody."""

from collections.abc import Iterator, Mapping

from rushes.catalog.audit import Finding
from rushes.catalog.model import Model
from rushes.catalog.nearest import nearest
from rushes.catalog.remotes import KINDS, RemoteTable, remote_table
from rushes.catalog.routes import LOCAL, Route, is_local
from rushes.errors import ManifestError


def audit_remotes(model: Model, remotes: Mapping[str, str], *, budget: bool) -> Iterator[Finding]:
    """``remotes`` are those of the settings, by name, each with its kind; ``budget``: whether there is one a day."""
    for index, route in enumerate(model.routes):
        if not is_local(route.engine):
            yield from _route(model, route, f"routes[{index}]", remotes)
    if budget:
        yield from _unpriced(model, remotes)


def _route(model: Model, route: Route, where: str, remotes: Mapping[str, str]) -> Iterator[Finding]:
    name = route.engine
    kind = remotes.get(name, name)
    if kind not in KINDS:
        guess = nearest(name, (*LOCAL, *KINDS, *remotes))
        hint = f"; did you mean {guess}?" if guess else ""
        text = f"{name} is no kind of remote, and RUSHES_REMOTES names none so{hint}"
        yield Finding("note", model.id, where, "unknown_route", text, "name it there, or mend the route")
        return
    table = _table(model, kind)
    if table is None:
        text = f"leads nowhere: the manifest does not say how {kind} runs the model"
        yield Finding(
            "warning", model.id, where, "idle_route", text, f"add [engines.{kind}], or take the route out"
        )
    elif route.max_cost_usd is not None and table.price_usd is None:
        text = "is never taken: max_cost_usd asks for a price, and there is none"
        yield Finding("warning", model.id, where, "idle_route", text, f"set price_usd in [engines.{kind}]")


def _unpriced(model: Model, remotes: Mapping[str, str]) -> Iterator[Finding]:
    for kind in dict.fromkeys(remotes.values()):
        table = _table(model, kind)
        if table is not None and table.price_usd is None:
            text = "has no price: a budget counts what a request cost only once the remote says so, if it does"
            where = f"engines.{kind}"
            yield Finding("note", model.id, where, "no_price", text, f"set price_usd in [engines.{kind}]")


def _table(model: Model, kind: str) -> RemoteTable | None:
    try:
        return remote_table(model, kind)
    except ManifestError:
        return None  # said where the manifest is read
