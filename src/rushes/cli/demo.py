"""`rushes demo`: the whole way once, for every model, on this machine, in a minute or less."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click

from rushes.catalog.load import Catalog
from rushes.cli.exits import Exit
from rushes.cli.options import with_store
from rushes.client.sync import Client
from rushes.errors import InternalError
from rushes.settings import Settings

START_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.2
MODELS: Final = (
    "community/wan-2-2/vace-fun",
    "community/wan-2-1/fusionx/image-to-video",
    "community/wan-2-2/first-last-frame",
    "wan-ai/wan-2-5/text-to-image",
)


@click.command()
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("rushes-demo"),
    show_default=True,
    help="Where to save the files.",
)
def demo(output_dir: Path) -> int:
    """Start everything privately, run one request of every model, save the files, stop everything.

    The files are drafts: animatics made on the CPU, to build and test against, not generations.
    """
    from rushes.cli.show import table

    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rushes-demo-") as folder, _server(Path(folder)) as (url, key):
        click.echo(f"A private server runs at {url}. Its engine is the draft engine: no GPU, no generation.")
        with Client(base_url=url, api_key=key) as client:
            rows = _run_all(client, output_dir)
    click.echo()
    table(("model", "engine", "state", "size", "frames", "fps", "seconds", "file"), rows)
    if any(row[2] != "succeeded" for row in rows):
        return Exit.FAILED
    click.echo(f"\n{_next_steps()}")
    return Exit.OK


def _next_steps() -> str:
    rushes = _command()
    return f"""\
What to run next:
  {rushes} serve                      a server of your own; its first start shows an API key
  export RUSHES_API_KEY=rsh_...       the key
  {rushes} models list                what it can run
  {rushes} run wan-ai/wan-2-5/text-to-image -i prompt='a lighthouse in a storm'
The files above are drafts. docs/ tells how to put your own models and engines behind the same API."""


def _command() -> str:
    """How this very program is called from here: its name where the shell finds it, else its path."""
    program = Path(sys.argv[0])
    found = shutil.which("rushes")
    if found and Path(found).resolve() == program.resolve():
        return "rushes"
    path = program.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _run_all(client: Client, output_dir: Path) -> list[tuple[object, ...]]:
    """Submit one request of every model, watch them to their end, download; a row of the table for each."""
    from rushes.cli.show import Watch

    catalog = Catalog.load()
    waiting: dict[int, tuple[str, str]] = {}
    rows: dict[int, tuple[object, ...]] = {}
    with Watch() as watch:
        for model_id in MODELS:
            entry = catalog.get(model_id)
            assert entry is not None
            submitted = client.submit(model_id, entry.model.sample)
            waiting[watch.add(model_id)] = (model_id, submitted.request_id)
        while waiting:
            time.sleep(POLL_SECONDS)
            for row, (model_id, request_id) in tuple(waiting.items()):
                status = client.status(request_id)
                watch.update(row, status)
                if status.done:
                    del waiting[row]
                    rows[row] = _collect(client, model_id, request_id, output_dir)
                    watch.finish(row, str(rows[row][2]))
    return [rows[row] for row in sorted(rows)]


def _collect(client: Client, model_id: str, request_id: str, output_dir: Path) -> tuple[object, ...]:
    """Download the output and look into the file itself."""
    from rushes.cli.show import note

    result = client.result(request_id)
    took = _seconds(result.raw.get("started_at"), result.raw.get("finished_at"))
    outputs = result.outputs()
    if result.status != "succeeded" or not outputs:
        note(f"{model_id}: {result.raw.get('error') or result.status}")
        return model_id, result.engine or "", result.status, "", "", "", took, ""
    address = outputs[0].url
    target = output_dir / f"{model_id.replace('/', '_')}{Path(urlsplit(address).path).suffix}"
    client.download(address, target, overwrite=True)
    size, frames, fps = _probe(target)
    return model_id, result.engine or "", result.status, size, frames, fps, took, target


def _seconds(start: str | None, end: str | None) -> str:
    if not start or not end:
        return ""
    return f"{(datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds():.1f}"


def _probe(path: Path) -> tuple[str, str, str]:
    """Size, frames and fps as they are in the file, counted by decoding it."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        size = f"{stream.width}x{stream.height}"
        if path.suffix == ".png":
            return size, "1", ""
        return size, str(frames), f"{float(stream.average_rate or 0):g}"


@contextmanager
def _server(folder: Path) -> Iterator[tuple[str, str]]:
    """A server in a folder of its own, on a free port; its address and a key. Nothing is left running."""
    from rushes.service.keys import new_key

    data_dir = folder / "data"
    key, record = new_key("demo")

    async def add(store: Any) -> None:
        await store.add_key(record)

    settings = Settings(data_dir=data_dir)
    with_store(settings, add)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RUSHES_")}
    log_path = folder / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rushes.cli.main", "serve", "--port", "0", "--data-dir", str(data_dir)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    try:
        yield _wait_for(process, data_dir, log_path), key
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", data_dir: Path, log_path: Path) -> str:
    import httpx

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            url = str(json.loads((data_dir / "server.json").read_text("utf-8"))["url"])
            if httpx.get(f"{url}/healthz", timeout=5.0, trust_env=False).status_code == 200:
                return url
        except (OSError, ValueError, httpx.HTTPError):
            time.sleep(0.05)
    raise InternalError("the server did not start:\n" + log_path.read_text("utf-8", "replace")[-2000:])
