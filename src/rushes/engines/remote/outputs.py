"""The files that a remote made, onto this machine: through the guarded fetcher, whoever names the address.

What arrives is only sniffed, never decoded in this process; the worker has it inspected before it is stored.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from rushes.engines.remote.base import RemoteFile
from rushes.errors import EngineError, MediaError, StoreUnavailable
from rushes.media.fetch import BadStatus, Fetched, FetchPolicy, fetch
from rushes.media.inspector import Inspector
from rushes.media.sniff import SNIFF_BYTES, Kind, sniff

MAX_BYTES: Final[Mapping[Kind, int]] = {"image": 200_000_000, "video": 2_000_000_000}
"""Of one output. More than of an input: the operator pays for it, and chose who makes it."""
SECONDS: Final = 900.0
"""For one output, where the policy does not give more: the largest video at 20 Mbit/s."""
_EXPIRED: Final = frozenset({401, 403, 404, 410})
"""What hosts say of a signed address whose time is over; of some it is 404, as they have removed the file."""
_WORDS: Final = {
    "input_url_invalid": "its address cannot be used",
    "input_not_https": "its address is not https",
    "input_address_refused": "its address leads to a host that is not public",
    "input_unreachable": "its host cannot be reached",
    "input_incomplete": "its host broke off before the file was whole",
    "input_too_slow": "it did not arrive in time",
    "input_too_large": "it is too large",
    "input_too_many_redirects": "its address redirects too often",
    "input_not_media": "it is neither an image nor a video",
    "input_wrong_kind": "it is of another kind than the model makes",
    "input_encoded": "its host sends it compressed",
}
"""The fetcher's reasons, which speak to users about their inputs, as they are told of an output."""
_LASTING: Final = frozenset({"input_too_large", "input_not_media", "input_wrong_kind", "input_address_refused"})


class OutputNotFetched(EngineError):
    """An output is there and did not come here. ``expired`` where a fresh address may do: poll again for one.
    ``cause`` is the fetcher's reason.
    """

    def __init__(self, message: str, *, cause: str, expired: bool, retryable: bool) -> None:
        self.cause, self.expired = cause, expired
        super().__init__("output_not_fetched", message, retryable=retryable)


async def fetch_output(
    file: RemoteFile,
    dest: Path,
    *,
    engine_origin: str,
    headers: Mapping[str, str],
    policy: FetchPolicy,
    media: Kind | None = None,
) -> Fetched:
    """Bring one output to ``dest``; a file that came with the answer stays at its own path.

    ``headers`` (:meth:`RemoteEngine.headers`) go along where the file wants them, to ``engine_origin`` alone, which
    may be private. ``media`` is the kind that the model makes; None takes both. Raises :class:`OutputNotFetched`,
    and StoreUnavailable where the disk cannot take it.
    """
    if file.path is not None:
        return await asyncio.to_thread(_given, file.path, media)
    own = msgspec.structs.replace(
        policy,
        origins=(engine_origin,),
        seconds=max(policy.seconds, SECONDS),
        max_bytes=MAX_BYTES,
    )
    try:
        return await fetch(
            file.url or "", dest, policy=own, media=media, headers=headers if file.keyed else None
        )
    except BadStatus as error:
        expired = error.http_status in _EXPIRED
        raise OutputNotFetched(
            f"The output could not be fetched: its host answers with status {error.http_status}.",
            cause=error.reason,
            expired=expired,
            retryable=True,
        ) from None
    except MediaError as error:
        raise _not_fetched(error.reason) from None


def _given(path: Path, media: Kind | None) -> Fetched:
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            sniffed = sniff(opened.read(SNIFF_BYTES))
    except OSError as error:
        raise StoreUnavailable("The folder for outputs of remotes cannot be read.") from error
    if sniffed is None:
        raise _not_fetched("input_not_media")
    if media and sniffed.kind != media:
        raise _not_fetched("input_wrong_kind")
    if size > MAX_BYTES[sniffed.kind]:
        raise _not_fetched("input_too_large")
    return Fetched(path, size, sniffed.kind, sniffed.content_type, sniffed.extension)


def _not_fetched(reason: str) -> OutputNotFetched:
    words = _WORDS.get(reason, "its host did not give it")
    return OutputNotFetched(
        f"The output could not be fetched: {words}.",
        cause=reason,
        expired=False,
        retryable=reason not in _LASTING,
    )


async def conform(inspector: Inspector, path: Path, size: tuple[int, int]) -> Path:
    """A copy of the picture at ``path``, beside it, of exactly ``size``, width and height in pixels: scaled until it
    covers it, and cropped evenly; an upright RGB PNG in sRGB, without alpha. The inspector's child does it.

    Raises MediaError where it cannot be decoded, and StoreUnavailable where the copy cannot be written.
    """
    made = path.with_name(f"{path.name}.conformed.png")
    await inspector.normalise(path, made, "image", size=size)
    return made
