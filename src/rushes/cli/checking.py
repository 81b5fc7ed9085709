"""`rushes models check`: what is wrong with models and their workflows, and how to mend it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from rushes.catalog.audit import Finding, Held, Holdings, Needs, audit, needs_of
from rushes.catalog.load import Catalog
from rushes.cli.options import config_option, load
from rushes.errors import ManifestError, NotFound, RushesError
from rushes.settings import Settings

NOTHING_ASKED: Final = (
    "No ComfyUI was asked, so that node classes, their bounds and the weights were not compared: "
    "give --comfyui URL, or set RUSHES_COMFYUI_URLS or RUSHES_COMFYUI_DIR."
)
_COLOURS: Final = {"error": "red", "warning": "yellow", "note": "cyan"}


@click.command()
@click.argument("model_id", required=False)
@click.option("--comfyui", "urls", multiple=True, metavar="URL", help="A running ComfyUI; may be repeated.")
@click.option("--offline", is_flag=True, help="Ask no server, not even those of RUSHES_COMFYUI_URLS.")
@click.option("--hash", "hashed", is_flag=True, help="Compare checksums of weights in RUSHES_COMFYUI_DIR, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@config_option
def check(
    model_id: str | None,
    *,
    urls: tuple[str, ...],
    offline: bool,
    hashed: bool,
    as_json: bool,
    config: Path | None,
) -> int:
    """Check every model folder (or one): what is broken, where, and how to mend it.

    Workflows are compared with each ComfyUI that --comfyui or RUSHES_COMFYUI_URLS names, or with the folder of
    RUSHES_COMFYUI_DIR: missing nodes and weights, with commands that get them, values that a node refuses.
    Exit status 1: there is an error.
    """
    if offline and urls:
        raise click.UsageError("--offline asks no server: leave --comfyui out")
    settings = load(config)
    catalog = Catalog.load(settings.models_dir)
    broken = [one for one in catalog.broken if model_id is None or model_id in one.file]
    if model_id is not None and catalog.get(model_id) is None and not broken:
        raise NotFound(f"There is no model {model_id!r}; `rushes models list` shows them.")
    models = [entry.model for entry in catalog.entries() if model_id in (None, entry.model.id)]
    prefer = settings.comfyui_variants
    needs = _together([needs_of(model, prefer) for model in models])
    holdings, failures = _look(settings, () if offline else urls or settings.comfyui_urls, needs, hashed=hashed)
    found: dict[Finding, list[str]] = {}
    for model in models:
        for holding in holdings or (None,):
            for finding in audit(model, prefer, holding):
                found.setdefault(finding, []).append(holding.name if holding else "")
    listed: list[tuple[Finding, list[str]]] = [*((one, []) for one in failures), *found.items()]
    errors = len(broken) + sum(finding.severity == "error" for finding, _ in listed)
    if as_json:
        _print_json(len(models), errors, broken, listed, holdings)
    else:
        for one in broken:
            click.echo(one.message, err=True)
        _print_text(listed, len(holdings))
        if not holdings and not failures:
            click.echo(NOTHING_ASKED, err=True)
        warnings = sum(finding.severity == "warning" for finding, _ in listed)
        also = f", {warnings} warning(s)" if warnings else ""
        click.echo(f"{len(models)} model(s) usable, {errors} problem(s){also}")
    return 1 if errors else 0


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
                _of_folder(folder, needs, hashed=hashed) if folder is not None else _of_server(name, needs)
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


def _of_folder(folder: Path, needs: Needs, *, hashed: bool) -> Holdings:
    from rushes.engines.comfyui.catalogue import Installation, sha256_of

    there = Installation(folder)
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
        custom_nodes=str(folder / "custom_nodes"),
    )


def _together(needs: Sequence[Needs]) -> Needs:
    return Needs(
        classes=frozenset().union(*(one.classes for one in needs)),
        weights=tuple(dict.fromkeys(weight for one in needs for weight in one.weights)),
        folders=frozenset().union(*(one.folders for one in needs)),
    )


# -- what is printed -------------------------------------------------------------------------------------
def _print_text(listed: Sequence[tuple[Finding, list[str]]], asked: int) -> None:
    from rushes.cli.show import clean

    model = None
    for finding, names in listed:
        if finding.model != model:
            model = finding.model
            click.echo(clean(model) or "ComfyUI")
        mark = click.style(f"{finding.severity:8}", fg=_COLOURS[finding.severity])
        only = f" (on {', '.join(names)})" if 0 < len(names) < asked else ""
        click.echo(f"  {mark} {clean(finding.where + only)}")
        click.echo(f"           {clean(finding.text)}")
        if finding.fix:
            click.echo(f"           -> {clean(finding.fix)}")


def _print_json(
    usable: int,
    problems: int,
    broken: Sequence[ManifestError],
    listed: Sequence[tuple[Finding, list[str]]],
    holdings: Sequence[Holdings],
) -> None:
    from rushes.cli.show import as_json

    value: Mapping[str, Any] = {
        "models": usable,
        "problems": problems,
        "comfyui": [holding.name for holding in holdings],
        "findings": list(_as_tables(broken, listed)),
    }
    click.echo(as_json(value))


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
