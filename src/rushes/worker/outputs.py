"""From files that an engine made to outputs that are stored and an outcome that is written, in this order."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from rushes import log
from rushes.catalog.model import Model, Price
from rushes.engines.base import Produced
from rushes.errors import StoreUnavailable
from rushes.media.storage import Storage
from rushes.requests.record import Lease, Output

T = TypeVar("T")
_EXTENSIONS: Final = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/avif": "avif",
    "video/mp4": "mp4",
    "video/webm": "webm",
    "video/quicktime": "mov",
    "video/matroska": "mkv",
}
STORE_TRIES: Final = 4


def output_prefix(lease: Lease) -> str:
    """Where one attempt's outputs go. The fence, unlike the attempt, never comes twice."""
    return f"outputs/{lease.request.id}/{lease.fence}"


async def store_outputs(storage: Storage, lease: Lease, produced: Sequence[Produced]) -> list[Output]:
    """Copy the files into storage. Raises StoreUnavailable when storage cannot take them after a few tries."""
    outputs = []
    for number, file in enumerate(produced, 1):
        extension = _EXTENSIONS.get(file.content_type) or _suffix(file.path)
        key = f"{output_prefix(lease)}/{number}.{extension}"
        size = await _put(storage, key, file)
        outputs.append(
            Output(
                key=key,
                kind=file.kind,
                content_type=file.content_type,
                size=size,
                width=file.width,
                height=file.height,
                frames=file.frames,
                fps=file.fps,
                duration=file.frames / file.fps if file.fps else None,
            )
        )
    return outputs


async def discard_outputs(storage: Storage, lease: Lease) -> None:
    """The outcome belongs to somebody else: our files are in nobody's record."""
    try:
        await storage.delete_prefix(output_prefix(lease))
    except StoreUnavailable as error:
        log.event("stray outputs stay", request=lease.request.id, error=error.message)


async def _put(storage: Storage, key: str, file: Produced) -> int:
    """The file's size in bytes."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return await storage.put_file(key, Path(file.path), file.content_type)
        except StoreUnavailable as error:
            log.event("output not stored", key=key, attempt=attempt, error=error.message)
            if attempt == STORE_TRIES:
                raise
            await asyncio.sleep(0.25 * 2**attempt)


def _suffix(path: Path) -> str:
    suffix = path.suffix.lstrip(".").lower()
    return suffix if re.fullmatch(r"[a-z0-9]{1,8}", suffix) else "bin"


def cost_usd(model: Model, outputs: Sequence[Output]) -> float | None:
    """What the operator's price makes of these outputs; None where the model has no price."""
    price: Price = model.price
    if not price.base_usd:
        return None
    units = sum(output.duration or 0.0 for output in outputs) if price.unit == "second" else float(len(outputs))
    return round(price.base_usd * units, 6)


async def until_written(what: str, write: Callable[[], Awaitable[T]]) -> T:
    """Write an outcome, waiting as long as the store is away: what was done must not be lost to an outage.

    Ends by itself when the lease has gone to somebody else: then the write says so.
    """
    delay = 0.1
    while True:
        try:
            return await write()
        except StoreUnavailable as error:
            log.event("outcome not written yet", what=what, error=error.message)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)


def log_end(lease: Lease, engine: str, state: str, **fields: Any) -> None:
    """How an attempt ended, in the log."""
    log.event(
        "attempt ended",
        request=lease.request.id,
        model=lease.request.model,
        engine=engine,
        attempt=lease.request.attempt,
        state=state,
        **fields,
    )
