"""`rushes models check`: what is wrong with models and their workflows, and how to mend it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from rushes.catalog.audit import Finding, Held, Holdings, Needs, audit, audit_engines, needs_of
from rushes.catalog.audit_remotes import audit_remotes
from rushes.catalog.audit_wan import WEIGHTS_SETTING, audit_instead, audit_wan, not_on_wan, weights_instead
from rushes.catalog.load import Catalog
from rushes.catalog.model import Model
from rushes.catalog.workflow import has_workflow
from rushes.cli.comfyui import unknown_variants
from rushes.cli.options import config_option, load
from rushes.cli.show import as_json as dumped
from rushes.cli.show import clean
from rushes.errors import ManifestError, NotFound, RushesError
from rushes.settings import Settings, remote_of, server_address

NOTHING_ASKED: Final = (
    "No ComfyUI was asked, so that node classes, their bounds and the weights were not compared: "
    "give --comfyui URL, or set RUSHES_COMFYUI_URLS or RUSHES_COMFYUI_DIR."
)
_COLOURS: Final = {"error": "red", "warning": "yellow", "note": "cyan"}


def address(_context: click.Context, _option: click.Parameter, value: Any) -> Any:
    """The ``--comfyui`` of a command line in its one form, as those of the settings have it."""
    try:
        if isinstance(value, tuple):
            return tuple(dict.fromkeys(map(server_address, value)))
        return server_address(value) if value else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option(
    "--comfyui",
    "urls",
    multiple=True,
    metavar="URL",
    callback=address,
    help="A running ComfyUI; may be repeated.",
)
@click.option("--offline", is_flag=True, help="Ask no server, not even those of RUSHES_COMFYUI_URLS.")
@click.option("--hash", "hashed", is_flag=True, help="Compare checksums of weights in RUSHES_COMFYUI_DIR, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@config_option
def check(
    ids: tuple[str, ...],
    *,
    urls: tuple[str, ...],
    offline: bool,
    hashed: bool,
    as_json: bool,
    config: Path | None,
) -> int:
    """Check every model folder, or those of some models: what is broken, where, and how to mend it.

    Workflows are compared with each ComfyUI that --comfyui or RUSHES_COMFYUI_URLS names, or with the folder of
    RUSHES_COMFYUI_DIR: missing nodes and weights, with commands that get them, values that a node refuses.
    Tables [engines.wan] are checked, too, and the folders on this machine that they name; with the engine wan also
    those of RUSHES_WAN_WEIGHTS. Routes are compared with RUSHES_REMOTES; no remote is asked.
    Exit status 1: there is an error.
    """
    if offline and urls:
        raise click.UsageError("--offline asks no server: leave --comfyui out")
    settings = load(config)
    catalog = Catalog.load(settings.models_dir)
    broken = [one for one in catalog.broken if not ids or any(_is_of(one, id_) for id_ in ids)]
    for id_ in ids:
        if catalog.get(id_) is None and not any(_is_of(one, id_) for one in broken):
            raise NotFound(f"There is no model {id_!r}; `rushes models list` shows them.")
    every = [entry.model for entry in catalog.entries()]
    models = [model for model in every if not ids or model.id in ids]
    prefer = settings.comfyui_variants
    needs = _together([needs_of(model, prefer) for model in models])
    holdings, failures = _look(settings, () if offline else urls or settings.comfyui_urls, needs, hashed=hashed)
    on_wan = settings.engine == "wan"
    instead = weights_instead(settings.wan_weights) if on_wan else {}
    remotes = {one.name: one.kind for one in map(remote_of, settings.remotes)}
    budget = bool(settings.budget_usd_per_day or settings.key_budget_usd_per_day)
    found: dict[Finding, list[str]] = {}
    for model in models:
        for holding in holdings or (None,):
            for finding in audit(model, prefer, holding):
                if finding.kind == "no_graph" and on_wan and not urls:
                    continue  # nobody means to run it on ComfyUI
                found.setdefault(finding, []).append(holding.name if holding else "")
        more = [
            *audit_engines(model),
            *audit_wan(model, instead.get(model.id, "")),
            *audit_remotes(model, remotes, budget=budget),
        ]
        found |= {finding: [] for finding in (*more, *(not_on_wan(model) if on_wan else ()))}  # of no ComfyUI
    readable = [model.id for model in every]
    unread = [name for name in instead if any(_is_of(one, name) for one in catalog.broken)]
    general = [*failures, *_idle_variants(prefer, every), *audit_instead(instead, [*readable, *unread])]
    listed: list[tuple[Finding, list[str]]] = [*((one, []) for one in general), *found.items()]
    errors = len(broken) + sum(finding.severity == "error" for finding, _ in listed)
    warnings = sum(finding.severity == "warning" for finding, _ in listed)
    runnable = {holding.name: _runnable(models, found, holding.name) for holding in holdings}
    if as_json:
        counts = {"models": len(models), "errors": errors, "warnings": warnings}
        asked = {"comfyui": list(runnable), "runnable": runnable}
        _print_json({**counts, **asked}, broken, listed)
    else:
        for one in broken:
            click.echo(one.message, err=True)
        _print_text(listed, len(holdings))
        if not holdings and not failures and not on_wan:
            click.echo(NOTHING_ASKED, err=True)
        click.echo(f"{len(models)} model(s) read; {errors} error(s), {warnings} warning(s)")
        for name, count in runnable.items():
            click.echo(clean(f"{count} of {len(models)} can run on {name}"))
    return 1 if errors else 0


def _is_of(error: ManifestError, id_: str) -> bool:
    """Whether the broken file lies in the folder of the model ``id_``."""
    return f"/{id_}/" in f"/{error.file}"


def _runnable(models: Sequence[Model], found: Mapping[Finding, list[str]], name: str) -> int:
    """How many of the models have a workflow, and no error on the ComfyUI of this name."""
    wrong = {finding.model for finding, names in found.items() if finding.severity == "error" and name in names}
    return sum(has_workflow(model) and model.id not in wrong for model in models)


def _idle_variants(prefer: Sequence[str], models: Sequence[Model]) -> Iterator[Finding]:
    for name, hint in unknown_variants(prefer, models).items():
        text = f"no model has a variant {name!r}; {hint}"
        yield Finding("note", "", "RUSHES_COMFYUI_VARIANTS", "unknown_variant", text)


# -- what there is ---------------------------------------------------------------------------------------
def _look(
    settings: Settings, urls: Sequence[str], needs: Needs, *, hashed: bool
) -> tuple[list[Holdings], list[Finding]]:
    """What each ComfyUI has, and those that cannot be looked at."""
    holdings, failures = [], []
    folder = settings.comfyui_dir if not urls else None
    for name in [str(folder)] if folder is not None else urls:
        try:
            holdings.append(
                _of_folder(settings, folder, needs, hashed=hashed)
                if folder is not None
                else _of_server(name, needs)
            )
        except RushesError as error:
            from rushes.engines.comfyui.catalogue import without_password

            where = name if folder is not None else without_password(name)
            failures.append(Finding("error", "", where, "comfyui", error.message))
    return holdings, failures


def _of_server(url: str, needs: Needs) -> Holdings:
    from rushes.engines.comfyui.catalogue import fetch_object_info, fetch_weights, without_password

    nodes = fetch_object_info(url)
    return Holdings(name=without_password(url), nodes=nodes, weights=fetch_weights(url, needs.folders))


def _of_folder(settings: Settings, folder: Path, needs: Needs, *, hashed: bool) -> Holdings:
    from rushes.engines.comfyui.catalogue import Installation, sha256_of

    there = Installation(folder, settings.comfyui_args)
    files = {}
    for weight in needs.weights:
        if place := there.weight(weight.folder, weight.file):
            digest = sha256_of(place) if hashed and weight.sha256 else None
            files[weight.folder, weight.file] = Held(place.stat().st_size, digest)
    return Holdings(
        name=str(folder),
        classes=there.classes(needs.classes),
        packs=there.packs(),
        weights={kind: there.weights(kind) for kind in needs.folders},
        files=files,
        inputs=frozenset(),  # a ComfyUI that a slot starts has an input folder of its own, empty at first
        homes={kind: str(there.home(kind)) for kind in needs.folders},
        custom_nodes=str(there.base / "custom_nodes"),
    )


def _together(needs: Sequence[Needs]) -> Needs:
    return Needs(
        classes=frozenset().union(*(one.classes for one in needs)),
        weights=tuple(dict.fromkeys(weight for one in needs for weight in one.weights)),
        folders=frozenset().union(*(one.folders for one in needs)),
    )


# -- what is printed -------------------------------------------------------------------------------------
def _print_text(listed: Sequence[tuple[Finding, list[str]]], asked: int) -> None:
    heading = None
    for finding, names in listed:
        general = "engine wan" if finding.where == WEIGHTS_SETTING else "ComfyUI"
        if (finding.model or general) != heading:
            heading = finding.model or general
            click.echo(clean(heading))
        mark = click.style(f"{finding.severity:8}", fg=_COLOURS[finding.severity])
        only = f" (on {', '.join(names)})" if 0 < len(names) < asked else ""
        click.echo(f"  {mark} {clean(finding.where + only)}")
        click.echo(f"           {clean(finding.text)}")
        if finding.fix:
            click.echo(f"           -> {clean(finding.fix)}")


def _print_json(
    counts: Mapping[str, Any], broken: Sequence[ManifestError], listed: Sequence[tuple[Finding, list[str]]]
) -> None:
    click.echo(dumped({**counts, "findings": list(_as_tables(broken, listed))}))


def _as_tables(
    broken: Sequence[ManifestError], listed: Sequence[tuple[Finding, list[str]]]
) -> Iterator[dict[str, Any]]:
    for error in broken:
        where = ": ".join(filter(None, (error.file, error.key)))
        finding = Finding("error", "", where, "manifest", error.problem)
        yield _as_table(finding, [])
    for finding, names in listed:
        yield _as_table(finding, list(filter(None, names)))


def _as_table(finding: Finding, names: list[str]) -> dict[str, Any]:
    return {
        "severity": finding.severity,
        "kind": finding.kind,
        "model": finding.model or None,
        "where": finding.where,
        "text": finding.text,
        "fix": finding.fix or None,
        "comfyui": names,
    }
