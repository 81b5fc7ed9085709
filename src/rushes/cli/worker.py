"""`rushes worker`."""

import asyncio
from pathlib import Path

import click

from rushes.cli.options import config_option, data_dir_option, load, unmatched
from rushes.errors import SettingsError


@click.command()
@click.option("--models", help="Which models to serve, as comma-separated patterns (default: *).")
@click.option("--workers", type=int, help="Engine slots (default: 1).")
@click.option("--engine", help="Engine of the slots (default: draft).")
@data_dir_option
@config_option
def worker(
    models: str | None,
    workers: int | None,
    engine: str | None,
    data_dir: Path | None,
    config: Path | None,
) -> None:
    """Join an existing database as a worker.

    The database is the server's: RUSHES_DATABASE_URL (PostgreSQL), or --data-dir on the same machine. With
    PostgreSQL on several machines, RUSHES_STORAGE_URL must name a storage that all of them reach.
    """
    from rushes import log
    from rushes.catalog.load import Catalog
    from rushes.cli.comfyui import check_comfyui
    from rushes.cli.show import note
    from rushes.cli.wan_start import check_wan
    from rushes.wiring import DATABASE, run_worker

    settings = load(config, models=models, workers=workers, engine=engine, data_dir=data_dir)
    check_comfyui(settings)
    check_wan(settings)
    database = settings.data_dir / DATABASE
    if not settings.database_url and not database.exists():
        raise SettingsError(
            f"there is no database at {database}: start `rushes serve` there first, or set RUSHES_DATABASE_URL"
        )
    known = [entry.model.id for entry in Catalog.load(settings.models_dir).entries()]
    for pattern in unmatched(settings.models, known):
        note(f"rushes: warning: no model fits --models {pattern!r}; `rushes models list` shows them.")
    log.configure()
    asyncio.run(run_worker(settings))
