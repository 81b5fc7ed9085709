"""`rushes models`: the catalog as this machine has it."""

import json
from pathlib import Path

import click

from rushes.catalog.load import Catalog
from rushes.cli.options import config_option, load
from rushes.errors import NotFound


@click.group()
def models() -> None:
    """List, show and check models."""


@models.command(name="list")
@click.option("--search", default="", help="Words that must appear.")
@click.option("--category", default="", help="Only this category.")
@config_option
def list_(search: str, category: str, config: Path | None) -> None:
    """List the models, the built-in ones and those of RUSHES_MODELS_DIR."""
    from rushes.cli.show import table

    catalog = Catalog.load(load(config).models_dir)
    found, _ = catalog.search(search, category, limit=1000)
    rows = [(e.model.id, e.model.name, e.model.output, ", ".join(e.model.categories)) for e in found]
    table(("id", "name", "makes", "categories"), rows)
    _complain(catalog)


@models.command()
@click.argument("model_id")
@click.option("--json", "as_json", is_flag=True, help="Print the whole description as JSON.")
@config_option
def show(model_id: str, *, as_json: bool, config: Path | None) -> None:
    """Show one model: its inputs with their types, bounds and defaults, and a command that runs it."""
    from rushes.catalog.listing import model_detail
    from rushes.cli.show import table

    entry = Catalog.load(load(config).models_dir).get(model_id)
    if entry is None:
        raise NotFound(f"There is no model {model_id!r}; `rushes models list` shows them.")
    if as_json:
        click.echo(json.dumps(model_detail(entry), indent=2, ensure_ascii=False))
        return
    model = entry.model
    click.echo(f"{model.id}: {model.name}\n{model.description}\n")
    rows = [
        (
            field.name,
            field.type,
            field.role,
            "required" if field.name in model.required else _short(field.default),
            _short(" | ".join(map(str, field.enum)))
            if field.enum
            else f"{_bound(field.minimum)}..{_bound(field.maximum)}".strip("."),
        )
        for field in model.inputs
    ]
    table(("input", "type", "role", "default", "values"), rows)
    arguments = " ".join(
        f"-i '{name}={_short(value)}'" for name, value in model.sample.items() if name in model.required
    )
    click.echo(f"\nrushes run {model.id} {arguments}")


@models.command()
@click.argument("model_id", required=False)
@config_option
def check(model_id: str | None, config: Path | None) -> int:
    """Check every model folder (or one): what is broken, in which file and key, and how to mend it."""
    catalog = Catalog.load(load(config).models_dir)
    if model_id is not None and catalog.get(model_id) is None and not _about(catalog, model_id):
        raise NotFound(f"There is no model {model_id!r}; `rushes models list` shows them.")
    broken = _complain(catalog, model_id)
    checked = [e for e in catalog.entries() if model_id in (None, e.model.id)]
    click.echo(f"{len(checked)} model(s) usable, {broken} problem(s)")
    return 1 if broken else 0


def _about(catalog: Catalog, model_id: str) -> bool:
    return any(model_id in problem.file for problem in catalog.broken)


def _complain(catalog: Catalog, model_id: str | None = None) -> int:
    problems = [p for p in catalog.broken if model_id is None or model_id in p.file]
    for problem in problems:
        click.echo(problem.message, err=True)
    return len(problems)


def _short(value: object, most: int = 60) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _bound(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
