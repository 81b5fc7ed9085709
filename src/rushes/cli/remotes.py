"""What `rushes doctor` finds of remote engines: addresses, keys, whether they answer, and what runs there.

No key is sent and none is shown: a remote is asked for its base address without one, and any answer will do.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from rushes.catalog.load import Catalog
from rushes.catalog.remotes import remote_table
from rushes.catalog.routes import effective_routes, routed
from rushes.engines.remote.configured import (
    RemoteConfig,
    cautions,
    configured,
    key_variable,
    key_variables,
)
from rushes.errors import ManifestError, SettingsError
from rushes.queue.base import Store
from rushes.requests.record import RemoteState, Request, WorkerRecord
from rushes.service.outlook import merged
from rushes.settings import REMOTE_KINDS, Settings, remote_of

Finding = tuple[str, str, str]
ASK_SECONDS: Final = 5.0
_OPENAI: Final = "openai-video@https://api.openai.com/v1"
_SHOWN: Final = 6
_PAGE: Final = 1000


def findings(settings: Settings) -> Iterator[Finding]:
    """Of each remote that the settings name, and of keys that are for none of them."""
    asked: list[tuple[str, RemoteConfig | str]] = [(text, _config(settings, text)) for text in settings.remotes]
    if asked and settings.secrets_file is not None and settings.secrets_file.exists():
        for caution in cautions(settings, ()):
            yield "bad", "secrets file", caution
    catalog = Catalog.load(settings.models_dir) if asked else None
    for text, config in asked:
        what = f"remote {remote_of(text).name}"
        if isinstance(config, str):
            yield "bad", what, config
            continue
        yield _answers(config, what)
        yield from _key(settings, text, config, what)
        if catalog is not None:
            yield _models(settings, catalog, config, what)
    if asked and not (settings.budget_usd_per_day or settings.key_budget_usd_per_day):
        text = "none: RUSHES_BUDGET_USD_PER_DAY bounds what remotes may cost in a day"
        yield "note", "budget", text
    yield from _idle_keys(settings)


def told(workers: Sequence[WorkerRecord]) -> Iterator[Finding]:
    """What live workers last told of their remotes. The places are of those workers that can do most with it."""
    for remote in merged(workers, now=time.time()):
        have = sum(any(one.name == remote.name for one in worker.remotes) for worker in workers)
        places = f"{have} worker(s) have it, {remote.capacity} request(s) at once"
        well = remote.state == "ready"
        yield (
            "ok" if well else "note",
            f"remote {remote.name}",
            places if well else f"{places}; {stands(remote)}",
        )


async def adrift(store: Store, workers: Sequence[WorkerRecord]) -> list[Request]:
    """Requests that wait with a task of a remote that no live worker has. Raises StoreUnavailable."""
    names = {remote.name for worker in workers for remote in worker.remotes}
    found: list[Request] = []
    before = None
    while page := await store.list_requests(state="queued", before=before, limit=_PAGE):
        found += [one for one in page if one.remote_task is not None and one.remote_task.remote not in names]
        before = page[-1].seq
    return found


def told_adrift(requests: Sequence[Request]) -> Iterator[Finding]:
    """What becomes of them."""
    for name in sorted({one.remote_task.remote for one in requests if one.remote_task is not None}):
        ids = [one.id for one in requests if one.remote_task is not None and one.remote_task.remote == name]
        text = f"{_count(ids)} for it, and no live worker has it: name it in RUSHES_REMOTES as before, or end"
        yield "note", f"remote {name}", f"{text} them with `rushes requests fail ID` ({_listed(ids)})"


def _count(ids: Sequence[str]) -> str:
    return f"{len(ids)} request waits" if len(ids) == 1 else f"{len(ids)} requests wait"


def stands(remote: RemoteState) -> str:
    """How a remote that takes nothing now stands, in words."""
    what = "it asked for a pause" if remote.state == "held" else "it is not tried"
    until = f" until {time.strftime('%H:%M:%S', time.localtime(remote.until))}" if remote.until else ""
    return f"{what}{until}" + (f": {remote.why}" if remote.why else "")


def _alone(settings: Settings, text: str) -> Settings:
    return msgspec.structs.replace(settings, remotes=(text,))


def _config(settings: Settings, text: str) -> RemoteConfig | str:
    """One remote, whatever is wrong with the others; else what is wrong with it."""
    try:
        return configured(_alone(settings, text), os.environ)[0]
    except SettingsError as error:
        return error.message


def _answers(config: RemoteConfig, what: str) -> Finding:
    import httpx

    where = f"{config.kind} at {config.base_url}"
    try:
        with httpx.stream("GET", config.base_url, timeout=ASK_SECONDS, trust_env=False) as answer:
            status = answer.status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        text = f"{where} cannot be reached from here ({reason}); requests for it wait, or go elsewhere"
        return "note", what, text
    return "ok", what, f"{where} answers ({status}, asked without a key)"


def _key(settings: Settings, text: str, config: RemoteConfig, what: str) -> Iterator[Finding]:
    variables = _variables(settings, text, config.name)
    if config.key is not None:
        found = next((name for name in variables if os.environ.get(name, "").strip()), None)
        place = found or f"the secrets file {settings.secrets_file}"
        yield "ok", what, f"its key is there, from {place}"
        for caution in cautions(msgspec.structs.replace(settings, secrets_file=None), (config,)):
            yield "note", what, caution
        return
    unused = "".join(
        f"; {name} is for {kind}'s own address and not sent here"
        for kind, name in _vendors(settings)
        if kind == config.kind and os.environ.get(name)
    )
    yield "note", what, f"no key is sent; if it wants one, set {variables[0]}{unused}"


def _variables(settings: Settings, text: str, name: str) -> list[str]:
    """Where the remote's key may stand; what is found first counts."""
    own = key_variable(name)
    return [own, *sorted(key_variables(_alone(settings, text)) - {own})]


def _models(settings: Settings, catalog: Catalog, config: RemoteConfig, what: str) -> Finding:
    served: list[str] = []
    unrouted: list[str] = []
    for entry in catalog.entries():
        model = entry.model
        try:
            table = remote_table(model, config.kind)
        except ManifestError:
            continue  # said where the models are looked at
        if table is None:
            continue
        state = RemoteState(config.name, config.kind, (model.id,), 1)
        reached = routed(effective_routes(model, [state], settings.overflow_seconds), [state])
        (served if reached else unrouted).append(model.id)
    left_out = f"; the routes of {_listed(unrouted)} leave it out" if unrouted else ""
    if served:
        return "ok", what, f"has {_listed(served)}{left_out}"
    text = f"no model runs there{left_out or f': none has [engines.{config.kind}]'} (docs/models.md)"
    return "note", what, text


def _listed(ids: Sequence[str]) -> str:
    more = len(ids) - _SHOWN
    return ", ".join(ids[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _vendors(settings: Settings) -> Iterable[tuple[str, str]]:
    """The vendors' own variables, each with its kind."""
    for kind in REMOTE_KINDS:
        text = _OPENAI if kind == "openai-video" else kind
        for name in key_variables(_alone(settings, text)) - {key_variable(kind)}:
            yield kind, name


def _idle_keys(settings: Settings) -> Iterator[Finding]:
    kinds = {remote_of(text).kind for text in settings.remotes}
    for kind, name in _vendors(settings):
        if os.environ.get(name) and kind not in kinds:
            text = f"is set, and nothing is sent to {kind} until RUSHES_REMOTES names it (docs/remotes.md)"
            yield "note", name, text
