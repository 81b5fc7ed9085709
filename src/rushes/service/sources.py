"""Where each input file comes from: what the client wrote, turned into a :class:`Source` or a clear refusal.

Nothing is fetched here but what the body itself carries: addresses are only looked at, so that what can be
refused without asking anybody is refused before the request is accepted.
"""

import base64
import binascii
import time
from typing import Final, Literal
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

from rushes.catalog.samples import sample_names, sample_path
from rushes.errors import MediaError
from rushes.media import links
from rushes.media.fetch import FetchPolicy, check_url
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import AccountId, FileId, RequestId
from rushes.requests.record import Source

FILE_ROUTE: Final = "/v1/files/"
OUTPUT_ROUTE: Final = "/outputs/"


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
            content_type, content = _data_uri(value)
            limit = self._policy.max_bytes[media]
            if len(content) > limit:
                raise MediaError(
                    "input_too_large", f"the data has {len(content)} bytes, {limit} is the most for this field"
                )
            await self._storage.put_bytes(upload_key, content, "application/octet-stream")
            shown = f"data:{content_type};base64,({len(content)} bytes)"
            return Source("stored", upload_key, media), shown
        if sample_path(value) is not None:
            return Source("sample", value, media), value
        own = await self._own(value, account, base_url)
        if own is not None:
            return Source("stored", own, media), value.split("?", 1)[0]
        if "://" not in value:
            raise MediaError(
                "input_not_a_file",
                f"{value[:80]!r} is neither an https:// URL, a data: URI, an uploaded file's url "
                f"(POST {FILE_ROUTE.rstrip('/')}), nor one of the samples {', '.join(sample_names())}",
            )
        check_url(value, self._policy)
        return Source("url", value, media), value

    async def _own(self, value: str, account: AccountId, base_url: str) -> str | None:
        """The storage key, where the value names an upload or an output of this server."""
        if value.startswith("file_"):
            return await self._upload(value, account)
        if "://" not in value:
            return None
        url, base = urlsplit(value), urlsplit(base_url)
        if (url.scheme, url.netloc) != (base.scheme, base.netloc):
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


def _data_uri(value: str) -> tuple[str, bytes]:
    head, comma, body = value[5:].partition(",")
    if not comma:
        raise MediaError("input_not_a_file", "a data: URI needs a comma before its data (RFC 2397)")
    content_type, *parameters = head.split(";")
    try:
        if any(parameter.strip().lower() == "base64" for parameter in parameters):
            padded = body.translate({ord("-"): "+", ord("_"): "/"})
            content = base64.b64decode(padded + "=" * (-len(padded) % 4), validate=True)
        else:
            content = unquote_to_bytes(body)
    except (binascii.Error, ValueError):
        raise MediaError("input_not_a_file", "the data: URI is not valid base64") from None
    if not content:
        raise MediaError("input_not_a_file", "the data: URI is empty")
    return content_type[:60], content
