"""`rushes models route`: what would happen to a request that came now, by the decision that workers make."""

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import msgspec

from rushes.catalog.load import Catalog, Entry
from rushes.catalog.model import Model
from rushes.catalog.routes import DRAFT, Route, effective_routes
from rushes.catalog.routing import Case, Outlook, Verdict, decide
from rushes.cli.inputs import parse_value, read_pairs
from rushes.cli.options import config_option, data_dir_option, load, with_existing_store
from rushes.errors import NotFound
from rushes.queue.base import Store
from rushes.requests.ids import AccountId
from rushes.requests.record import Key, RemoteState, Request, StatusView, WorkerRecord
from rushes.service.outlook import Outlooks, budget_left, costs_of, merged, minute_of_day, with_room
from rushes.settings import Settings, remote_of

DEFAULT_ACCOUNT: Final = "default"
_RUNNING_LOOKED_AT: Final = 1000
_LAST_SEQ: Final = 2**62
_SHORT_SECONDS: Final = 120


class Drafts(NamedTuple):
    """The line for the draft engine's slots."""

    free: int
    """Slots that have nothing to do."""
    ahead: int
    """Requests that wait for them."""


class Explained(msgspec.Struct, frozen=True):
    """How things stand for one model, and what comes of it."""

    model: Model
    workers: tuple[WorkerRecord, ...]
    """The live ones."""
    gone: tuple[WorkerRecord, ...]
    """Those of this machine whose process has ended, though nobody has taken them off the list yet."""
    routes: tuple[Route, ...]
    outlook: Outlook
    case: Case
    verdicts: tuple[Verdict, ...]
    drafts: Drafts
    account_limit: int
    """How many of the account may run at once, where as many do; else 0."""


@click.command()
@click.argument("model_id")
@click.option("--account", help="As a request of this account. [default: that of --key, else `default`]")
@click.option("--key", metavar="ID", help="As a request with this API key, by its id or name.")
@click.option(
    "-i", "pairs", metavar="NAME=VALUE", multiple=True, help="One field of the input, instead of the sample's."
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
@data_dir_option
@config_option
def route(
    *,
    model_id: str,
    account: str | None,
    key: str | None,
    pairs: tuple[str, ...],
    as_json: bool,
    data_dir: Path | None,
    config: Path | None,
) -> None:
    """Explain where a request for MODEL_ID would run if it came now, and why not elsewhere.

    Each of the model's routes is weighed as workers do it: by the live slots and remotes, how long the line is, the
    account, the hour, what the input would cost, and what is left of the budgets. Nothing is sent anywhere.
    """
    settings = load(config, data_dir=data_dir)
    entry = Catalog.load(settings.models_dir).get(model_id)
    if entry is None:
        raise NotFound(f"There is no model {model_id!r}; `rushes models list` shows them.")
    values = entry.validator.validate_input(_given(entry, pairs)).input

    async def read(store: Store) -> tuple[Explained, Key | None]:
        known = await _key(store, key) if key is not None else None
        owner = AccountId(account or (known.account if known else DEFAULT_ACCOUNT))
        return await explain(store, settings, entry.model, values, owner, known), known

    found, known = with_existing_store(settings, read)
    absent = unseen(settings, found.workers)
    if as_json:
        from rushes.cli.show import as_json as dumped

        click.echo(dumped(as_fields(found, known, values, absent)))
    else:
        _print(found, absent)


def _given(entry: Entry, pairs: tuple[str, ...]) -> dict[str, Any]:
    """The sample's input with the fields that were given. Files are neither read nor sent: no price asks for them."""
    fields = entry.input_schema["properties"]
    values = dict(entry.model.sample)
    for name, text in read_pairs(pairs).items():
        try:
            values[name] = parse_value(text, fields.get(name))
        except ValueError as error:
            raise click.UsageError(f"-i {name}: {error}") from None
    return values


async def _key(store: Store, id_or_name: str) -> Key:
    live = [key for key in await store.list_keys() if key.revoked_at is None]
    fits = [key for key in live if key.id == id_or_name] or [key for key in live if key.name == id_or_name]
    if not fits:
        raise NotFound(f"There is no live key {id_or_name!r}; `rushes keys list` shows them.")
    if len(fits) > 1:
        raise click.UsageError(f"{len(fits)} keys are named {id_or_name!r}; give the id of one")
    return fits[0]


async def explain(
    store: Store, settings: Settings, model: Model, values: dict[str, Any], account: AccountId, key: Key | None
) -> Explained:
    """Read how things stand, and decide as :class:`rushes.worker.remotes.Remotes` does. Raises StoreUnavailable."""
    workers, gone = _alive(await store.workers())
    running = await store.list_requests(state="running", limit=_RUNNING_LOOKED_AT)
    remotes = with_room(merged(workers, model.id, now=time.time()), running)
    outlook = await Outlooks(store).of(model.id, workers, remotes)
    key_budget = settings.key_budget_usd_per_day
    case = Case(
        account=account,
        position=outlook.waiting + 1,
        waited=0.0,  # nobody has watched it: what comes of waiting, only workers can say
        minute=minute_of_day(),
        costs=costs_of(model, values, remotes),
        budget_left=await budget_left(store, settings.budget_usd_per_day, None),
        key_budget_left=await budget_left(store, key_budget, key.id) if key else key_budget or None,
    )
    routes = effective_routes(model, remotes, settings.overflow_seconds)
    limit = settings.account_limit
    busy = limit and len(await store.list_requests(account=account, state="running", limit=limit)) >= limit
    return Explained(
        model=model,
        workers=workers,
        gone=gone,
        routes=routes,
        outlook=outlook,
        case=case,
        verdicts=tuple(decide(routes, outlook, case)),
        drafts=await _drafts(store, model.id, workers, running),
        account_limit=limit if busy else 0,
    )


async def _drafts(
    store: Store, model: str, workers: Sequence[WorkerRecord], running: Sequence[Request]
) -> Drafts:
    drafting = [one for one in workers if one.engine == DRAFT and one.slots and model in one.models]
    if not drafting:
        return Drafts(0, 0)
    ids = {one.id for one in drafting}
    busy = sum(one.worker in ids and one.remote_task is None for one in running)
    lane = sorted({id_ for one in drafting for id_ in one.models})
    place = await store.position(StatusView(_LAST_SEQ, model, "queued", 0, None), lane)
    return Drafts(max(0, sum(one.slots for one in drafting) - busy), place - 1)


def _alive(
    workers: Sequence[WorkerRecord],
) -> tuple[tuple[WorkerRecord, ...], tuple[WorkerRecord, ...]]:
    """The live ones, and those whose process on this machine is gone; of other machines the list is believed."""
    gone = tuple(one for one in workers if one.host == platform.node() and not _runs(one.pid))
    return tuple(one for one in workers if one not in gone), gone


def _runs(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def unseen(settings: Settings, workers: Sequence[WorkerRecord]) -> list[str]:
    """The remotes that the settings name, and no live worker has."""
    told = {remote.name for worker in workers for remote in worker.remotes}
    return [name for name in (remote_of(text).name for text in settings.remotes) if name not in told]


# -- in words -----------------------------------------------------------------------------------------------
def conclusion(found: Explained) -> str:
    """What would happen, in one sentence or two."""
    if found.account_limit:
        runs = f"{found.account_limit} request{'s' if found.account_limit > 1 else ''}"
        return (
            f"It would wait: the account {found.case.account} has {runs} running, "
            "as many as it may (RUSHES_ACCOUNT_LIMIT)."
        )
    taker = next((one for one in found.verdicts if one.takes), None)
    if taker is None:
        if not found.workers:
            return "It would wait: no worker is live. `rushes serve` or `rushes worker` starts one."
        whys = "; ".join(dict.fromkeys(one.why for one in found.verdicts))
        return f"It would wait: {whys}." if whys else "It would wait: nothing serves the model."
    if taker.remote is not None:
        return f"It would run on {taker.remote}: {taker.why}."
    if taker.engine == DRAFT:
        return _drafted(found.drafts)
    return _local(found, taker)


def _local(found: Explained, taker: Verdict) -> str:
    named = found.outlook.engines if taker.engine == "local" else (taker.engine,)
    engine = " or ".join(named)
    case, outlook = found.case, found.outlook
    if case.position <= outlook.free:
        return f"It would run on {engine} at once."
    if found.drafts.free and any(one.engine == DRAFT for one in found.model.routes):
        return f"It would run on the draft engine at once: the routes name it, and {engine} has no free slot."
    seconds = outlook.eta(case.position) if outlook.seconds is not None else None
    when = "nobody knows yet how long one takes" if seconds is None else f"about {duration(seconds)}"
    return f"It would wait for a slot of {engine}, as number {case.position} in the line: {when}."


def _drafted(drafts: Drafts) -> str:
    what = "the draft engine, which makes drafts for testing, not generations"
    if drafts.ahead < drafts.free:
        return f"It would run at once on {what}."
    return f"It would wait, as number {drafts.ahead + 1} in the line, for {what}."


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds <= _SHORT_SECONDS else f"{seconds / 60:.0f} min"


def condition(remote: RemoteState) -> str:
    """How a remote stands, as its worker told."""
    until = f" until {time.strftime('%H:%M:%S', time.localtime(remote.until))}" if remote.until else ""
    return f"{remote.state}{until}"


def conditions(one: Route) -> str:
    """What a route asks for, in short."""
    from rushes.cli.show import dollars

    parts = [
        f"wait above {one.queue_eta_above:g} s" if one.queue_eta_above is not None else "",
        f"accounts {', '.join(one.accounts)}" if one.accounts else "",
        f"up to {dollars(one.max_cost_usd)}" if one.max_cost_usd is not None else "",
        one.hours,
    ]
    return "; ".join(part for part in parts if part)


def _print(found: Explained, absent: Sequence[str]) -> None:
    from rushes.cli.show import clean, dollars, note, table

    rows = [
        (number, _named(verdict), conditions(one), "yes" if verdict.takes else "no", verdict.why)
        for number, (one, verdict) in enumerate(zip(found.routes, found.verdicts, strict=True), 1)
    ]
    table(("route", "engine", "only", "takes it", "why"), rows)
    click.echo(f"\n{clean(conclusion(found))}")
    for whose, left in (("day", found.case.budget_left), ("key", found.case.key_budget_left)):
        if left is not None:
            click.echo(f"Left of the {whose}'s budget: {dollars(max(0.0, left))}.")
    if found.outlook.remotes:
        click.echo()
        states = [
            (one.name, one.kind, _serves(one, found.model), one.capacity, condition(one), one.why)
            for one in _states(found)
        ]
        table(("remote", "kind", "has the model", "free places", "state", "why"), states)
    for worker in found.gone:
        note(f"The worker {worker.id} of this machine has ended (there is no process {worker.pid}): left out.")
    if absent:
        note(f"RUSHES_REMOTES names {', '.join(absent)}, and no live worker has told of it.")


def _named(verdict: Verdict) -> str:
    named = verdict.remote in (None, verdict.engine)
    return verdict.engine if named else f"{verdict.engine} ({verdict.remote})"


def _serves(remote: RemoteState, model: Model) -> str:
    return "yes" if model.id in remote.models else "no"


def _states(found: Explained) -> list[RemoteState]:
    return [one for one in found.outlook.remotes if isinstance(one, RemoteState)]


def as_fields(
    found: Explained, key: Key | None, values: Mapping[str, Any], absent: Sequence[str]
) -> dict[str, Any]:
    """The same for programs. Times are seconds since the epoch, durations seconds, amounts USD."""
    outlook, case = found.outlook, found.case
    taker = next((one for one in found.verdicts if one.takes and not found.account_limit), None)
    remotes = [
        msgspec.to_builtins(one) | {"state": one.state, "cost_usd": case.costs.get(one.name)}
        for one in _states(found)
    ]
    return {
        "model": found.model.id,
        "account": case.account,
        "key": key.id if key else None,
        "input": dict(values),
        "conclusion": conclusion(found),
        "engine": None if taker is None else taker.remote or taker.engine,
        "routes": [
            msgspec.to_builtins(one) | msgspec.to_builtins(verdict)
            for one, verdict in zip(found.routes, found.verdicts, strict=True)
        ],
        "line": {
            "engines": list(outlook.engines),
            "slots": outlook.slots,
            "free": outlook.free,
            "draft_slots": outlook.draft_slots,
            "waiting": outlook.waiting,
            "position": case.position,
            "request_seconds": outlook.seconds,
            "eta_seconds": outlook.eta(case.position) if outlook.seconds is not None else None,
        },
        "budget_left_usd": case.budget_left,
        "key_budget_left_usd": case.key_budget_left,
        "workers": [one.id for one in found.workers],
        "workers_gone": [one.id for one in found.gone],
        "remotes": remotes,
        "remotes_without_worker": list(absent),
    }
