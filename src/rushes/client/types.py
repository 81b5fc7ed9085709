"""What the wire's answers mean, as plain frozen data. Optional fields that a server leaves out are None.

Every type keeps the answer as it came in ``raw``, so that a newer server's fields stay reachable.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final, Literal
from urllib.parse import urlsplit

OutputKind = Literal["image", "video", "audio", "other"]

TERMINAL: Final = frozenset({"completed", "succeeded", "failed", "cancelled", "terminated"})
"""Words of /status and /result after which nothing changes. /status says ``completed`` for a failure too."""

MEDIA_TYPES: Final[dict[str, str]] = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "avif": "image/avif",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mov": "video/quicktime",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "json": "application/json",
    "zip": "application/zip",
}
"""File name endings and content types; the standard library's table depends on the machine it runs on."""


@dataclass(frozen=True)
class FieldError:
    """One field of an input that does not fit."""

    field: str
    """The field's name, its path joined with dots; empty where the whole input is meant."""
    message: str
    type: str | None = None
    suggestion: str | None = None
    """The nearest known name or value, where the server gives one."""

    def __str__(self) -> str:
        named = not self.field or self.message.startswith(self.field)
        text = self.message if named else f"{self.field}: {self.message}"
        if self.suggestion and self.suggestion not in self.message:
            text += f" (did you mean {self.suggestion}?)"
        return text


@dataclass(frozen=True)
class Submitted:
    """An accepted request. The URLs are as the server gave them, or None."""

    request_id: str
    status_url: str | None = None
    result_url: str | None = None
    cancel_url: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Status:
    """Where a request is: ``in_queue``, ``in_progress``, ``completed`` or ``cancelled``."""

    request_id: str
    status: str
    queue_position: int | None = None
    progress: float | None = None
    """From 0 to 1."""
    eta: float | None = None
    """Seconds that the server expects it still to take."""
    stage: str | None = None
    status_url: str | None = None
    result_url: str | None = None
    cancel_url: str | None = None
    retry_after: float | None = None
    """Seconds that the server asks to wait before the next poll."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def done(self) -> bool:
        return self.status in TERMINAL


@dataclass(frozen=True)
class Failure:
    """Why a request failed. ``node`` is the part of a workflow at fault, where there is one."""

    code: str | None
    message: str
    node: str | None = None

    def __str__(self) -> str:
        text = f"{self.message} [{self.code}]" if self.code else self.message
        return f"{text} (node {self.node})" if self.node else text


@dataclass(frozen=True)
class Output:
    """One produced file, by its address."""

    url: str
    kind: OutputKind


@dataclass(frozen=True)
class Result:
    """A request's outcome, or its present state where it has none yet."""

    request_id: str
    status: str
    output: Mapping[str, Any] = field(default_factory=dict)
    error: Failure | None = None
    created_at: str | float | None = None
    finished_at: str | float | None = None
    cost: float | None = None
    """US dollars; only where it was asked for and the server knows it."""
    engine: str | None = None
    remote_engine: str | None = None
    """The engine of the server behind :attr:`engine`, where that is one and says so."""
    engine_cost_usd: float | None = None
    """US dollars that a remote engine took for it; only where one ran it and the server knows."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def done(self) -> bool:
        return self.status in TERMINAL

    def outputs(self) -> tuple[Output, ...]:
        """Every produced file once, in the server's order.

        The wire names a single file twice (``"video": u`` and ``"videos": [u]``).
        """
        found: dict[str, Output] = {}
        for name, value in self.output.items():
            for url in _addresses(value):
                found.setdefault(url, Output(url, _kind(name, url)))
        return tuple(found.values())


@dataclass(frozen=True)
class Cancellation:
    """The answer to a cancel. A request that already runs, or has ended, is not cancellable."""

    request_id: str
    status: str | None
    outcome: str | None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def cancelled(self) -> bool:
        if self.outcome is not None:
            return self.outcome == "cancelled"
        return self.status == "cancelled"


@dataclass(frozen=True)
class FileRef:
    """An uploaded file. ``url`` is what to put into an input."""

    id: str
    url: str
    name: str | None = None
    content_type: str | None = None
    size: int | None = None
    """Bytes."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class ModelInfo:
    """A model of the catalog. The schemas are there where one model was asked for."""

    model_id: str
    display_name: str | None = None
    description: str | None = None
    categories: tuple[str, ...] = ()
    base_price_usd: float | None = None
    price_unit: str | None = None
    input_schema: Mapping[str, Any] | None = None
    output_schema: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class ModelPage:
    """One page of the catalog. ``total`` counts all models that match."""

    models: tuple[ModelInfo, ...]
    total: int
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[ModelInfo]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def number_or_none(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _addresses(value: object) -> Iterator[str]:
    if isinstance(value, str):
        if value.startswith(("https://", "http://", "/")):
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _addresses(item)
    elif isinstance(value, Mapping):
        yield from _addresses(value.get("url"))


def _kind(name: str, url: str) -> OutputKind:
    ending = PurePosixPath(urlsplit(url).path).suffix.lstrip(".").lower()
    major = MEDIA_TYPES.get(ending, "").partition("/")[0]
    for kind in ("image", "video", "audio"):
        if name.lower().startswith(kind) or major == kind:
            return kind
    return "other"
