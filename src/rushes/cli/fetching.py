"""`rushes models fetch`: download the weights of models for the engine `wan`."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rushes.catalog.load import Catalog
from rushes.catalog.model import Model
from rushes.catalog.wan import wan_of
from rushes.cli.exits import Exit, status_of
from rushes.cli.options import config_option, data_dir_option, load
from rushes.cli.show import clean, complain, note
from rushes.engines.wan.weights import Local, shown_size, weights_of
from rushes.errors import EngineError, NotFound, RushesError

_STATUSES: Final = {
    "weights_unreachable": Exit.UNREACHABLE,
    "weights_gated": Exit.UNAUTHORIZED,
    "weights_denied": Exit.UNAUTHORIZED,
    "weights_not_found": Exit.NOT_FOUND,
}


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@data_dir_option
@config_option
def fetch(ids: tuple[str, ...], data_dir: Path | None, config: Path | None) -> int:
    """Download the weights of models for the engine `wan`, and print where they are and how large.

    They go where huggingface_hub keeps its files (HF_HOME); what is there already is not fetched again. The exit
    status is that of the first model that could not be fetched.
    """
    settings = load(config, data_dir=data_dir)
    catalog = Catalog.load(settings.models_dir)
    models = [_model(catalog, id_) for id_ in dict.fromkeys(ids)]
    weights = weights_of(settings)
    status = Exit.OK
    for model in models:
        try:
            with _Bar(model.id) as bar, _at_once(bar):
                found = weights.fetch(model, bar.tell)
        except RushesError as error:
            complain(error)
            status = status or _status(error)
        else:
            _print(model, found)
    return status


def _model(catalog: Catalog, id_: str) -> Model:
    """The model, if this engine can run it. Raises NotFound, ManifestError."""
    entry = catalog.get(id_)
    if entry is None:
        broken = next((one for one in catalog.broken if f"/{id_}/" in f"/{one.file}"), None)
        raise broken or NotFound(f"There is no model {id_!r}; `rushes models list` shows them.")
    wan_of(entry.model)
    return entry.model


def _print(model: Model, found: Local) -> None:
    click.echo(clean(f"{model.id}: {shown_size(found.bytes)} in {found.folder}"))
    for path, _ in (*found.loras, *found.turbo_loras):
        click.echo(f"  with {clean(path)}")


def _status(error: RushesError) -> Exit:
    return _STATUSES.get(error.reason, Exit.FAILED) if isinstance(error, EngineError) else status_of(error)


@contextmanager
def _at_once(bar: "_Bar") -> Iterator[None]:
    """Let Ctrl-C end the process at once: the client would wait for the files that its threads are at."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        bar.stop()
        note("Interrupted. What is whole stays; the same command goes on with the rest.")
        os._exit(Exit.INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Bar:
    """How far a download is, on standard error: a bar on a terminal, elsewhere a line for each tenth."""

    def __init__(self, label: str) -> None:
        self._label = clean(label)
        self._began = time.monotonic()
        self._told: tuple[str, int] | None = None
        self._bars: Progress | None = None
        self._row = TaskID(0)
        if sys.stderr.isatty():
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=Console(file=sys.stderr, markup=False, emoji=False, highlight=False),
            )
            self._row = self._bars.add_task(self._label, total=None)

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back."""
        if self._bars:
            self._bars.stop()

    def tell(self, text: str, done: int, total: int | None) -> None:
        if self._bars:
            words = f"{self._label}: {clean(text)}"
            self._bars.update(self._row, description=words, completed=done, total=total)
            return
        mark = (text, int(done * 10 / total) if total else 0)
        if mark != self._told:
            self._told = mark
            far = f": {shown_size(done)} of {shown_size(total)}" if total else ""
            seconds = time.monotonic() - self._began
            note(f"[{seconds:6.1f} s] {self._label}: {text}{far}")
