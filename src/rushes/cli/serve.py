"""`rushes serve`."""

from pathlib import Path

import click

from rushes.cli.options import config_option, data_dir_option, load


@click.command()
@click.option("--host", help="Address to listen on (default: 127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (default: 8000; 0 takes a free one).")
@data_dir_option
@click.option("--workers", type=int, help="Engine slots on this machine (default: 1; 0 for the gateway alone).")
@click.option("--engine", help="Engine of the local slots (default: draft).")
@config_option
@click.option("--end-with-parent", is_flag=True, hidden=True)
def serve(
    host: str | None,
    port: int | None,
    data_dir: Path | None,
    workers: int | None,
    engine: str | None,
    config: Path | None,
    *,
    end_with_parent: bool,
) -> None:
    """Run the server: gateway, store and local workers.

    The first start makes an API key and shows it once. SIGTERM and Ctrl-C finish what is running and stop.
    """
    from rushes import log
    from rushes.cli.comfyui import check_comfyui
    from rushes.cli.supervisor import run_server
    from rushes.cli.wan_start import check_wan
    from rushes.guard import die_with_parent

    if end_with_parent:
        die_with_parent()
    settings = load(config, host=host, port=port, data_dir=data_dir, workers=workers, engine=engine)
    check_comfyui(settings)
    check_wan(settings)
    log.configure()
    run_server(settings)
