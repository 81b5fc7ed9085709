"""What commands show: errors, tables, and the progress of requests.

On a terminal with colours and bars, elsewhere as plain lines that a log or `grep` can use. Results go to
standard output, everything else to standard error. Texts that come from a server lose their control
characters first, and are never read as markup.
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from rushes.client import errors as client
from rushes.client.types import FieldError, Status
from rushes.errors import RushesError

DOUBLED: Final = re.compile(r"(?<=\w)\.\.(?=\s|$)|(?<=\?)\.(?=[\s;]|$)|(?<=\w)\.(?=;\s)")
"""Full stops that are too many where a server put sentences together: `a..`, `a?.`, `a.; b`."""
CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")
SERVE_HINT: Final = (
    "Is the server running? `rushes serve` starts one here; RUSHES_BASE_URL or --base-url names another."
)
KEY_HINT: Final = (
    "Make a key in the server's folder, or with its --data-dir: `rushes keys create --name NAME`; "
    "then set RUSHES_API_KEY or give --api-key."
)


def clean(text: object) -> str:
    """``text`` on one line and without anything that would steer a terminal."""
    return CONTROL.sub(" ", str(text)).strip()


def tidy(text: str) -> str:
    """A message without the doubled punctuation of sentences put together."""
    return DOUBLED.sub(lambda found: "." if found[0] == ".." else "", text)


def note(text: str, *, indent: str = "") -> None:
    """A line for the user on standard error."""
    print(indent + clean(text), file=sys.stderr, flush=True)


def complain(error: RushesError | client.RushesClientError, *, had_key: bool | None = None) -> None:
    """An error on standard error: its line, one line for each field at fault, and what to do next.

    ``had_key`` says whether the refused call carried an API key, where that is known.
    """
    fields = field_errors(error)
    if isinstance(error, client.Unauthorized) and had_key is False:
        note("rushes: no API key was given.")
        note(KEY_HINT)
        return
    summary = getattr(error, "message", None) or str(error)
    if fields and any(field.message in summary for field in fields):
        summary = "the input does not fit the model"
    note(tidy(f"rushes: {summary}"))
    for field in fields:
        note(tidy(str(field)), indent="  ")
    if isinstance(error, client.ConnectionFailed):
        note(SERVE_HINT)
    elif isinstance(error, client.Unauthorized):
        note(KEY_HINT)
    elif isinstance(error, client.ServerError) and error.trace_id:
        note(f"The server's log has it under X-Request-Id {error.trace_id}.")


def field_errors(error: RushesError | client.RushesClientError) -> tuple[FieldError, ...]:
    """The fields at fault, of a server's answer as well as of an error raised on this machine."""
    if isinstance(error, client.ApiError):
        return error.fields
    found = []
    for entry in getattr(error, "detail", None) or ():
        path = ".".join(str(part) for part in entry.get("loc", ()))
        found.append(FieldError(path, str(entry.get("msg", "does not fit")), entry.get("type")))
    return tuple(found)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, file: IO[str] | None = None) -> None:
    """A table, on standard output unless ``file`` says otherwise; never cut where it is no terminal."""
    out = file or sys.stdout
    cells = [[("" if cell is None else clean(cell)) for cell in row] for row in rows]
    if out.isatty():
        drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in columns:
            drawn.add_column(column, overflow="fold")
        for row in cells:
            drawn.add_row(*row)
        _console(out).print(drawn)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip(), file=out)
    out.flush()


def describe(status: Status) -> str:
    """A status in words: the place in the queue, or how far it is and how long it still takes."""
    if status.status == "in_queue":
        return "queued" if status.queue_position is None else f"queued, position {status.queue_position}"
    if status.status != "in_progress":
        return clean(status.status)
    parts = [clean(status.stage) if status.stage else "running"]
    if status.progress is not None:
        parts.append(f"{status.progress:.0%}")
    if status.eta is not None:
        parts.append(f"about {max(1, round(status.eta))} s left")
    return ", ".join(parts)


class Watch:
    """The progress of one or more requests on standard error, as a context manager.

    :meth:`add` one row per request, :meth:`update` it with every status, :meth:`finish` it. On a terminal
    each row is a bar; elsewhere a row is a line for each change of state or place, and for each tenth.
    """

    def __init__(self, *, file: IO[str] | None = None) -> None:
        self._file = file or sys.stderr
        self._labels: list[str] = []
        self._told: dict[int, object] = {}
        self._began = time.monotonic()
        self._bars: Progress | None = None
        if self._file.isatty():
            self._bars = Progress(
                TextColumn("{task.fields[label]}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=_console(self._file),
            )

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars:
            self._bars.stop()

    def add(self, label: str) -> int:
        """A row for one request; returns its number."""
        self._labels.append(clean(label))
        if self._bars:
            self._bars.add_task("", total=None, label=clean(label))
        return len(self._labels) - 1

    def update(self, row: int, status: Status) -> None:
        if status.done and not self._bars:
            return  # how it ended, :meth:`finish` says: /status calls a failure completed, too
        text = "" if status.done else describe(status)
        if self._bars:
            known = status.done or status.progress is not None
            self._bars.update(
                TaskID(row),
                description=text,
                total=1.0 if known else None,  # without a total the bar pulses
                completed=1.0 if status.done else status.progress or 0.0,
            )
            return
        tenth = None if status.progress is None else int(status.progress * 10)
        mark = (status.status, status.queue_position, status.stage, tenth)
        if self._told.get(row) != mark:
            self._told[row] = mark
            self._line(row, text)

    def finish(self, row: int, text: str) -> None:
        """Say how a row ended."""
        if self._bars:
            self._bars.update(TaskID(row), description=clean(text))
            self._bars.stop_task(TaskID(row))
        else:
            self._line(row, clean(text))

    def _line(self, row: int, text: str) -> None:
        seconds = time.monotonic() - self._began
        print(f"[{seconds:6.1f} s] {self._labels[row]}: {text}", file=self._file, flush=True)


def engine_note(engine: str | None, cost_usd: float | None = None, behind: str | None = None) -> str:
    """What made the outputs, in words, and what it took for them; the draft engine is never passed off as a
    generation, nor is that of a server ``behind`` the engine.
    """
    if behind == "draft":
        return f"made by the draft engine behind {clean(engine)}: a draft for testing, not a generation"
    if engine == "draft":
        return "made by the draft engine: a draft for testing, not a generation"
    took = "" if cost_usd is None else f", which took {dollars(cost_usd)}"
    return f"made by the engine {clean(engine)}{took}" if engine else ""


def dollars(usd: float) -> str:
    """An amount in US dollars, with as many digits as small prices need."""
    return f"${usd:,.2f}" if round(usd, 2) == round(usd, 6) else f"${usd:,.6f}".rstrip("0")


def as_json(value: Mapping[str, Any]) -> str:
    """JSON for standard output, indented, in the order given."""
    return json.dumps(value, ensure_ascii=False, indent=2)


def _console(file: IO[str]) -> Console:
    return Console(file=file, markup=False, emoji=False, highlight=False)
