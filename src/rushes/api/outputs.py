"""Stored files by signed link: GET and HEAD /outputs/{key}, with ranges and validators (RFC 9110)."""

import re
from typing import Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from rushes.api.http import error_body
from rushes.errors import Forbidden, RangeUnsatisfiable
from rushes.media.storage import Storage
from rushes.service.core import Service

_ETAG: Final = re.compile(r'"[^"]*"')
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class Outputs:
    """The handler for /outputs/. The link is the permission: no key is asked for."""

    def __init__(self, service: Service, storage: Storage) -> None:
        self._service = service
        self._storage = storage

    async def serve(self, request: Request) -> Response:
        key = request.path_params["key"]
        expires = request.query_params.get("expires", "")
        if not (expires.isascii() and expires.isdigit() and len(expires) < 13):
            raise Forbidden
        if not self._service.may_read(key, int(expires), request.query_params.get("signature", "")):
            raise Forbidden
        meta = await self._storage.head(key)
        etag = '"' + meta.etag.strip('"') + '"'
        headers = {
            "Content-Type": meta.content_type,
            "Accept-Ranges": "bytes",
            "ETag": etag,
            "Cache-Control": "private, max-age=3600, immutable",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Content-Disposition": f'inline; filename="{_file_name(key)}"',
        }
        known = request.headers.get("if-none-match", "")
        if known.strip() == "*" or etag in _ETAG.findall(known):  # W/ makes no difference here (13.1.2)
            return Response(status_code=304, headers=headers)
        wanted = request.headers.get("range", "")
        if request.method != "GET" or request.headers.get("if-range", etag) != etag:
            wanted = ""  # a range is defined for GET alone (14.2)
        try:
            span = parse_range(wanted, meta.size)
        except RangeUnsatisfiable as error:
            outside = {"Content-Range": f"bytes */{meta.size}"}
            return Response(error_body(error), error.status, outside, media_type="application/json")
        start, end = span or (0, meta.size)
        headers["Content-Length"] = str(end - start)
        if span:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{meta.size}"
        status = 206 if span else 200
        if request.method == "HEAD" or start == end:
            return Response(status_code=status, headers=headers)
        return StreamingResponse(self._storage.stream(key, start, end), status, headers)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """The first byte and the one past the last of a Range header; None for the whole file.

    Several ranges, and what is no range at all, get the whole file, as RFC 9110 (14.2) allows. Raises
    RangeUnsatisfiable where the range lies outside.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        length = min(int(last), size)
        if not length:
            raise RangeUnsatisfiable
        return size - length, size
    start, end = int(first), min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None
    if start >= size:
        raise RangeUnsatisfiable(f"The file has {size} bytes.")
    return start, end


def _file_name(key: str) -> str:
    """A name to save under: the request and the number."""
    parts = key.split("/")
    name = f"{parts[1]}-{parts[-1]}" if len(parts) > 2 else parts[-1]
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)
