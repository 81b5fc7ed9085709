"""Where each input file comes from: what the client wrote, turned into a :class:`Source` or a clear refusal.

Nothing is fetched here but what the body itself carries: addresses are only looked at, so that what can be
refused without asking anybody is refused before the request is accepted.
"""

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator, Iterator
from typing import Final, Literal
from urllib.parse import SplitResult, parse_qs, unquote_to_bytes, urlsplit

import msgspec

from rushes.catalog.samples import sample_names, sample_path
from rushes.errors import BodyTooLarge, MediaError
from rushes.media import links
from rushes.media.fetch import MAX_URL_LENGTH, FetchPolicy, check_url
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import AccountId, FileId, RequestId
from rushes.requests.record import Source

FILE_ROUTE: Final = "/v1/files/"
OUTPUT_ROUTE: Final = "/outputs/"
_DATA_SLICE: Final = 1 << 20
"""Characters of base64 decoded at once; a multiple of four."""
_ESCAPED_SLICE: Final = 1 << 14
"""Characters of percent-encoded data decoded at once, each of which can cost some hundred bytes."""
_DATA_HEAD: Final = 1024
_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_PORTS: Final = {"http": 80, "https": 443}


class Sources:
    """Resolves file inputs. Raises MediaError, whose message does not name the field: the caller does."""

    def __init__(self, store: Store, storage: Storage, policy: FetchPolicy, secret: bytes) -> None:
        self._store = store
        self._storage = storage
        self._policy = policy
        self._secret = secret

    async def resolve(
        self,
        value: str,
        media: Literal["image", "video"],
        *,
        account: AccountId,
        base_url: str,
        upload_key: str,
    ) -> tuple[Source, str]:
        """The source, and the value as the record should show it. Bytes of a data URI go to ``upload_key``."""
        if value[:5].lower() == "data:":
            data = _read_data_uri(value)
            size = await self._keep(data, self._policy.max_bytes[media], upload_key)
            return Source("stored", upload_key, media), f"data:{data.content_type};base64,({size} bytes)"
        if sample_path(value) is not None:
            return Source("sample", value, media), value
        own = await self._own(value, account, base_url)
        if own is not None:
            return Source("stored", own, media), value.split("?", 1)[0]
        if "://" not in value:
            raise MediaError(
                "input_not_a_file",
                f"{_quoted(value)} is neither an https:// URL, a data: URI, an uploaded file's url "
                f"(POST {FILE_ROUTE.rstrip('/')}), nor one of the samples {', '.join(sample_names())}",
            )
        _origin(value)
        try:
            check_url(value, self._policy)
        except MediaError as error:
            if FILE_ROUTE not in value and OUTPUT_ROUTE not in value:
                raise
            hint = f"If it is a file of this server, give its id, or its address under {base_url}."
            raise MediaError(error.reason, f"{error.message} {hint}") from None
        return Source("url", value, media), value

    async def _keep(self, data: "_Data", limit: int, key: str) -> int:
        """Store what the URI carries; answers its size in bytes. Much of it goes by pieces, off the loop."""
        most = data.most_bytes()
        too_large = f"the data has more than {limit} bytes, the most for this field"
        if most is not None and most > limit:
            raise MediaError("input_too_large", too_large)
        if len(data.value) > _DATA_SLICE:
            try:
                return await self._storage.put_stream(key, data.stream(), "application/octet-stream", limit)
            except BodyTooLarge:
                raise MediaError("input_too_large", too_large) from None
        content = b"".join(data.pieces())
        if len(content) > limit:
            raise MediaError("input_too_large", too_large)
        await self._storage.put_bytes(key, content, "application/octet-stream")
        return len(content)

    async def _own(self, value: str, account: AccountId, base_url: str) -> str | None:
        """The storage key, where the value names an upload or an output of this server."""
        if value.startswith("file_"):
            return await self._upload(value, account)
        if "://" not in value or len(value) > MAX_URL_LENGTH:
            return None
        url, origin = _origin(value)
        base, own = _origin(base_url)
        if origin != own or "@" in url.netloc:
            return None
        path = url.path.removeprefix(base.path.rstrip("/"))
        if path.startswith(FILE_ROUTE):
            return await self._upload(path.removeprefix(FILE_ROUTE), account)
        if not path.startswith(OUTPUT_ROUTE):
            return None
        key = path.removeprefix(OUTPUT_ROUTE)
        query = parse_qs(url.query)
        expires, signature = query.get("expires", [""])[0], query.get("signature", [""])[0]
        if (
            len(expires) > 12
            or not expires.isascii()
            or not expires.isdigit()
            or not links.verify(self._secret, key, int(expires), signature, time.time())
        ):
            text = "this link to an output is not valid, or no longer: ask for the result again"
            raise MediaError("input_link_expired", text)
        return key

    async def _upload(self, id_: str, account: AccountId) -> str:
        file = await self._store.get_file(FileId(id_), account)
        if file is None:
            raise MediaError("input_gone", f"there is no uploaded file {id_[:60]!r}; upload it again")
        return file.key


def upload_key(request_id: RequestId, number: int) -> str:
    """Where the bytes of a data URI wait until they are checked."""
    return f"uploads/{request_id}/{number}"


def _quoted(value: str) -> str:
    """What was sent, for a message; but no user name and password, should it hold some."""
    return "this value" if "@" in value else repr(value[:80])


def _origin(url: str) -> tuple[SplitResult, tuple[str, str, int | None]]:
    """A URL taken apart, and its scheme, host and port in the one form in which they can be compared.

    Raises MediaError, in words of its own: those of urllib quote the host's part with whatever is in it.
    """
    try:
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        return parts, (scheme, parts.hostname or "", parts.port or _PORTS.get(scheme))
    except ValueError:
        text = "the address cannot be read: its host or port is none that can be"
        raise MediaError("input_url_invalid", text) from None


class _Data(msgspec.Struct, frozen=True):
    """A data: URI (RFC 2397) that was looked over but not decoded."""

    value: str
    start: int
    """Where its data begin, and where they end without the padding."""
    end: int
    content_type: str
    base64: bool

    def most_bytes(self) -> int | None:
        """How many bytes the data are; None where only decoding tells."""
        return (self.end - self.start) * 3 // 4 if self.base64 else None

    def pieces(self) -> Iterator[bytes]:
        """The data, decoded. Raises MediaError where they cannot be."""
        at = self.start
        while at < self.end:
            cut = min(at + (_DATA_SLICE if self.base64 else _ESCAPED_SLICE), self.end)
            if self.base64:
                yield _decoded(self.value[at:cut])
            else:
                escape = self.value.rfind("%", cut - 2, cut) if cut < self.end else -1
                cut = escape if escape > at else cut  # before an escape, not in the middle of it
                yield unquote_to_bytes(self.value[at:cut])
            at = cut

    async def stream(self) -> AsyncIterator[bytes]:
        """The same, decoded in threads."""
        pieces = self.pieces()
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece


def _decoded(text: str) -> bytes:
    try:
        plain = text.encode("ascii").translate(_URL_SAFE)
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise _not_base64() from None


def _not_base64() -> MediaError:
    return MediaError("input_not_a_file", "the data: URI is not valid base64")


def _read_data_uri(value: str) -> _Data:
    comma = value.find(",", 5, 5 + _DATA_HEAD)
    if comma < 0:
        raise MediaError("input_not_a_file", "a data: URI needs a comma before its data (RFC 2397)")
    content_type, *parameters = value[5:comma].split(";")
    is_base64 = any(parameter.strip().lower() == "base64" for parameter in parameters)
    start, end = comma + 1, len(value)
    if is_base64:
        while end > start and len(value) - end < 2 and value[end - 1] == "=":
            end -= 1
        # padding that is too much, or in the middle; a piece that ends in some would be decoded
        odd = (start - end) % 4
        if odd == 3 or len(value) - end > odd or value.find("=", start, end) >= 0:
            raise _not_base64()
    if start == end:
        raise MediaError("input_not_a_file", "the data: URI is empty")
    return _Data(value, start, end, content_type[:60], is_base64)
