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
from types import FrameType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import click

from rushes.catalog.load import Catalog
from rushes.cli.exits import Exit
from rushes.cli.options import with_store
from rushes.client.errors import RushesClientError
from rushes.client.sync import Client
from rushes.client.types import Status
from rushes.guard import SUPERVISOR
from rushes.settings import Settings

START_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.2
LONGEST_SECONDS: Final = 300.0
STALL_SECONDS: Final = 60.0
"""Without any change of any request."""
ENGINE_TRIES: Final = 3
"""Starts of the engine that fail before the demo believes that it never will."""
LOG_LINES: Final = 25
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
    with (
        _orderly_end(),
        tempfile.TemporaryDirectory(prefix="rushes-demo-", ignore_cleanup_errors=True) as folder,
    ):
        server = _Server(Path(folder))
        try:
            with server:
                rows = _show(server, output_dir)
        except _Stuck as stuck:
            _explain(stuck, server)
            return Exit.FAILED
    click.echo()
    table(("model", "engine", "state", "size", "frames", "fps", "seconds", "file"), rows)
    if any(row[2] != "succeeded" for row in rows):
        return Exit.FAILED
    click.echo(f"\n{_next_steps()}")
    return Exit.OK


def _show(server: "_Server", output_dir: Path) -> list[tuple[object, ...]]:
    url = server.wait()
    click.echo(f"A private server runs at {url}. Its engine is the draft engine: no GPU, no generation.")
    try:
        with Client(base_url=url, api_key=server.key) as client:
            return _run_all(client, output_dir, server)
    except RushesClientError as error:
        if server.ended():
            raise _Stuck("the private server ended") from error
        raise


def _explain(stuck: "_Stuck", server: "_Server") -> None:
    from rushes.cli.show import note

    note(f"rushes: {stuck}. The end of the private server's log:")
    for line in server.log_lines()[-LOG_LINES:]:
        note(line[:2000], indent="  ")


def _next_steps() -> str:
    rushes = _command()
    serve, models = (f"{rushes} {words}".ljust(34) for words in ("serve", "models list"))
    return f"""\
What to run next:
  {serve}  a server of your own; its first start shows an API key
  {"export RUSHES_API_KEY=rsh_...".ljust(34)}  the key
  {models}  what it can run
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


def _run_all(client: Client, output_dir: Path, server: "_Server") -> list[tuple[object, ...]]:
    """Submit one request of every model, watch them to their end, download; a row of the table for each.

    Raises _Stuck where that leads nowhere.
    """
    from rushes.cli.show import Watch

    catalog = Catalog.load()
    waiting: dict[int, tuple[str, str]] = {}
    rows: dict[int, tuple[object, ...]] = {}
    patience = _Patience(server)
    with Watch() as watch:
        for model_id in MODELS:
            entry = catalog.get(model_id)
            assert entry is not None
            submitted = client.submit(model_id, entry.model.sample)
            waiting[watch.add(model_id)] = (model_id, submitted.request_id)
        while waiting:
            time.sleep(POLL_SECONDS)
            patience.check()
            for row, (model_id, request_id) in tuple(waiting.items()):
                status = client.status(request_id)
                watch.update(row, status)
                patience.saw(row, status)
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


class _Stuck(Exception):
    """The demo leads nowhere; says why."""


class _Patience:
    """How long a demo waits: for ever is no answer."""

    def __init__(self, server: "_Server") -> None:
        self._server = server
        self._began = self._moved = time.monotonic()
        self._seen: dict[int, object] = {}
        self._ran = False

    def saw(self, row: int, status: Status) -> None:
        place = (status.status, status.queue_position, status.stage, status.progress)
        if self._seen.get(row) != place:
            self._seen[row] = place
            self._moved = time.monotonic()
        self._ran = self._ran or status.status != "in_queue"

    def check(self) -> None:
        """Raises _Stuck."""
        now = time.monotonic()
        if self._server.ended():
            raise _Stuck("the private server ended")
        if not self._ran and self._server.engine_failures() >= ENGINE_TRIES:
            raise _Stuck("the engine does not start")
        if now - self._moved > STALL_SECONDS:
            raise _Stuck(f"nothing has happened for {STALL_SECONDS:g} seconds")
        if now - self._began > LONGEST_SECONDS:
            raise _Stuck(f"the requests have not ended within {LONGEST_SECONDS:g} seconds")


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, once, so that everything is put away before the end."""

    def end(number: int, _frame: FrameType | None) -> None:
        for ending in before:
            signal.signal(ending, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup means it
    }
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server:
    """A server in a folder of its own, on a free port. Nothing is left running: its end comes with the block's,
    or by the kernel with this process's.
    """

    def __init__(self, folder: Path) -> None:
        from rushes.service.keys import new_key

        self._data_dir = folder / "data"
        self._log_path = folder / "server.log"
        self.key, self._record = new_key("demo")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        async def add(store: Any) -> None:
            await store.add_key(self._record)

        with_store(Settings(data_dir=self._data_dir), add)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RUSHES_")}
        command = [sys.executable, "-m", "rushes.cli.main", "serve", "--port", "0", "--end-with-parent"]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--data-dir", str(self._data_dir)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self._data_dir.parent,
                env=environment | {"RUSHES_ACCESS_LOG": "off", SUPERVISOR: str(os.getpid())},
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where Ctrl-C is pressed again
            process.kill()
            process.wait()

    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def wait(self) -> str:
        """The address, once it answers. Raises _Stuck."""
        import httpx

        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not self.ended():
            try:
                url = str(json.loads((self._data_dir / "server.json").read_text("utf-8"))["url"])
                if httpx.get(f"{url}/healthz", timeout=5.0, trust_env=False).status_code == 200:
                    return url
            except (OSError, ValueError, httpx.HTTPError):
                time.sleep(0.05)
        raise _Stuck("the private server did not start")

    def engine_failures(self) -> int:
        return sum('"event":"engine not started"' in line for line in self.log_lines())

    def log_lines(self) -> list[str]:
        return self._log_path.read_text("utf-8", "replace").splitlines()
