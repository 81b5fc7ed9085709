"""Uploads: POST /v1/files, as multipart form data or as the bare file; checked before they are accepted."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from rushes.api.auth import authenticate
from rushes.api.bodies import chunks, pour, scratch_file
from rushes.api.forms import FileForm
from rushes.api.http import Head, dumps
from rushes.errors import BodyTooLarge, InvalidInput, MediaError, NotFound
from rushes.media.inspector import Inspector
from rushes.media.sniff import sniff
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import FileId, is_request_id, uuid7
from rushes.requests.record import File
from rushes.service.core import Service
from rushes.service.sources import FILE_ROUTE
from rushes.settings import Settings

_PREFIX: Final = "file_"
_HEAD_BYTES: Final = 4096
_SLACK: Final = 64 * 1024  # what multipart's own lines may add


class Files:
    """Handlers for /v1/files."""

    def __init__(
        self,
        settings: Settings,
        service: Service,
        store: Store,
        storage: Storage,
        inspector: Inspector,
        scratch: Path,
    ) -> None:
        self._most = {"image": settings.max_image_bytes, "video": settings.max_video_bytes}
        self._service = service
        self._store = store
        self._storage = storage
        self._inspector = inspector
        self._scratch = scratch

    async def upload(self, request: Request) -> Response:
        head: Head = request.scope["rushes.head"]
        caller = await authenticate(self._service, head)
        most = max(self._most.values())
        message = f"A file may have {most} bytes."
        if head.length > most + _SLACK:
            raise BodyTooLarge(message)
        source = chunks(await request.receive(), request.receive, most + _SLACK, message)
        content_type = request.headers.get("content-type", "")
        async with scratch_file(self._scratch) as path:
            with await asyncio.to_thread(path.open, "xb") as out:
                if content_type.lower().startswith("multipart/"):
                    form = FileForm(content_type, out)
                    await pour(source, form.write)
                    name = form.finish()
                else:
                    await pour(source, out.write)
                    name = request.headers.get("x-file-name", "")
            file = await self._keep(path, _shown(name), caller.account)
        return Response(dumps(_described(file, head.base_url)), media_type="application/json")

    async def _keep(self, path: Path, name: str, account: Any) -> File:
        with path.open("rb") as opened:
            sniffed = sniff(opened.read(_HEAD_BYTES))
        size = path.stat().st_size
        try:
            if sniffed is None:
                raise MediaError(
                    "input_not_media", "this is no PNG, JPEG, WebP, AVIF, GIF, MP4, WebM or MOV file"
                )
            if size > self._most[sniffed.kind]:
                raise MediaError(
                    "input_too_large", f"the {sniffed.kind} may have {self._most[sniffed.kind]} bytes"
                )
            await self._inspector.check(path, sniffed.kind)
        except MediaError as error:
            detail = [{"loc": ["file"], "msg": f"file: {error.message}", "type": error.reason}]
            raise InvalidInput(f"file: {error.message}", detail=detail) from None
        id_ = FileId(f"{_PREFIX}{uuid7()}")
        file = File(
            id=id_,
            account=account,
            name=name,
            key=f"files/{id_}{sniffed.extension}",
            content_type=sniffed.content_type,
            size=size,
            created_at=time.time(),
        )
        await self._storage.put_file(file.key, path, file.content_type)
        await self._store.add_file(file)
        return file

    async def describe(self, request: Request) -> Response:
        head: Head = request.scope["rushes.head"]
        caller = await authenticate(self._service, head)
        id_ = request.path_params["file_id"]
        file = None
        if id_.startswith(_PREFIX) and is_request_id(id_.removeprefix(_PREFIX)):
            file = await self._store.get_file(FileId(id_), caller.account)
        if file is None:
            raise NotFound("There is no file with this id for this key.")
        return Response(dumps(_described(file, head.base_url)), media_type="application/json")


def _shown(name: str) -> str:
    """A client's name for its file, of which only what can be shown is kept."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "", name)[:200]


def _described(file: File, base_url: str) -> dict[str, Any]:
    return {
        "id": file.id,
        "url": f"{base_url}{FILE_ROUTE}{file.id}",
        "name": file.name,
        "content_type": file.content_type,
        "size": file.size,
    }
